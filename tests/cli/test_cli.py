"""The commands: results on stdout, problems on stderr, exit codes, width and colour; screens compared whole."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import freezeplan
from freezeplan.cache import store
from freezeplan.cli import completion, main
from freezeplan.plan.catalogue import shipped
from freezeplan.plan.load import load_plan
from freezeplan.report.rows import as_json

ROOT = Path(__file__).resolve().parents[2]

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["freezeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def without_trailing_spaces(text):
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


SCREENS = [
    pytest.param("show_linear_probe", ["linear_probe", "test_resnet", "--num-classes", "10"], id="linear_probe"),
    pytest.param("show_bitfit", ["bitfit", "test_vit", "--model-arg", "proj_drop_rate=0.1"], id="bitfit"),
    pytest.param(
        "show_low_conv_lr", ["voc_vgg16/low_conv_lr", "vgg16", "--num-classes", "20", "--lr", "5e-4"], id="low_conv_lr"
    ),
    pytest.param("show_frozen_convs", ["voc_vgg16/frozen_convs", "vgg16", "--num-classes", "20"], id="frozen_convs"),
]


@pytest.mark.parametrize(("name", "arguments"), SCREENS)
def test_show(run, golden, name, arguments):
    """``freezeplan show PLAN MODEL`` prints the tree of decisions, counts, groups, rules and what stays random."""
    code, out, err = run("show", *arguments)

    golden(GOLDEN / f"{name}.txt", without_trailing_spaces(out))
    assert (code, err) == (0, "")
    assert "\x1b" not in out


def test_show_on_a_narrow_terminal(run, monkeypatch):
    """On a terminal of 40 columns the tree is folded to its width and says the same as on a wide one."""

    def tree(columns):
        monkeypatch.setenv("COLUMNS", columns)
        out = run("show", "linear_probe", "test_resnet", "--num-classes", "10")[1]
        return out[: out.index("\n\ngroup")]

    narrow, wide = tree("40"), tree("200")

    assert max(map(len, narrow.splitlines())) == 40
    assert re.findall(r"[^\s│├└─]+", narrow) == re.findall(r"[^\s│├└─]+", wide)


def test_colour_follows_the_terminal(run, monkeypatch):
    """Colours are there for a terminal and not with NO_COLOR."""
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = run("show", "linear_probe", "test_resnet")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run("show", "linear_probe", "test_resnet")[1]

    assert "\x1b[36mfrozen" in coloured
    assert "\x1b[36m" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == re.sub(r"\x1b\[[\d;]*m", "", plain)


def test_show_as_json(run):
    """``show --json`` prints the resolution as data."""
    code, out, err = run("show", "linear_probe", "test_resnet", "--num-classes", "10", "--json")
    model = freezeplan.model.describer.create_model("test_resnet", num_classes=10, meta=True)

    assert (code, err) == (0, "")
    assert json.loads(out) == as_json(freezeplan.resolve_plan("linear_probe", model))


def test_show_as_json_with_a_base_rate(run):
    """``show --lr`` puts the rates into the data too."""
    out = run("show", "voc_vgg16/low_conv_lr", "vgg16", "--lr", "5e-4", "--json")[1]
    rates = {tensor["name"]: tensor["lr"] for tensor in json.loads(out)["tensors"]}

    assert (rates["features.0.weight"], rates["head.fc.weight"]) == (1e-4, 5e-4)


def test_check_a_plan(run):
    """``freezeplan check PLAN`` says that a plan is valid; ``--json`` its name and its number of rules."""
    assert run("check", "linear_probe") == (0, "linear_probe: a valid plan with 2 rules\n", "")
    code, out, err = run("check", "linear_probe", "--json")
    assert (code, json.loads(out), err) == (0, {"plan": "linear_probe", "rules": 2}, "")


def test_check_a_plan_against_a_model(run):
    """``freezeplan check PLAN MODEL`` says what each rule matched and decided."""
    assert run("check", "voc_vgg16/frozen_convs", "vgg16") == (
        0,
        "voc_vgg16/frozen_convs: fits vgg16\n"
        "\n"
        "rule 1 (role: head) matched 2, decided 2\n"
        "rule 2 (match: pre_logits) matched 4, decided 4\n"
        "rule 3 (match: .*) matched 32, decided 26; 4 were decided by rule 2, line 8; "
        "2 were decided by rule 1, line 7\n",
        "",
    )
    code, out, _ = run("check", "voc_vgg16/frozen_convs", "vgg16", "--json")
    assert code == 0
    assert list(json.loads(out)) == [
        "model",
        "parts",
        "plan",
        "frozen",
        "trainable",
        "groups",
        "rules",
        "phases",
        "hints",
        "unplaced",
        "random",
        "alive",
    ]


def test_presets(run, golden):
    """``freezeplan presets`` lists the plans that ship, ``--json`` whole."""
    code, out, err = run("presets")

    golden(GOLDEN / "presets.txt", without_trailing_spaces(out))
    assert (code, err) == (0, "")
    found = json.loads(run("presets", "--json")[1])
    assert {name: load_plan(plan) for name, plan in found.items()} == {n: load_plan(n) for n in shipped()}


PROBLEMS = [
    pytest.param(
        ["show", "linear_probe", "test_resnt"],
        "error: timm has no model called 'test_resnt'\n"
        "  did you mean 'test_resnet', 'test_nfnet', 'test_vit'?\n"
        "  timm knows {models} models; or give package.module:function\n",
        id="unknown-model",
    ),
    pytest.param(
        ["show", "linear_prob", "test_resnet"],
        "error: no preset is called 'linear_prob'\n"
        "  did you mean 'linear_probe'?\n"
        "  a plan file ends in one of .yaml .yml .toml .json\n",
        id="unknown-preset",
    ),
    pytest.param(["check", "nowhere/plan.yaml"], "error: nowhere/plan.yaml: no such file\n", id="no-file"),
    pytest.param(
        ["check", "plan.yaml", "vgg16"],
        "error: plan.yaml:3:13: rule 1 (match: layer1) matches no parameter of vgg16\n"
        "  top level of vgg16 (tensors): features (26), pre_logits (4), head (2)\n"
        "  a rule that need not match on every model says optional: true\n"
        "\n"
        "error: plan.yaml:3:3: 30 parameters get no rate: "
        "'features.0.weight', 'features.0.bias', 'features.2.weight', ...\n"
        "  end the rules with a catch-all such as {{match: .*, frozen: true}}, or give the plan a default\n",
        id="a-plan-for-another-architecture",
    ),
    pytest.param(
        ["show", "linear_probe", "test_resnet", "--num-classes", "0"],
        "error: linear_probe.yaml:8:12: role head is not known: the classifier of test_resnet has no parameters; "
        "create the model with num_classes greater than 0\n",
        id="no-classifier",
    ),
    pytest.param(
        ["show", "linear_probe", "test_resnet", "--model-arg", "foo=[1]"],
        "error: test_resnet cannot be built with foo=[1]: ResNet.__init__() got an unexpected keyword argument 'foo'\n",
        id="unknown-argument",
    ),
    pytest.param(
        ["show", "full", "torch.nn:Nothing"],
        "error: cannot import 'torch.nn:Nothing': module 'torch.nn' has no attribute 'Nothing'\n"
        "  expected package.module:function\n",
        id="unknown-function",
    ),
    pytest.param(
        ["show", "full", "os:getcwd"],
        "error: os:getcwd returned a str, expected a torch.nn.Module\n",
        id="no-module",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), PROBLEMS)
def test_a_problem_goes_to_stderr_with_exit_code_1(run, monkeypatch, tmp_path, arguments, message):
    """What was given has a problem: exit code 1, the sentence on stderr, nothing on stdout, no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(
        "version: 1\nrules:\n  - {match: layer1, frozen: true}\n  - {role: head, lr_mult: 1}\n"
    )
    import timm

    assert run(*arguments) == (1, "", message.format(models=len(timm.list_models())))


