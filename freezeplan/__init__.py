"""Declarative layer freezing for timm.

A plan is a short file that says, for every parameter of a model, whether it is frozen or with which multiple of the
learning rate it is trained. ``apply_plan(model, plan)`` checks it, applies it, and can prove afterwards that it held.

Names are resolved when they are first used (PEP 562), so that ``import freezeplan.plan`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AppliedPlan": "applied_plan",
    "FreezePlanError": "errors",
    "FreezePlanWarning": "errors",
    "Plan": "plan",
    "Resolution": "resolve",
    "Rule": "plan",
    "applied": "applied_plan",
    "apply_plan": "api",
    "infer_plan": "importers.infer",
    "load_delta": "proof",
    "load_plan": "plan",
    "resolve_plan": "api",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from freezeplan.api import apply_plan as apply_plan
    from freezeplan.api import resolve_plan as resolve_plan
    from freezeplan.applied_plan import AppliedPlan as AppliedPlan
    from freezeplan.applied_plan import applied as applied
    from freezeplan.errors import FreezePlanError as FreezePlanError
    from freezeplan.errors import FreezePlanWarning as FreezePlanWarning
    from freezeplan.importers.infer import infer_plan as infer_plan
    from freezeplan.plan.load import load_plan as load_plan
    from freezeplan.plan.schema import Plan as Plan
    from freezeplan.plan.schema import Rule as Rule
    from freezeplan.proof.delta import load_delta as load_delta
    from freezeplan.resolve.resolution import Resolution as Resolution


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'freezeplan' has no attribute {name!r}")
    return getattr(import_module(f"freezeplan.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
