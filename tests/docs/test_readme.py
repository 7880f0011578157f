"""The README's order and what it must hold; that its blocks do what they say is in test_blocks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from freezeplan import load_plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PEERS = ["timm", "finetuning-scheduler", "mmengine", "big_vision", "PEFT", "by hand"]


SECTIONS = ["My code", "A typo is an error", "Does it work", "Why not by hand", "What it saves", "Where to read on"]


def test_the_first_screen_says_what_it_is_and_shows_a_plan() -> None:
    """A sentence, a measured one, the picture, then a plan and the call."""
    lines = README.splitlines()

    assert lines[2].startswith("Declarative layer freezing for [timm]")
    assert re.search(r"\d ", lines[3])
    assert re.fullmatch(r"!\[.+\]\(docs/pictures/low_conv_lr.svg\)", lines[5])
    assert "contains timm models" in lines[7]
    assert README.index("```yaml") < README.index("apply_plan(") < README.index("freezeplan check typo.yaml")


def test_the_readme_answers_in_the_order_in_which_a_reader_asks() -> None:
    """Six sections, the command that shows that it works in one of them; at most 110 lines and 900 words."""
    sections = re.findall(r"^## (.*)$", README, flags=re.MULTILINE)
    (works,) = re.findall(r"^## Does it work\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)

    assert sections == SECTIONS
    assert "\n$ pip install '.[run]' && freezeplan run voc_vgg16\n" in works
    assert len(README.splitlines()) <= 110
    assert len(README.split()) <= 900


def test_every_figure_of_what_it_saves_is_in_the_benchmarks() -> None:
    """The page of benchmarks holds what the command of that section printed."""
    (saves,) = re.findall(r"^## What it saves\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\$ (python benchmarks/.*)$", saves, flags=re.MULTILINE)
    (printed,) = re.findall(rf"^\$ {re.escape(command)}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    figures = re.findall(r"\d+\.\d+(?= %| times)", saves)

    assert figures
    assert [figure for figure in figures if figure not in re.findall(r"\d+\.\d+", printed)] == []


def test_the_example_plan_is_the_one_in_the_readme(tmp_path: Path) -> None:
    """examples/low_conv_lr.yaml says what the README's plan says."""
    (plan,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "plan.yaml").write_text(plan)

    assert load_plan(tmp_path / "plan.yaml") == load_plan(ROOT / "examples/low_conv_lr.yaml")


def test_the_readme_compares_and_says_what_is_stable() -> None:
    """Every peer has a column here and in the longer table, whose rows agree in their number of cells."""
    for text in (README, (ROOT / "docs/comparison.md").read_text(encoding="utf-8")):
        table = next(table for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE) if "PEFT" in table)
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]

        assert [cell for cell in rows[0] if cell in PEERS] == PEERS
        assert len({len(row) for row in rows}) == 1
        assert all(cell for row in rows[1:] for cell in row)
    assert "A plan with `version: 1` is readable through all of 1.x and means the same" in README
    assert "`--install-completion` |" in (ROOT / "docs/commands.md").read_text(encoding="utf-8")


def test_the_tests_command_is_the_one_that_ci_runs() -> None:
    """The README's, word for word."""
    command = "pip install -e '.[dev]' && pytest -n 2 --dist worksteal"

    assert f"$ {command}\n" in README
    assert f"({command})\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_a_source_distribution_has_what_its_tests_read() -> None:
    """Whatever the tests name at the top level, and what the site and a citation need."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = {*settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"], "pyproject.toml"}
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    named = {name for name in re.findall(r'ROOT / "([^"/]+)', tests) if (ROOT / name).exists()}

    assert {"docs", "examples", "README.md", ".ci"} <= named
    assert named | {"mkdocs.yml", "CITATION.cff"} <= included
    assert all((ROOT / name).exists() for name in included)
