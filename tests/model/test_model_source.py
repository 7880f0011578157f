"""MODEL on the command line: a function of one's own, found beside the script, and every way in which it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from freezeplan.errors import FreezePlanWarning, ModelError
from freezeplan.model.source import load_model

ROOT = Path(__file__).resolve().parents[2]

BUILDERS = """\
import torch
from torch import nn


def build(features=2, **others):
    return nn.Linear(features, len(others) + 1)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 1)

    @classmethod
    def build(cls):
        return cls(3)


def drop_path():
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
    return nn.Sequential(*(nn.Dropout(rate) for rate in rates), nn.Linear(2, 2))


def to_numpy():
    return nn.Linear(int(torch.ones(2).numpy().sum()), 2)


def late():
    import beside_it

    return nn.Linear(beside_it.WIDTH, 1)


def broken():
    return {}["missing"]


def both():
    torch.ones(1).item()
    raise KeyError("weights")


nothing = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A script's own folder, which no path knows of."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    Path("own_builders.py").write_text(BUILDERS, encoding="utf-8")
    Path("beside_it.py").write_text("WIDTH = 5\n", encoding="utf-8")
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


FOUND = [
    pytest.param("own_builders:build", {}, (1, 2), id="function"),
    pytest.param("own_builders:Net.build", {}, (1, 3), id="method-of-a-class"),
    pytest.param("own_builders:Net", {"width": 4}, (1, 4), id="class"),
    pytest.param("own_builders:late", {}, (1, 5), id="imports-when-called"),
    pytest.param("own_builders:build", {"name": "x", "meta": 1, "arguments": 2}, (4, 2), id="any-argument-name"),
]


@pytest.mark.parametrize(("name", "arguments", "shape"), FOUND)
def test_a_module_of_the_working_directory_is_found(folder, name, arguments, shape):
    """As ``python script.py`` finds what lies beside the script; afterwards the path is as it was."""
    before = list(sys.path)
    model = load_model(name, arguments, meta=True)

    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [shape]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sys.path == before


@pytest.mark.slow
def test_the_command_finds_it_too(folder):
    """The installed command, whose own path begins in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "80"}
    code = "import sys; del sys.path[0]; from freezeplan.cli import main; main()"  # as a console script: no ''
    found = subprocess.run(
        [sys.executable, "-c", code, "show", "full", "own_builders:Net.build"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip

    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("full on Net\n")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_builders:drop_path", "Tensor.item() cannot be called on meta tensors"),
        ("own_builders:to_numpy", "can't convert meta device type tensor to numpy. Use Tensor.cpu() to copy the tensor"
         " to host memory first."),
    ],
)  # fmt: skip
def test_a_function_that_reads_values_is_run_on_the_cpu(folder, name, reason):
    """The meta device has no values; the model is there all the same, and the warning says what it cost."""
    message = (
        f"{name} reads the values of tensors, which the meta device does not have ({reason}); "
        "it was built on the CPU, with all its memory"
    )
    with pytest.warns(FreezePlanWarning) as warned:
        model = load_model(name, meta=True)

    assert [str(warning.message) for warning in warned] == [message]
    assert {p.device.type for p in model.parameters()} == {"cpu"}


REFUSED = [
    pytest.param(
        "no_such_module:build",
        {},
        "cannot import 'no_such_module:build': No module named 'no_such_module'\n  expected package.module:function",
        id="no-module",
    ),
    pytest.param(
        "own_builders.py:build",
        {},
        "cannot import 'own_builders.py:build': No module named 'own_builders.py'; 'own_builders' is not a package\n"
        "  a module is named without .py: own_builders:build",
        id="file-name",
    ),
    pytest.param(
        "own_builders:Net.make",
        {},
        "cannot import 'own_builders:Net.make': type object 'Net' has no attribute 'make'\n"
        "  expected package.module:function",
        id="no-method",
    ),
    pytest.param(
        "own_builders:nothing",
        {},
        "own_builders:nothing is of type int, expected a function that returns a torch.nn.Module",
        id="no-function",
    ),
    pytest.param(
        "own_builders:broken",
        {},
        "own_builders:broken cannot be built with no arguments: KeyError: 'missing'\n  raised at own_builders.py:35",
        id="raises",
    ),
    pytest.param(
        "own_builders:both",
        {},
        "own_builders:both cannot be built with no arguments: KeyError: 'weights'\n  raised at own_builders.py:40",
        id="reads-values-and-raises-on-the-cpu",
    ),
    pytest.param(
        "own_builders:Net",
        {"depth": 3},
        "own_builders:Net cannot be built with depth=3: "
        "TypeError: Net.__init__() got an unexpected keyword argument 'depth'",
        id="wrong-argument",
    ),
    pytest.param(
        "test_vit",
        {"name": "x"},
        "test_vit cannot be built with name='x': "
        "VisionTransformer.__init__() got an unexpected keyword argument 'name'",
        id="timm-name",
    ),
    pytest.param(
        "test_vit",
        {"meta": 1},
        "test_vit cannot be built with meta=1: VisionTransformer.__init__() got an unexpected keyword argument 'meta'",
        id="timm-meta",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_what_cannot_be_built_is_one_error(folder, name, arguments, message):
    with pytest.raises(ModelError) as error:
        load_model(name, arguments, meta=True)

    assert str(error.value) == message


RAISING = [
    pytest.param(
        "x = 1\nraise ValueError('no data\\nat all')\n", "ValueError: no data\n  raised at raising.py:2", id="raises"
    ),
    pytest.param("import sys\n\nsys.exit(3)\n", "SystemExit: 3\n  raised at raising.py:3", id="exits"),
    pytest.param("x = (\n", "SyntaxError: '(' was never closed (raising.py, line 1)\n  at raising.py:1", id="syntax"),
    pytest.param(
        "import no_such_package_at_all\n",
        "ModuleNotFoundError: No module named 'no_such_package_at_all'\n  raised at raising.py:1",
        id="lacks-a-package",
    ),
]


@pytest.mark.parametrize(("text", "message"), RAISING)
def test_a_module_that_raises_while_it_is_imported(folder, text, message):
    """No traceback of this package: what was raised, and on which line of one's own."""
    Path("raising.py").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as error:
        load_model("raising:build", meta=True)

    assert str(error.value) == f"cannot import 'raising:build': {message}"


def test_the_number_of_classes_is_given_once():
    with pytest.raises(ModelError) as error:
        load_model("test_vit", {"num_classes": 3}, num_classes=4)

    assert str(error.value) == "num_classes is given twice: as an option and among the model's arguments"
    assert load_model("test_vit", {"num_classes": 3}, meta=True).num_classes == 3


def test_without_meta_it_is_built_where_it_is_used(folder):
    model = load_model("own_builders:drop_path")

    assert isinstance(model, nn.Sequential)
    assert torch.isfinite(model[-1].weight).all()
