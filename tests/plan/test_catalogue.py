"""Presets of other packages: found by entry point, only when they are needed, and never in the way of the rest."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from freezeplan import load_plan
from freezeplan.errors import FreezePlanWarning, PlanError
from freezeplan.plan.catalogue import added, shipped
from freezeplan.plan.load import load_presets

EXAMPLE = ("pyproject.toml", "probe.yaml")
PLAN = "version: 1\nname: probe\nrules:\n  - {role: head, lr_mult: 1}\n  - {match: .*, frozen: true}\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one package of plans: its files and what its entry point says."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, files, entry):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        info = tmp_path / f"{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[freezeplan.presets]\n{entry}\n", encoding="utf-8")
        return tmp_path

    return write


def test_another_packages_presets_are_found_by_name(install):
    """Its plans are NAMESPACE/name, also in folders below, beside those that ship."""
    install(
        "aa-plans", {"aaplans/__init__.py": "", "aaplans/probe.yaml": PLAN, "aaplans/b/c.yaml": PLAN}, "aa = aaplans"
    )

    assert list(added()) == ["aa/b/c", "aa/probe"]
    assert load_plan("aa/probe").name == "probe"
    assert list(load_presets()) == [*shipped(), "aa/b/c", "aa/probe"]


def test_the_example_of_the_documentation_is_found_under_the_name_that_it_says(install):
    """Its ``pyproject.toml`` and its plan, as a package that is installed; the schema is the one that is named."""
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    project, plan = (re.search(f'```\\w+ title="{name}"\n(.*?)```', page, re.DOTALL)[1] for name in EXAMPLE)
    data = tomllib.loads(project)
    ((name, package),) = data["project"]["entry-points"]["freezeplan.presets"].items()
    folder = package.replace(".", "/")
    files = {f"{folder.split('/')[0]}/__init__.py": "", f"{folder}/__init__.py": "", f"{folder}/{EXAMPLE[1]}": plan}
    install("mylab", files, f"{name} = {package}")

    assert data["tool"]["setuptools"]["package-data"] == {package: ["*.yaml"]}
    assert list(added()) == ["mylab/probe"]
    assert "`mylab/plans/probe.yaml` is the preset `mylab/probe`" in page
    assert load_plan("mylab/probe").rules[0].role == ("head", "norm")
    assert plan.splitlines()[0].endswith("$schema=plan.schema.json")
    assert "`freezeplan schema > plan.schema.json`" in page


def test_no_package_is_imported_for_a_preset_that_ships(install):
    """Entry points are looked at only where they are needed."""
    install("bb-plans", {"bbplans/__init__.py": "raise SystemError('imported')"}, "bb = bbplans")

    assert load_plan("linear_probe").name == "linear_probe"
    with pytest.warns(FreezePlanWarning, match="SystemError: imported"):
        added()


BROKEN = [
    pytest.param(
        {"ccplans/__init__.py": "import no_such_module"},
        "cc = ccplans",
        "presets 'cc' of cc-plans 2.0 are left out: ModuleNotFoundError: No module named 'no_such_module'",
        id="does-not-import",
    ),
    pytest.param(
        {"ddplans/__init__.py": ""},
        "dd = ddplans",
        "presets 'dd' of cc-plans 2.0 are left out: the package 'ddplans' holds no .yaml file",
        id="holds-no-plan",
    ),
    pytest.param(
        {"eeplans/__init__.py": "", "eeplans/same_lr.yaml": PLAN},
        "voc_vgg16 = eeplans",
        "presets 'voc_vgg16' of cc-plans 2.0 are left out: there is a preset called 'voc_vgg16/same_lr' already",
        id="name-taken",
    ),
]


@pytest.mark.parametrize(("files", "entry", "message"), BROKEN)
def test_a_broken_package_warns_and_stops_nothing(install, files, entry, message):
    """The warning names the entry point, its distribution and the reason; everything else is there."""
    install("cc-plans", files, entry)

    with pytest.warns(FreezePlanWarning) as warned:
        found = load_presets()
    assert [str(warning.message) for warning in warned] == [message]
    assert list(found) == list(shipped())


def test_a_broken_plan_of_a_package_is_named_by_its_file(install):
    """Asked for by name it is an error with file, line and column; in a list it is left out."""
    bad = PLAN.replace("lr_mult: 1", "lr_mul: 1")
    folder = install("ff-plans", {"ffplans/__init__.py": "", "ffplans/bad.yaml": bad}, "ff = ffplans")
    message = f"{folder / 'ffplans' / 'bad.yaml'}:4:18: unknown key 'lr_mul'\n  did you mean 'lr_mult', 'wd_mult'?"

    with pytest.raises(PlanError) as error:
        load_plan("ff/bad")
    assert str(error.value).startswith(message)
    with pytest.warns(FreezePlanWarning) as warned:
        assert "ff/bad" not in load_presets()
    assert str(warned[0].message).startswith(f"preset 'ff/bad' is left out: {message}")


def test_an_unknown_name_is_answered_with_the_nearest_of_a_package(install):
    """The nearest names are looked for among all presets."""
    install("gg-plans", {"ggplans/__init__.py": "", "ggplans/probe.yaml": PLAN}, "gg = ggplans")

    with pytest.raises(PlanError) as error:
        load_plan("gg/prob")
    assert str(error.value) == (
        "no preset is called 'gg/prob'\n  did you mean 'gg/probe'?\n  a plan file ends in one of .yaml .yml .toml .json"
    )


def test_the_command_warns_in_one_line(install):
    """freezeplan presets lists what there is and says on stderr what is broken."""
    folder = install("hh-plans", {"hhplans/__init__.py": "1/0"}, "hh = hhplans")
    done = subprocess.run(
        [sys.executable, "-m", "freezeplan", "presets"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}", "NO_COLOR": "1"},
    )

    assert done.stderr == "warning: presets 'hh' of hh-plans 2.0 are left out: ZeroDivisionError: division by zero\n"
    assert "linear_probe" in done.stdout
