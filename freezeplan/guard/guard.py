"""What stands between a plan and the optimizers that train its model: attached, checked, watched as they step."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from freezeplan.apply import freeze, lr_multiplier, wrapped
from freezeplan.errors import ApplyError
from freezeplan.guard import checks, optimizer_hook, schedulers
from freezeplan.resolve.resolution import Resolution


class Guard:
    """The optimizers of one model, and what is checked and multiplied when they step. It keeps none of them alive.

    Args:
        model: The model, without wrappers.
        resolution: What the plan means for it.
        phase: Returns the index of the phase that holds now.
        kind: For whom the plan was applied: ``torch``, ``timm`` or ``any``.
        closely: Whether flags, modes and rates are checked when an optimizer first steps or something changed.
    """

    def __init__(
        self,
        model: nn.Module,
        resolution: Resolution,
        phase: Callable[[], int],
        kind: freeze.Scheduler,
        *,
        closely: bool,
    ):
        self.model, self.resolution, self.phase, self.kind, self.closely = model, resolution, phase, kind, closely
        self._multiplier: lr_multiplier.Multiplier | None = None
        self._watcher: optimizer_hook.OptimizerWatcher | None = None
        self._optimizers: list[weakref.ref[Any]] = []
        self._all_known = False
        self._first: dict[int, weakref.ref[nn.Parameter]] = {}

    @property
    def attached(self) -> bool:
        """Whether the rates are multiplied inside some optimizer's step."""
        return self._multiplier is not None

    @property
    def optimizers(self) -> list[Any]:
        """Those that were attached, checked or seen as they stepped, and still exist."""
        return [found for found in (reference() for reference in self._optimizers) if found is not None]

    def watch(self, now: Iterable[nn.Parameter] | None = None) -> None:
        """Remember the parameters, and watch the steps of every optimizer where that is wanted; once.

        Args:
            now: The parameters that the model has now, if they were looked up already.
        """
        if self._first:
            return
        found = list(self.model.parameters() if now is None else now)
        self._first = {id(parameter): weakref.ref(parameter) for parameter in found}
        if not (self.closely or self.kind == "any"):
            return
        here = weakref.ref(self)
        self._watcher = optimizer_hook.OptimizerWatcher(
            lambda: guard.model.parameters() if (guard := here()) is not None else (),
            lambda optimizer, when: guard._look(optimizer, when) if (guard := here()) is not None else None,
            lambda optimizer: guard._ratios(optimizer) if (guard := here()) is not None else schedulers.Ratios((), ()),
            lambda optimizer: guard._is_multiplied(optimizer) if (guard := here()) is not None else False,
            now=found,
            closely=self.closely,
        )

    def attach(self, optimizers: Sequence[Any]) -> None:
        """Multiply the rates inside each step of these optimizers, and of no others.

        Raises:
            ApplyError: If the plan was applied for another scheduler, or they miss a trained parameter, multiply
                already, or have no step that torch hooks.
        """
        if self.kind != "any":
            raise ApplyError(
                f"this plan was applied with scheduler={self.kind!r}, so its groups are multiplied already",
                notes=["apply_plan(model, plan, scheduler='any'), then attach"],
            )
        if not optimizers:
            raise ApplyError("attach was called without an optimizer", notes=["applied.attach(optimizer)"])
        trained = freeze.trained(self.model, self.resolution)
        lr_multiplier.check_fresh(optimizers, {id(parameter): name for named in trained for name, parameter in named})
        made = lr_multiplier.Multiplier(optimizers, self._rates())
        if self._multiplier is not None:
            self._multiplier.remove()
        self._multiplier = made
        self._know(optimizers)

    def check(self, optimizers: Sequence[Any], when: str = "") -> None:
        """Refuse what other code did to the model and to its optimizers.

        Args:
            optimizers: All that train the model; without any, those that are known.
            when: Ends each message.

        Raises:
            ApplyError: With all problems at once.
        """
        if optimizers:
            self._know(optimizers)
        if self._multiplier is not None:
            self._multiplier.end_failed_steps()
        self._check(when, None)

    def enter_phase(self) -> None:
        """Take the rates of the phase that holds now, and look at each optimizer anew when it steps next."""
        if self._watcher is not None:
            self._watcher.recheck()
        if self._multiplier is not None:
            self._multiplier.use(self._rates())

    def remove(self) -> None:
        """Take all hooks away."""
        if self._multiplier is not None:
            self._multiplier.remove()
            self._multiplier = None
        if self._watcher is not None:
            self._watcher.remove()
            self._watcher = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, an average of its weights for one, is attached to no optimizer.
        gone: dict[str, Any] = {"_multiplier": None, "_watcher": None, "_optimizers": [], "_all_known": False}
        return {**self.__dict__, **gone, "_first": {}}

    def _know(self, optimizers: Sequence[Any]) -> None:
        self._optimizers, self._all_known = [weakref.ref(optimizer) for optimizer in optimizers], True

    def _look(self, optimizer: Any, when: str) -> None:
        if self.kind == "any":
            self._check_attached(optimizer)
        if not self.closely:
            return
        known = self.optimizers
        inside = [inner for one in known for inner in wrapped.held_by(one)]
        if all(found is not optimizer for found in (*known, *inside)):
            self._optimizers.append(weakref.ref(optimizer))
        self._check(when, optimizer)

    def _check_attached(self, optimizer: Any) -> None:
        if self._multiplier is not None and self._multiplier.covers(optimizer):
            return
        title, names = type(optimizer).__name__, self._trained_names(optimizer)
        if not names:
            return
        several = self._multiplier is not None
        raise ApplyError(
            f"{title} is about to step {len(names)} trained parameters, such as {names[0]!r}, and is not attached: "
            "with scheduler='any' the rates are multiplied inside the steps of attached optimizers alone",
            notes=[
                f"attach all in one call: applied.attach(..., this {title})"
                if several
                else f"applied.attach(this {title})"
            ],
        )

    def _trained_names(self, optimizer: Any) -> list[str]:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = freeze.trained(self.model, self.resolution)
        return [name for named in trained for name, parameter in named if id(parameter) in held]

    def _is_multiplied(self, optimizer: Any) -> bool:
        return self._multiplier is not None and self._multiplier.is_scaling(optimizer)

    def _ratios(self, optimizer: Any) -> schedulers.Ratios:
        return schedulers.ratios(optimizer, self._rates(), self._decays(), self.kind)

    def _check(self, when: str, stepping: Any) -> None:
        problems = checks.of_model(self.model, self.resolution.parts[self.phase()], stepping, self._is_new)
        if not problems:
            problems = checks.of_optimizers(
                self.model,
                self.resolution,
                self.optimizers if stepping is None else [stepping],
                checks.Multipliers(self._rates(), self._decays()),
                self.kind,
                all_known=self._all_known and stepping is None,
                stepping=stepping is not None,
            )
        if problems:
            notes = (when,) if when else ()
            raise ApplyError(dataclasses.replace(found, notes=(*found.notes, *notes)) for found in problems)

    def _is_new(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter came into the model after the plan was applied, as far as that is known."""
        first = self._first.get(id(parameter))
        return bool(self._first) and (first is None or first() is not parameter)

    def _rates(self) -> dict[int, float]:
        """``id`` of each live trained parameter -> its multiplier in the phase that holds now."""
        index = self.phase()
        return {
            id(parameter): group.rates[index] or group.lr_mult  # frozen now: what its group says has no effect
            for group, named in zip(self.resolution.groups, freeze.trained(self.model, self.resolution), strict=True)
            for _, parameter in named
        }

    def _decays(self) -> dict[int, float]:
        """``id`` of each live trained parameter -> the factor of its weight decay."""
        return {
            id(parameter): group.wd_mult
            for group, named in zip(self.resolution.groups, freeze.trained(self.model, self.resolution), strict=True)
            for _, parameter in named
        }
