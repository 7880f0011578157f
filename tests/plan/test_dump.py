"""What is dumped is what is read, whatever stands in it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from freezeplan import Plan, load_plan
from freezeplan.plan.catalogue import shipped
from freezeplan.plan.dump import dump

PRINTABLE = st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" ")
LINES = st.text(PRINTABLE | st.just("\n"), max_size=12)
PATTERN = st.sampled_from(
    [".*", r"a\.b", "it's", "x: y", "[ab]{1,2}", "# no", "- no", "true", "1e3", "Größe", "\U0001f600"]
)
RULE = st.fixed_dictionaries(
    {"match": st.lists(PATTERN, min_size=1, max_size=3)},
    optional={"wd_mult": st.floats(0, 1e9), "mode": st.sampled_from(["eval", "train"]), "optional": st.booleans()},
).flatmap(lambda rule: st.floats(1e-9, 1e9).map(lambda rate: {**rule, "lr_mult": rate}))
UNTIL = st.one_of(st.integers(1, 99), st.just("25%"), st.just({"metric": "loss: val", "patience": 2}))
PHASES = st.lists(st.fixed_dictionaries({"until": UNTIL, "rules": st.lists(RULE, max_size=2)}), max_size=1).map(
    lambda found: [
        *({"name": f"p{n}: x", **phase} for n, phase in enumerate(found)),
        *([{"name": "last"}] if found else []),
    ]
)


def again(text: str) -> Plan:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.yaml"
        file.write_text(text, encoding="utf-8", newline="")
        return load_plan(file)


@given(
    name=st.text(PRINTABLE, max_size=12),
    description=LINES,
    rules=st.lists(RULE, min_size=1, max_size=3),
    phases=PHASES,
    decay=st.none() | st.floats(0.01, 1),
    comment=st.sampled_from(["", "two\nlines"]),
)
def test_a_dumped_plan_is_read_as_the_same_plan(name, description, rules, phases, decay, comment):
    """Names, texts and patterns with every character that YAML minds; rates to the last digit."""
    plan = Plan(version=1, name=name, description=description, rules=rules, phases=phases, layer_decay=decay)

    assert again(dump(plan, comments=[comment])) == plan


def test_every_preset_survives():
    """Those with phases, stages and roles among them."""
    for name in shipped():
        assert again(dump(load_plan(name))) == load_plan(name)
