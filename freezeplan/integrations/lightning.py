"""Lightning: a callback that moves plans through their phases, and what ``configure_optimizers`` returns."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from freezeplan.applied_plan import AppliedPlan
from freezeplan.errors import MissingExtraError
from freezeplan.integrations.plans import Plans

try:
    from lightning import pytorch as pl
except ImportError as error:
    raise MissingExtraError.of(error, "lightning") from None


class FreezePlanCallback(pl.Callback):  # type: ignore[misc]
    """Calls ``applied.step`` before each epoch, with Lightning's metrics, and puts the phase into its checkpoints.

    The plan is applied in the ``__init__`` of the LightningModule, so that a checkpoint is loaded after ``reinit``:
    ``pl.Trainer(callbacks=[FreezePlanCallback()])``.
    """

    def __init__(self) -> None:
        self._plans: Plans | None = None
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the plans, before weights are loaded and the model is wrapped.

        Raises:
            ApplyError: If there is none, or one has phases and several processes train.
        """
        self._plans = Plans(pl_module, trainer.world_size) if stage == "fit" else None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch."""
        if self._plans is not None:
            self._plans.step(trainer.current_epoch, self._metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what was measured, ahead of a checkpoint that is written now; a resumed trainer may know nothing yet."""
        self._metrics.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what was measured."""
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return phases and metrics, for Lightning's checkpoint."""
        return {"plans": self._plans.state_dict(), "metrics": self._metrics} if self._plans is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the phase of a checkpoint; where nothing is trained there is none."""
        if self._plans is not None and state_dict:
            self._plans.load_state_dict(state_dict["plans"])
            self._metrics = dict(state_dict["metrics"])


def configure_optimizers(
    applied: AppliedPlan, optimizer: Optimizer, scheduler: Any = None, **settings: Any
) -> dict[str, Any]:
    """Return what ``LightningModule.configure_optimizers`` returns, checked against the plan.

    Args:
        applied: The live plan; with ``scheduler="any"`` it is attached to the optimizer.
        optimizer: Made from ``applied``.
        scheduler: One of its schedulers, or none.
        **settings: Lightning's settings of a scheduler, such as ``interval="step"`` or ``monitor="val_loss"``.

    Raises:
        ApplyError: If the optimizer does not fit the plan, or the scheduler flattens its rates.
    """
    if applied.scheduler == "any":
        applied.attach(optimizer)
    applied.check(optimizer)
    return {"optimizer": optimizer, **({"lr_scheduler": {"scheduler": scheduler, **settings}} if scheduler else {})}
