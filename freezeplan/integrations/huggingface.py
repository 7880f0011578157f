"""transformers: a callback that moves plans through their phases, and the optimizer that the arguments ask for."""

from __future__ import annotations

from typing import Any

import torch

from freezeplan.applied_plan import AppliedPlan
from freezeplan.errors import ApplyError, MissingExtraError
from freezeplan.integrations.plans import Plans

try:
    import accelerate  # noqa: F401  # its Trainer needs it
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
    from transformers.trainer_utils import has_length
except ImportError as error:
    raise MissingExtraError.of(error, "transformers") from None


class FreezePlanCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Calls ``applied.step`` before each epoch, with the metrics of ``evaluate``; checkpoints hold the phase.

    The plan is applied to ``model.timm_model`` before the Trainer is made:
    ``Trainer(model, args, callbacks=[FreezePlanCallback()], ...)``.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}
        self._plans: Plans | None = None
        self._metrics: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        """Find the plans, and go on in the phase of the checkpoint if there is one."""
        self._plans = Plans(of["model"], args.world_size, counted=has_length(of["train_dataloader"]))
        found = state.stateful_callbacks.get(type(self).__name__, {})
        saved = found.get("attributes", {}).get("saved") if isinstance(found, dict) else None
        if saved:
            self._plans.load_state_dict(saved["plans"])
            self._metrics = dict(saved["metrics"])

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        """Begin an epoch."""
        if self._plans is not None:
            self._plans.step(int(state.epoch or 0), self._metrics)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        """Keep what was measured, ahead of the checkpoint."""
        self._metrics.update({name: value for name, value in of["metrics"].items() if isinstance(value, float)})

    def state(self) -> dict[str, Any]:
        """Return phases and metrics, for ``trainer_state.json``."""
        if self._plans is not None:
            self.saved = {"plans": self._plans.state_dict(), "metrics": dict(self._metrics)}
        return {"args": {}, "attributes": {"saved": self.saved}}


def create_optimizer(applied: AppliedPlan, args: TrainingArguments) -> torch.optim.Optimizer:
    """Return the optimizer that ``args.optim`` names, on the plan's groups: ``Trainer(optimizers=(it, None))``.

    Args:
        applied: The live plan; with ``scheduler="any"`` it is attached to the optimizer.
        args: Learning rate, betas, epsilon and weight decay are taken where the groups carry none.

    Raises:
        ApplyError: If the optimizer chooses its own parameters (GaLore, LOMO), or does not fit the plan.
    """
    made, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    if not isinstance(made, type) or not issubclass(made, torch.optim.Optimizer) or {"params", "model"} & set(settings):
        name = getattr(args.optim, "value", args.optim)
        raise ApplyError(f"optim={name!r} makes its own groups of parameters, so it cannot take the plan's")
    optimizer = made(applied.param_groups, **{"weight_decay": args.weight_decay, **settings})
    if applied.scheduler == "any":
        applied.attach(optimizer)
    applied.check(optimizer)
    return optimizer
