"""Plans that people write and do not mean: each gets an error or a hint that says what it really does.

What was meant stands in the first line of each file in ``plans/wrong``; what freezeplan says stands beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from freezeplan import resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model

WRONG = Path(__file__).parents[1] / "plans" / "wrong"
ON_VGG16 = {"container_type", "probe_of_vgg", "root_name"}
CASES = sorted(file.stem for file in WRONG.glob("*.yaml"))


def said(file: str, model: str) -> str:
    """The error that the plan gets on the model, or else what each rule came to and all hints."""
    try:
        resolution = resolve_plan(file, create_model(model, num_classes=10, meta=True))
    except PlanError as error:
        return f"error: {error}\n"
    uses = [f"rule {use.number} matched {use.matched}, decided {use.decided}\n" for use in resolution.uses]
    return "".join([*uses, *(f"hint: {hint}\n" for hint in resolution.hints)])


@pytest.mark.parametrize("name", CASES)
def test_a_plan_that_is_not_meant_is_answered(name, monkeypatch, golden):
    """No such plan passes in silence."""
    monkeypatch.chdir(WRONG)

    text = said(f"{name}.yaml", "vgg16" if name in ON_VGG16 else "vit_base_patch16_224")

    assert text.startswith("error: ") or "hint: " in text
    golden(WRONG / f"{name}.txt", text)


def test_every_text_has_its_plan():
    """No golden outlives its plan."""
    assert sorted(file.stem for file in WRONG.glob("*.txt")) == CASES
