"""How long a plan is live on a model: from ``apply_plan`` to ``undo``, in copies and pickles of the model too."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any, Self

from torch import nn

from freezeplan.apply import freeze, phases
from freezeplan.cache.cached import Found
from freezeplan.errors import ApplyError
from freezeplan.guard.guard import Guard
from freezeplan.model import names
from freezeplan.plan.schema import Plan
from freezeplan.proof.seal import Seal
from freezeplan.resolve.resolution import Resolution

ATTRIBUTE = "_freezeplan"
LIVE: weakref.WeakSet[Lifetime] = weakref.WeakSet()
"""Plans that were applied in this process and maybe undone since, those of copies too."""


class Lifetime:
    """What is kept of a plan while it is live: its names, settings, hooks and what ``undo`` gives back.

    ``AppliedPlan`` adds what can be asked of it.
    """

    def __init__(
        self,
        model: nn.Module,
        resolution: Resolution,
        before: freeze.Before,
        *,
        lr: float | None,
        weight_decay: float | None,
        scheduler: freeze.Scheduler,
        epochs: int | None,
        guard: bool,
    ):
        self.model = model
        """The model, without wrappers."""
        self.resolution = resolution
        """What the plan means for it, tensor by tensor."""
        self._lr, self._weight_decay, self._scheduler = lr, weight_decay, scheduler
        self._epochs = epochs
        self._progress = phases.Progress()
        self._guard = Guard(model, resolution, self._phase_index, scheduler, closely=guard)
        self._before = before
        self._seal: Seal | None = None
        self._cuts: Found | None = None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.resolution.plan

    @property
    def scheduler(self) -> freeze.Scheduler:
        """Who multiplies the rates, as ``apply_plan`` was told: ``torch``, ``timm`` or ``any``."""
        return self._scheduler

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Fresh groups for an optimizer, of the parameters that the model has now.

        Each has ``params``, ``param_names``, ``name``, ``lr_mult``, ``wd_mult``, and ``lr``, ``weight_decay``,
        ``lr_scale`` as ``apply_plan`` says. Frozen parameters are in none.
        """
        self._check_live()
        self._guard.watch()  # of a copy of the model none are watched until it is trained itself
        return freeze.param_groups(
            self.model, self.resolution, lr=self._lr, weight_decay=self._weight_decay, scheduler=self._scheduler
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.param_groups)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, for ``torch.nn.utils.clip_grad_norm_``."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def phase(self) -> str:
        """Name of the phase that the model is in; empty for a plan without phases."""
        return self._part.phase

    @property
    def _part(self) -> Resolution:
        return self.resolution.parts[self._phase_index()]

    def _phase_index(self) -> int:
        return phases.phase_at(self.plan.phases, self._progress, self._epochs)

    def undo(self) -> None:
        """Give the model back its flags and modes, and clear gradients. Values stay. Twice is once."""
        if self._is_live:
            self._guard.remove()
            self._unseal()
            freeze.restore(names.survey(self.model), self._before)
            del self.model.__dict__[ATTRIBUTE]

    def _unseal(self) -> None:
        if self._seal is not None:
            self._seal.loads.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, an average of its weights for one, lies elsewhere.
        seal = self._seal and dataclasses.replace(self._seal, places={})
        return {**self.__dict__, "_cuts": None, "_seal": seal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        LIVE.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        frozen, trained = len(self.resolution.frozen), len(self.resolution.trained)
        what = f"{type(self).__name__} {self.plan.title!r} on {self.resolution.model}"
        return f"<{what}: {frozen} tensors frozen, {trained} trained>"

    @property
    def _is_live(self) -> bool:
        return self.model.__dict__.get(ATTRIBUTE) is self

    def _check_live(self) -> None:
        if not self._is_live:
            raise ApplyError(f"the plan {self.plan.title!r} is no longer live on this model: it was undone or replaced")
