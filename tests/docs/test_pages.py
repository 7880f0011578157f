"""The computed pages and pictures of the documentation are those that their command writes, and leave nothing out."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from freezeplan import load_plan, resolve_plan
from freezeplan.model.describer import create_model
from freezeplan.plan import schema

DOCS = Path(__file__).parents[2] / "docs"
BAD = Path(__file__).parents[1] / "plans" / "bad"
SLOW = ("presets.md", "zoo.md", "errors.md")


def load():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PAGES.PAGES]
)
def test_a_computed_page_is_up_to_date(name):
    """``python docs/pages.py`` would change nothing."""
    assert PAGES.PAGES[name]() == (DOCS / name).read_text(encoding="utf-8")


def looks(file):
    """The words of a picture and its colours, whatever version of matplotlib drew it."""
    parts = list(ElementTree.parse(file).iter())
    fills = {fill for part in parts for fill in re.findall(r"fill: (#\w+)", part.get("style", ""))}
    return [part.text for part in parts if part.tag.endswith("}text")], fills


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "low_conv_lr" else pytest.mark.slow) for name in PAGES.PICTURES]
)
def test_a_picture_is_up_to_date(name, tmp_path):
    PAGES.draw(name, tmp_path / "again.svg")

    assert looks(DOCS / "pictures" / f"{name}.svg") == looks(tmp_path / "again.svg")


def test_no_picture_is_left_over():
    """Each is drawn by the command, and shown somewhere."""
    shown = "".join(page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"])

    assert {file.stem for file in (DOCS / "pictures").iterdir()} == {*PAGES.PICTURES, "architecture"}
    assert all(f"pictures/{name}.svg)" in shown for name in PAGES.PICTURES)


def test_every_key_of_a_plan_has_a_row_and_stands_in_an_example():
    """A new field of a model is in the reference, with what it means."""
    page = (DOCS / "plan.md").read_text(encoding="utf-8")
    models = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema._Data)]
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))

    assert set(PAGES.ABOUT) == set(models) - {schema._Data}
    for model, (title, _) in PAGES.ABOUT.items():
        rows, example = sections[title].split("```yaml")
        for field in model.model_fields:
            assert re.search(rf"^\| `{field}` \| .+ \| .+ \|$", rows, flags=re.MULTILINE), field
            assert re.search(rf"\b{field}:", example), field


@pytest.mark.parametrize("model", PAGES.EXAMPLES, ids=lambda model: model.__name__)
def test_an_example_of_the_reference_fits_a_model(model, tmp_path):
    """Each of its rules decides something."""
    (tmp_path / "plan.yaml").write_text(PAGES.EXAMPLES[model])

    assert resolve_plan(load_plan(tmp_path / "plan.yaml"), create_model("resnet18", num_classes=3, meta=True)).rows


def test_every_class_of_error_is_in_the_catalogue():
    """Of the module's source, with what to do."""
    source = (DOCS.parent / "freezeplan" / "errors.py").read_text(encoding="utf-8")
    named = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name != "Problem"]
    page = (DOCS / "errors.md").read_text(encoding="utf-8")

    assert [name for name, _ in re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", page, flags=re.MULTILINE)] == named


def test_every_bad_plan_has_its_cause():
    """One and only one; so a new golden comes into the catalogue."""
    causes = [name for names in PAGES.CAUSES.values() for name in names]

    assert sorted(causes) == sorted({file.stem for file in BAD.iterdir() if file.suffix != ".txt"})
