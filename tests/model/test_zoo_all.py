"""Every model of timm, by name, on the meta device: five portable presets mean on each what they say.

One model of every twelfth architecture module belongs to the quick suite, all of them to ``pytest -m zoo``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import timm
from packaging.version import Version
from timm.optim import param_groups_layer_decay
from torch import nn

from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe
from freezeplan.model.description import Description
from freezeplan.plan.load import load_plan
from freezeplan.resolve.resolver import resolve

PRESETS = ("linear_probe", "bitfit", "llrd", "frozen_stages_2", "gradual_unfreeze")
NO_CLASSIFIER = {
    "linear_probe": "{} is an encoder without a classifier",
    "bitfit": "{} is an encoder without a classifier",
    "gradual_unfreeze": "every parameter of {} is frozen in phase 'head'",
}
"""Presets that need a classifier, and what they are refused with where there is none."""

HERE = Path(__file__).parents[1]
QUICK = {families.ZOO[family]["model"] for family in families.QUICK} | {"mobilenetv5_300m_enc"}
"""One of every twelfth architecture module, and an encoder whose ``feature_info`` names a module that is not there."""
NAMES = [
    pytest.param(name, marks=[pytest.mark.zoo, *([] if name in QUICK else [pytest.mark.slow])])
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith("timm.")  # other tests register models of the experiment
]
LEFT_OUT: dict[str, dict[str, list[str]]] = json.loads((HERE / "left_out.json").read_text())


@pytest.fixture(scope="module")
def left_out() -> Callable[[Description], set[str]]:
    """What the command that writes ``left_out.json`` finds."""
    spec = importlib.util.spec_from_file_location("pages", HERE.parent / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.left_out


def classifier(model: nn.Module) -> set[int]:
    """Identities of the classifier's parameters, by timm's own two statements of what it is."""
    waiting = [model.get_classifier()] if hasattr(model, "get_classifier") else []
    entry = model.pretrained_cfg.get("classifier") or ()
    named = dict(model.named_modules())
    waiting += [named[name] for name in ([entry] if isinstance(entry, str) else entry) if name in named]
    found: set[int] = set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, nn.Module):
            found |= {id(parameter) for parameter in part.parameters()}
        elif isinstance(part, (list, tuple)):
            waiting += part
    return found


def refusal(preset: str, model: nn.Module, described: Description) -> str:
    """The documented reason for which a preset does not fit, from facts of the model; empty if it has to fit."""
    if preset in NO_CLASSIFIER and not classifier(model):
        return NO_CLASSIFIER[preset].format(described.model)
    if preset == "frozen_stages_2" and described.last_stage < 3:
        return f"{described.model} has a stem (stage 0) and {described.last_stage} stages"
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_portable_presets_fit_every_model(name: str, left_out: Callable[[Description], set[str]]) -> None:
    """Each resolves or is refused for its documented reason; a linear probe is the classifier, llrd is timm's.

    Stages count from the stem without a gap; only VGG has no stem. Groups are disjoint, and with what is always frozen
    they are the model. What timm's matcher leaves out is what ``docs/zoo.md`` says.
    """
    model = create_model(name, meta=True, num_classes=10)
    described = describe(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    everything = sorted(first.values())
    module = timm.models._registry._model_to_module[name]
    lowest = 1 if module == "vgg" else 0

    assert sorted(set(described.stages.values())) == list(range(lowest, described.last_stage + 1))
    assert described.last_stage >= 3
    assert classifier(model).isdisjoint(id(named[tensor]) for tensor in described.stages)
    if Version(timm.__version__) >= Version("1.0.31"):  # of which the file tells
        assert left_out(described) == {part for part, models in LEFT_OUT.get(module, {}).items() if name in models}
    for preset in PRESETS:
        expected = refusal(preset, model, described)
        if expected:
            with pytest.raises(PlanError) as error:
                resolve(load_plan(preset), described)
            assert expected in str(error.value)
            continue
        resolution = resolve(load_plan(preset), described)
        held = [name for group in resolution.groups for name in group.tensors]
        frozen = [row.name for row in resolution.always_frozen]
        assert sorted(first[id(named[name])] for name in (*held, *frozen)) == everything
        if preset == "linear_probe":
            assert {id(named[row.name]) for row in resolution.trained} == classifier(model)
        elif preset == "frozen_stages_2":
            assert {described.stages[row.name] for row in resolution.frozen} <= {0, 1, 2}
            assert all(described.stages.get(row.name, 3) > 2 for row in resolution.trained)
        elif preset == "llrd" and hasattr(model, "group_matcher"):
            groups = param_groups_layer_decay(model, layer_decay=0.75)
            scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
            assert {id(named[row.name]): row.lr_mult for row in resolution.trained} == scales
        elif preset == "gradual_unfreeze":
            counts = [len(part.trained) for part in resolution.parts]
            assert counts == sorted(counts)
            assert counts[-1] == len(described.tensors)
            assert len(set(counts)) == min(described.last_stage, 12) + 2 - lowest
