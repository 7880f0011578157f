"""Names are canonical: whatever is wrapped around a model or a part of it, a plan means the same."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from freezeplan import apply_plan, resolve_plan
from freezeplan.model.describer import create_model

MODEL = create_model("test_resnet", num_classes=3)
PARTS = ["layer1", "layer1.0", "layer2.0.conv1", "layer3.0.bn2", "layer4", "conv1.0", "fc"]
INNER = {
    "compile": lambda part: torch.compile(part, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
}
OUTER = {**INNER, "average": torch.optim.swa_utils.AveragedModel}
PLAN = {
    "version": 1,
    "rules": [
        {"type": "BatchNorm2d", "mode": "eval"},
        {"match": r"layer[12]|conv1\.0", "frozen": True},
        {"role": "bias", "lr_mult": 2},
        {"stage": "3..", "lr_mult": 0.5},
        {"match": ".*", "lr_mult": 1},
    ],
}
BARE = resolve_plan(PLAN, MODEL)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(sorted(INNER))), max_size=4),
    st.lists(st.sampled_from(sorted(OUTER)), max_size=3, unique=True),
    st.sampled_from([None, "fc", "layer2.0.conv1"]),
)
def test_a_wrapped_model_resolves_like_the_bare_one(
    inner: list[tuple[str, str]], outer: list[str], parametrized: str | None
) -> None:
    """Any nesting of wrappers, around parts and around the whole, and a weight held in two parts."""
    model = copy.deepcopy(MODEL)
    if parametrized:
        parametrizations.weight_norm(model.get_submodule(parametrized))
    for name, wrapper in dict(inner).items():
        above, _, last = name.rpartition(".")
        holder = dict(model.named_modules()).get(above)
        if holder is not None and last in holder._modules:
            holder._modules[last] = INNER[wrapper](holder._modules[last])
    wrapped: nn.Module = model
    for wrapper in outer:
        wrapped = OUTER[wrapper](wrapped)

    found = resolve_plan(PLAN, wrapped)

    said = [(row.name, row.frozen, row.lr_mult, row.mode, row.rule) for row in found.rows]
    expected = [(row.name, row.frozen, row.lr_mult, row.mode, row.rule) for row in BARE.rows]
    assert sorted(said) == sorted(expected)
    live = apply_plan(wrapped, PLAN, lr=0.1)
    assert sorted(name for group in live for name in set(group["param_names"])) == sorted(r.name for r in BARE.trained)
    live.undo()