def test_a_problem_is_not_cut_to_the_width_of_a_terminal(run, monkeypatch):
    """An error is one line however narrow the terminal, so that file:line:column can be clicked or searched."""
    monkeypatch.setenv("COLUMNS", "20")

    assert run("check", "nowhere/a_plan_with_a_long_name.yaml")[2] == (
        "error: nowhere/a_plan_with_a_long_name.yaml: no such file\n"
    )


WRITTEN = [
    pytest.param(["schema"], id="echoed"),
    pytest.param(["presets"], id="by-rich"),
    pytest.param(["--version"], id="short"),
    pytest.param(["cache", "ls", "--json"], id="below-another"),
    pytest.param(["--help"], id="by-typer"),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", WRITTEN)
def test_a_full_disk_is_one_sentence(arguments, unbuffered):
    """Whoever writes, and whether it fails at once or at the end."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "freezeplan", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "COLUMNS": "80", "NO_COLOR": "1"},
        )  # fmt: skip

    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_an_error_of_the_system_that_is_not_the_output_s_stays_one(run, monkeypatch):
    """A mistake of ours is not hidden behind a sentence about a disk."""
    mistake = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("freezeplan.cli.plans.load_plan", Mock(side_effect=mistake))
    with pytest.raises(OSError, match="No space left") as error:
        run("check", "full")

    assert error.value is mistake


STOPPED = [
    pytest.param(
        ["compare", "full", "--data", "d", "--model", "m"],
        "freezeplan.training.compare_command.compare_plans",
        "stopped; the same command with --resume --out DIR goes on",
        id="compare",
    ),
    pytest.param(
        ["suggest", "--data", "d", "--model", "m", "--out=r1"],
        "freezeplan.training.suggest_command.suggest_plan",
        "stopped; the same command with --resume goes on",
        id="suggest",
    ),
    pytest.param(
        ["run", "voc_vgg16", "--out", "r1", "--resume"],
        "freezeplan.voc_vgg16.command.voc_vgg16",
        "stopped; the same command goes on",
        id="run",
    ),
    pytest.param(["check", "full"], "freezeplan.cli.plans.load_plan", "stopped", id="nothing-to-go-on-with"),
    pytest.param(["cache", "ls"], "freezeplan.cache.store.entries", "stopped", id="below-another"),
]


@pytest.mark.parametrize(("arguments", "inside", "said"), STOPPED)
def test_ctrl_c_says_how_to_go_on(run, monkeypatch, arguments, inside, said):
    """One line on stderr; the exit code is the one that shells know."""
    monkeypatch.setattr(inside, Mock(side_effect=KeyboardInterrupt))

    assert run(*arguments) == (130, "", f"{said}\n")


USAGE = [
    pytest.param(["show", "linear_probe"], "Missing argument 'MODEL'.", id="no-model"),
    pytest.param(["frobnicate"], "No such command 'frobnicate'.", id="unknown-command"),
    pytest.param(["show", "full", "test_vit", "--bogus"], "No such option: --bogus", id="unknown-option"),
    pytest.param(
        ["show", "full", "test_vit", "--model-arg", "foo"],
        "Invalid value for --model-arg: expected KEY=VALUE, found 'foo'",
        id="no-equals-sign",
    ),
    pytest.param(
        ["run", "voc_vgg17"],
        "Invalid value for 'EXPERIMENT': 'voc_vgg17' is not one of 'voc_vgg16'; did you mean 'voc_vgg16'?",
        id="no-experiment",
    ),
    pytest.param(
        ["run", "voc_vgg16", "--device", "rocm"],
        "Invalid value for '--device': 'rocm' is not one of 'auto', 'cpu', 'cuda'",
        id="no-choice",
    ),
    pytest.param(
        ["check", "full", "test_vit", "--model-arg", "1a=2"],
        "Invalid value for --model-arg: expected KEY=VALUE, found '1a=2'",
        id="no-name",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), USAGE)
def test_wrong_usage_is_exit_code_2(run, arguments, sentence):
    """The command line itself is wrong: exit code 2 and one sentence on stderr."""
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    assert " ".join(re.findall(r"^│ (.*?) +│$", err, re.MULTILINE)) == sentence


def test_model_arguments_are_literals_or_text(run):
    """KEY=VALUE takes numbers, lists and text, and reaches the model."""
    code, out, _ = run(
        "show", "full", "test_vit", "--model-arg", "img_size=32", "--model-arg", "pos_embed=none", "--json"
    )
    names = [tensor["name"] for tensor in json.loads(out)["tensors"]]

    assert code == 0
    assert "pos_embed" not in names


def test_a_function_of_ones_own_is_a_model(run):
    """A MODEL is also ``package.module:function``."""
    arguments = ["torch.nn:Linear", "--model-arg", "in_features=2", "--model-arg", "out_features=3"]
    code, out, err = run("show", "full", *arguments)

    assert (code, err) == (0, "")
    assert "Linear  lr x 1, rule 1  9 in 2 tensors" in out.splitlines()


def test_version(run):
    """``freezeplan --version`` prints the version."""
    assert run("--version") == (0, f"{freezeplan.__version__}\n", "")


def test_checking_a_file_needs_no_torch():
    """``python -m freezeplan check PLAN`` answers without importing torch or timm."""
    code = (
        "import sys; sys.argv = ['freezeplan', 'check', 'linear_probe']\n"
        "from freezeplan.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'timm'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (found.returncode, found.stdout, found.stderr) == (
        0,
        "linear_probe: a valid plan with 2 rules\n[]\n",
        "",
    )


@pytest.fixture
def press_tab(monkeypatch, capsys):
    """Complete a line, in this process, as the shell's script asks for it; returns the words that are offered."""

    def press_tab(shell, line):
        monkeypatch.setenv("_FREEZEPLAN_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(f"{line}.".split()) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setattr(sys, "argv", ["freezeplan"])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()

        assert (stop.value.code or 0, err) == (0, "")
        if shell == "zsh":
            assert out == "_files\n" or out.startswith("_arguments '*: :((")
            return re.findall(r'^(?:_arguments .*\(\()?"(.*?)"', out, re.MULTILINE)
        return out.split()

    return press_tab


SHIPPED_ARMS = [f"freezeplan/presets/voc_vgg16/{arm}.yaml" for arm in completion.arms("")]
COMPLETED = [
    pytest.param("freezeplan show linear", ["linear_probe"], id="preset"),
    pytest.param("freezeplan check voc_vgg16/s", ["voc_vgg16/same_lr", "voc_vgg16/scratch"], id="presets"),
    pytest.param("freezeplan why examples/low", ["examples/low_conv_lr.yaml"], id="file"),
    pytest.param("freezeplan diff linear_probe examples/low", ["examples/low_conv_lr.yaml"], id="other"),
    pytest.param("freezeplan show linear_probe vgg16_b", ["vgg16_bn"], id="model"),
    pytest.param("freezeplan diff full lp_ft --model vgg16_b", ["vgg16_bn"], id="model-option"),
    pytest.param("freezeplan forecast full vgg16_b", ["vgg16_bn"], id="model-of-a-forecast"),
    pytest.param("freezeplan verify a b --plan linear", ["linear_probe"], id="verify-plan"),
    pytest.param("freezeplan verify a b --model vgg16_b", ["vgg16_bn"], id="verify-model"),
    pytest.param("freezeplan run voc_vgg16 --model vgg16_b", ["vgg16_bn"], id="run-model"),
    pytest.param("freezeplan run voc_vgg16 --plan linear", ["linear_probe"], id="run-plan"),
    pytest.param("freezeplan run voc_vgg16 --arm s", ["same_lr", "scratch"], id="arms"),
    pytest.param("freezeplan why full test_resnet fc", ["fc.weight", "fc.bias"], id="parameters"),
    pytest.param(
        "freezeplan why full torch.nn:Linear --model-arg in_features=1 --model-arg out_features=1 ",
        ["weight", "bias"],
        id="parameters-of-ones-own",
    ),
    pytest.param("freezeplan cache rm 12", ["12ab", "12cd"], id="keys"),
    pytest.param("freezeplan cache rm --dir nowhere 12", ["12ef"], id="keys-elsewhere"),
    pytest.param("freezeplan run voc_vgg16 --optimizer rms", ["rmsprop-tf1", "rmsprop"], id="choice"),
    pytest.param("freezeplan import t", ["timm"], id="choices-of-an-argument"),
    pytest.param("freezeplan why full no_such_model f", [], id="no-such-model"),
    pytest.param("freezeplan why full test_resnet --model-arg depth=x f", [], id="wrong-argument"),
    pytest.param("freezeplan why full test_resnet --model-arg = fc", ["fc.weight", "fc.bias"], id="no-argument"),
    pytest.param("freezeplan check missing/", [], id="no-such-folder"),
    pytest.param("freezeplan check docs/trai", ["docs/trainers/"], id="folder"),
    pytest.param("freezeplan check freezeplan/presets/voc_vgg16/", SHIPPED_ARMS, id="in-a-folder"),
]


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zsh", "fish"))])
@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_a_shell_completes_names(press_tab, monkeypatch, tmp_path, shell, line, expected):
    """Plans, files, models, arms, parameters and keys; nothing, and no error, where there is nothing to be had."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("freezeplan/12ab", "freezeplan/12cd", "freezeplan/34", "elsewhere/12ef"):
        store.begin(tmp_path / name, {"model": "m", "plan": "p", "dtype": "float32", "memoised": []})

    offered = press_tab(shell, line.replace("nowhere", str(tmp_path / "elsewhere")))

    assert sorted(offered) == sorted(expected)


def test_names_of_models_are_listed_once_for_a_version_of_timm(monkeypatch, tmp_path):
    """They are in the user's cache folder from then on, whole, and the next time neither timm nor torch is imported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = completion.models("")
    code = (
        "import sys; sys.argv = ['freezeplan']\n"
        "from freezeplan.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'timm'} & set(sys.modules)))\n"
    )
    words = "freezeplan show linear_probe test_"
    env = {"_FREEZEPLAN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )

    assert [path.name for path in (tmp_path / "freezeplan").iterdir()] == [
        f"models-of-timm-{freezeplan.model.describer.version()}.txt"
    ]
    assert listed == freezeplan.model.describer.model_names()
    *names, modules = found.stdout.splitlines()
    assert names == [name for name in listed if name.startswith("test_")]
    assert (modules, found.stderr) == ("[]", "")


def test_names_of_models_are_found_where_nothing_can_be_written(monkeypatch, tmp_path):
    """A file stands where the cache folder would be."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    assert completion.models("vgg16_b") == ["vgg16_bn"]
