"""The public names and signatures are pinned, and reading plans stays light."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import freezeplan

NAMES = [
    "AppliedPlan",
    "FreezePlanError",
    "FreezePlanWarning",
    "Plan",
    "Resolution",
    "Rule",
    "applied",
    "apply_plan",
    "infer_plan",
    "load_delta",
    "load_plan",
    "resolve_plan",
]


def test_the_public_names():
    """These names are the public interface; each is there and has documentation."""
    assert freezeplan.__all__ == NAMES
    assert set(dir(freezeplan)) == {*NAMES, "__version__"}
    assert [name for name in NAMES if not inspect.getdoc(getattr(freezeplan, name))] == []


def test_a_name_that_does_not_exist():
    """An unknown name is an AttributeError as of any module."""
    with pytest.raises(AttributeError) as error:
        _ = freezeplan.freeze

    assert str(error.value) == "module 'freezeplan' has no attribute 'freeze'"


SIGNATURES = {
    "applied": "(model: 'nn.Module') -> 'AppliedPlan | None'",
    "apply_plan": (
        "(model: 'nn.Module', plan: 'PlanLike', *, lr: 'float | None' = None, weight_decay: 'float | None' = None, "
        "scheduler: 'Scheduler' = 'torch', replace: 'bool' = False, epochs: 'int | None' = None, "
        "guard: 'bool' = True) -> 'AppliedPlan'"
    ),
    "infer_plan": "(model: 'nn.Module', optimizer: 'torch.optim.Optimizer | None' = None) -> 'Plan'",
    "load_delta": "(model: 'nn.Module', path: 'str | Path') -> 'Delta'",
    "load_plan": "(plan: 'PlanLike') -> 'Plan'",
    "resolve_plan": "(plan: 'PlanLike', model: 'nn.Module') -> 'Resolution'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_of_the_functions(name):
    """A public function's parameters are its contract."""
    assert str(inspect.signature(getattr(freezeplan, name))) == SIGNATURES[name]


def test_what_an_applied_plan_offers():
    """An applied plan offers these and nothing else."""
    offered = {name for name in dir(freezeplan.AppliedPlan) if not name.startswith("_")}

    assert offered == {
        "attach",
        "cached",
        "check",
        "load_state_dict",
        "param_groups",
        "phase",
        "plan",
        "prefix",
        "save_delta",
        "scheduler",
        "scheduler_kwargs",
        "seal",
        "state_dict",
        "step",
        "trainable_parameters",
        "undo",
        "verify",
    }
    assert str(inspect.signature(freezeplan.AppliedPlan.seal)) == "(self, *, copy: 'bool' = False) -> 'None'"


def test_the_keys_of_a_plan():
    """The plan language has these keys; a new one is a change of the language."""
    assert list(freezeplan.Plan.model_fields) == [
        "version",
        "name",
        "description",
        "rules",
        "default",
        "layer_decay",
        "layer_decay_min_scale",
        "weight_decay",
        "overlap",
        "phases",
    ]
    assert list(freezeplan.Rule.model_fields) == [
        "match",
        "type",
        "role",
        "stage",
        "frozen",
        "lr_mult",
        "wd_mult",
        "layer_decay",
        "mode",
        "reinit",
        "optional",
    ]


HEAVY = ("torch", "timm", "rich")


def heavy_imports(statement):
    """What of the heavy packages a fresh Python has imported after a statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


LIGHT = [
    "import freezeplan",
    "import freezeplan.plan",
    "import freezeplan.plan.load; freezeplan.plan.load.load_plan('linear_probe')",
    "import freezeplan.resolve, freezeplan.report, freezeplan.plan.location, freezeplan.resolve.hints",
    "from freezeplan import Plan, Rule, Resolution, load_plan, FreezePlanError",
]


@pytest.mark.parametrize(
    "statement", [*LIGHT[:2], *(pytest.param(statement, marks=pytest.mark.slow) for statement in LIGHT[2:])]
)
def test_reading_and_resolving_plans_needs_nothing_heavy(statement):
    """Plans are read, checked and resolved without torch, timm or rich."""
    assert heavy_imports(statement) == []


@pytest.mark.slow
def test_the_check_of_imports_can_fail():
    """The check above sees a heavy import where there is one."""
    assert heavy_imports("import freezeplan.report.terminal") == ["rich"]
    assert heavy_imports("from freezeplan import apply_plan") == ["torch"]
