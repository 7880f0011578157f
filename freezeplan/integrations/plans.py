"""The plans that are live somewhere in a trainer's module: moved through their phases together, with one state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from freezeplan.applied_plan import AppliedPlan, applied
from freezeplan.errors import ApplyError


class Plans:
    """All plans within a module, by the name of the model that each is live on.

    Args:
        module: What the trainer trains; the plans were applied to it or to models in it.
        processes: How many processes train it.
        counted: Whether the trainer counts passes over its data.

    Raises:
        ApplyError: If no plan is live in it, or one has phases and passes are not counted, or there are several
            processes: a trainer wraps a model once, and gradients of what is thawed later would not be synchronised.

    Examples:
        >>> from freezeplan.api import apply_plan
        >>> from freezeplan.model import create_model
        >>> module = nn.ModuleDict({"net": create_model("test_resnet", num_classes=3)})
        >>> live = apply_plan(module["net"], "linear_probe")
        >>> Plans(module).state_dict()["net"]["progress"]["epoch"]
        0
    """

    def __init__(self, module: nn.Module, processes: int = 1, *, counted: bool = True):
        self._live: dict[str, AppliedPlan] = {}
        for name, part in module.named_modules():
            live = applied(part)
            if live is not None and live not in self._live.values():  # a wrapper answers for what it wraps
                self._live[name] = live
        if not self._live:
            notes = ["apply_plan(model, plan, ...) where the model is made, before the trainer starts"]
            raise ApplyError(f"no plan is live in {type(module).__name__}", notes=notes)
        phased = [live.plan.title for live in self._live.values() if live.plan.phases]
        if phased and processes > 1:
            raise ApplyError(
                f"the plan {phased[0]!r} has phases, and {processes} processes train: this trainer wraps the model "
                "once, so gradients of what a later phase thaws would not be synchronised",
                notes=["train in one process, or in a loop of your own: applied.step(epoch=e, rewrap=True)"],
            )
        if phased and not counted:
            raise ApplyError(
                f"the plan {phased[0]!r} has phases, and this trainer counts no epochs of data without a length",
                notes=["give the data set a __len__, or train in a loop of your own: applied.step(epoch=e)"],
            )

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Say which epoch comes next, from 0, and what was measured after the one before it.

        What a phase thaws is put in train: not every trainer calls ``model.train()`` at the start of an epoch.
        """
        for live in self._live.values():
            if live.step(epoch=epoch, metrics=metrics):
                live.model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return how far each plan is, as plain data."""
        return {name: live.state_dict() for name, live in self._live.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ApplyError: If the plans are live on other models than then, or are others.
        """
        if set(state) != set(self._live):
            raise ApplyError(f"this state has plans on {sorted(state)}, and they are live on {sorted(self._live)}")
        for name, live in self._live.items():
            live.load_state_dict(state[name])
