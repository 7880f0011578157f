"""``freezeplan verify`` and ``freezeplan delta``: what they print, and their exit codes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from freezeplan import applied, apply_plan
from freezeplan.cli import main
from freezeplan.errors import WeightsError
from freezeplan.model.describer import create_model
from freezeplan.proof.weights_file import read_state

MODEL = ("--model", "test_resnet", "--num-classes", "3")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["freezeplan", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("test_resnet", num_classes=3)


@pytest.fixture
def before(model, tmp_path):
    path = tmp_path / "before.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def after(tmp_path):
    return tmp_path / "after.safetensors"


def compare(run, before, after, *more):
    return run("verify", before, after, "--plan", "linear_probe", *MODEL, *more)


def test_a_freeze_that_held_between_two_files(run, model, before, after):
    """The head may move; exit code 0, one line."""
    torch.nn.init.ones_(model.fc.weight)
    save_file(model.state_dict(), after)

    assert compare(run, before, after) == (0, "held: 90 frozen tensors and buffers are bit-identical\n", "")


def live_statistics(model):
    model.layer1.train()
    for _ in range(2):
        model.layer1(torch.randn(2, 32, 4, 4))


def shrink(model):
    model.conv1[0].weight.data.mul_(0.99)


def round_trip(model):
    model.conv1[0].bfloat16().float()


def drift(model):
    model.conv1[0].weight.data.mul_(1 + 1e-6)


def overwrite(model):
    torch.nn.init.kaiming_normal_(model.conv1[0].weight)


def train(model):
    weight = model.conv1[0].weight
    weight.data.add_(0.05 * torch.randn_like(weight))


def reset_statistics(model):
    model.layer1[0].bn1.running_mean.fill_(3)


def cast(model):
    model.conv1[0].weight.data = model.conv1[0].weight.data.half()


CHANGES = [
    pytest.param(shrink, "weight decay on a zero gradient: all its values shrank by one factor", id="decay"),
    pytest.param(round_trip, "its values were rounded to half precision and back", id="rounded"),
    pytest.param(drift, "it moved by rounding only: an average of weights (EMA) was put in its place", id="average"),
    pytest.param(overwrite, "it has other values altogether: a loader or an initialisation overwrote it", id="loader"),
    pytest.param(train, "other code wrote it: an optimizer that holds it", id="optimizer"),
    pytest.param(cast, "it went from float32 (16, 3, 3, 3) to float16 (16, 3, 3, 3)", id="cast"),
]


@pytest.mark.parametrize(("change", "cause"), CHANGES)
def test_a_weight_that_moved_between_two_files(run, model, before, after, change, cause):
    """Exit code 1, the tensor, by how much, and what the change looks like."""
    change(model)
    save_file(model.state_dict(), after)
    code, out, err = compare(run, before, after)
    first, line = out.splitlines()

    assert (code, err, first) == (1, "", "1 of 90 frozen tensors and buffers moved")
    assert line.startswith("conv1.0.weight: moved by up to ")
    assert cause in line


def test_statistics_that_moved_between_two_files(run, model, before, after):
    """Live statistics are told from a buffer that was written, by the counter of batches beside it."""
    live_statistics(model)
    save_file(model.state_dict(), after)
    live = compare(run, before, after)[1].splitlines()
    model.load_state_dict(load_file(before))
    reset_statistics(model)
    save_file(model.state_dict(), after)
    written = compare(run, before, after)[1].splitlines()

    assert len(live) == 7
    assert all(line.endswith("; live BatchNorm statistics: its module ran in train for 2 batches") for line in live[1:])
    assert written[1:] == [
        "layer1.0.bn1.running_mean: moved by up to 3; "
        "a buffer was written by other code: a loader, an average of weights, or a reset of statistics"
    ]


def test_the_comparison_as_json(run, model, before, after):
    """All of it as data, with the relative change."""
    model.conv1[0].weight.data.mul_(0.5)
    save_file(model.state_dict(), after)
    code, out, _ = compare(run, before, after, "--json")
    found = json.loads(out)

    assert (code, found["held"], found["checked"]) == (1, False, 90)
    assert [sorted(moved) for moved in found["moved"]] == [["cause", "max_abs", "name", "relative"]]
    assert found["moved"][0]["relative"] == 0.5


def test_what_is_no_number_is_null_in_json(run, model, before, after, probe):
    """A weight of NaN moved by no number: JSON that every reader takes, and exit code 1."""
    model.conv1[0].weight.data.fill_(float("nan"))
    save_file(model.state_dict(), after)
    code, out, _ = compare(run, before, after, "--json")
    strict = json.loads(out, parse_constant=pytest.fail)

    assert (code, strict["moved"][0]["name"], strict["moved"][0]["max_abs"]) == (1, "conv1.0.weight", None)
    applied(model).undo()
    model.load_state_dict(load_file(before))
    model.fc.weight.data.fill_(float("inf"))
    apply_plan(model, "linear_probe").save_delta(after)
    code, out, _ = run("delta", "diff", probe, after, "--json")
    changes = json.loads(out, parse_constant=pytest.fail)
    assert (code, [change["name"] for change in changes]) == (1, ["fc.weight"])
    assert changes[0]["max_abs"] is None


def test_a_plan_that_freezes_nothing_proves_nothing(run, before):
    """Exit code 2: a wrong name of a preset must not look like a freeze that held."""
    code, out, err = run("verify", before, before, "--plan", "full", *MODEL)

    assert (code, out) == (2, "")
    assert err == (
        "error: plan 'full' freezes nothing of test_resnet\n"
        "  freezeplan show full test_resnet says what it does; give the plan that was trained with\n"
    )


def test_a_plan_that_freezes_nothing_throughout(run, before, tmp_path):
    """What one phase trains is not frozen: a plan that thaws everything in the end proves nothing either."""
    plan = tmp_path / "thaw.json"
    phases = [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "all"}]
    plan.write_text(
        json.dumps({"version": 1, "name": "thaw", "phases": phases, "rules": [{"match": ".*", "lr_mult": 1}]})
    )
    code, _, err = run("verify", before, before, "--plan", plan, *MODEL)

    assert code == 2
    assert err.startswith("error: plan 'thaw' freezes nothing of test_resnet in all its phases\n")


def test_an_error_prints_nothing_that_a_terminal_obeys(run, before, tmp_path):
    """Names of strangers are quoted in errors; only ends of lines stay what they are."""
    torch.save({"a\x1b[2J": torch.zeros(1)}, tmp_path / "a.pt")
    (tmp_path / "b\x1b[2J.pt").write_bytes(b"")
    errors = [compare(run, before, tmp_path / name)[2] for name in ("a.pt", "b\x1b[2J.pt")]

    assert f"error: {tmp_path}/b\\x1b[2J.pt: cannot be read as a checkpoint\n" in errors[1]
    assert all(line.isprintable() for error in errors for line in error.split("\n"))


def checkpoint(key):
    def write(state, path):
        torch.save({"epoch": 3, key: state} if key else dict(state), path)

    return write


@pytest.mark.parametrize("key", ["", "state_dict", "model", "model_state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", pytest.param("module.", marks=pytest.mark.slow), "_orig_mod.module."])
def test_checkpoints_and_wrapped_names_are_read(run, model, before, tmp_path, key, prefix):
    """A checkpoint may hold the tensors itself or under a usual key, with the names of wrappers."""
    path = tmp_path / "after.pt"
    checkpoint(key)({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, path)

    assert compare(run, before, path)[0] == 0


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def without(name):
    def write(model, path):
        save_file({key: tensor for key, tensor in model.state_dict().items() if key != name}, path)

    return write


def prefixed(model, path):
    save_file({f"net.{key}": tensor for key, tensor in model.state_dict().items()}, path)


def nothing(model, path):
    torch.save({"epoch": 3}, path)


UNREADABLE = [
    pytest.param(lambda model, path: None, "no such file", id="missing"),
    pytest.param(lambda model, path: path.write_bytes(b"no"), "cannot be read as safetensors (", id="damaged"),
    pytest.param(
        without("layer1.0.bn1.running_var"),
        "lacks 1 of 90 frozen tensors and buffers, such as 'layer1.0.bn1.running_var'\n  did you mean '",
        id="a-tensor-missing",
    ),
    pytest.param(
        prefixed,
        "lacks 90 of 90 frozen tensors and buffers, such as 'conv1.0.weight'\n  ",
        id="names-of-another-wrapper",
    ),
]


@pytest.mark.parametrize(("write", "said"), UNREADABLE)
def test_what_cannot_be_compared(run, model, before, after, write, said):
    """Exit code 2, and what is wrong with which file."""
    write(model, after)
    code, out, err = compare(run, before, after)

    assert (code, out) == (2, "")
    assert err.startswith(f"error: {after}: {said}")


def test_files_of_another_model(run, before):
    """The model that was named does not have these shapes: not comparable."""
    code, _, err = run(
        "verify", before, before, "--plan", "linear_probe", "--model", "test_resnet", "--model-arg", "in_chans=1"
    )

    assert code == 2
    assert err == (f"error: {before}: has 'conv1.0.weight' in shape [(16, 3, 3, 3)], the model in [(16, 1, 3, 3)]\n")


def test_a_plan_that_does_not_fit_cannot_be_compared(run, before):
    """Exit code 2, with the plan's own error."""
    code, _, err = run("verify", before, before, "--plan", "linear_prob", *MODEL)

    assert code == 2
    assert err.startswith("error: no preset is called 'linear_prob'\n  did you mean 'linear_probe'?")


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    """A pickle that would call something is refused and nothing is called; one without tensors is named."""
    path = tmp_path / "bad.pt"
    torch.save({"model": Harmful()}, path)
    with pytest.raises(WeightsError) as error:
        read_state(path)
    nothing(None, path)
    with pytest.raises(WeightsError) as empty:
        read_state(path)

    assert str(error.value) == (
        f"{path}: asks for print; a checkpoint holds tensors, and nothing in a file is executed\n"
        "  save the model's state_dict, best as a safetensors file, and give that"
    )
    assert str(empty.value) == f"{path}: holds no tensors"
    assert "executed" not in capsys.readouterr().out


DAMAGED = (
    "cannot be read as a checkpoint\n  it is damaged, or no file that torch.save wrote; a safetensors file is called "
)


def holding_itself(path):
    content = {}
    content["model"] = content
    torch.save(content, path)


def with_a_name(path):
    torch.save({"a\x1b[2J": torch.zeros(1)}, path)


STATES = [
    pytest.param(
        "a.pth",
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        "asks for torch.nn.modules.linear.Linear; a checkpoint holds tensors, and nothing in a file is executed\n"
        "  save the model's state_dict, best as a safetensors file, and give that",
        id="whole-model",
    ),
    pytest.param(
        "a.pth",
        lambda path: path.write_bytes(b"\x80\x02cos\x1b[2J\nsystem\n."),
        "asks for os\\x1b[2J.system; a checkpoint holds tensors, and nothing in a file is executed\n"
        "  save the model's state_dict, best as a safetensors file, and give that",
        id="escape-in-what-it-asks-for",
    ),
    pytest.param("a.pth", lambda path: path.write_bytes(b"eoo" * 99), f"{DAMAGED}.safetensors", id="junk"),
    pytest.param("a.pth", lambda path: path.write_bytes(b""), f"{DAMAGED}.safetensors", id="empty"),
    pytest.param(
        "a.pth", lambda path: path.write_bytes(b"\x80\x02" + b"]" * 99_999), f"{DAMAGED}.safetensors", id="deep"
    ),
    pytest.param(
        "a.pth", lambda path: path.mkdir(), "is a folder\n  expected a safetensors file or a checkpoint", id="folder"
    ),
    pytest.param(
        "a.safetensors",
        lambda path: path.write_bytes(b"no"),
        "cannot be read as safetensors (Error while deserializing header: header too small)\n"
        "  it is damaged, or something else",
        id="safetensors",
    ),
    pytest.param("a.pth", holding_itself, "holds no tensors", id="holds-itself"),
    pytest.param("a.pth", with_a_name, "holds a tensor whose name cannot be printed, 'a\\x1b[2J'", id="name"),
    pytest.param(
        "a.pth",
        lambda path: torch.save({"a": torch.zeros(1).expand(10**12)}, path),
        "holds 'a', 1,000,000,000,000 values of float32 that are not written out in its {size} bytes",
        id="one-value-many-times",
    ),
    pytest.param(
        "a.pth",
        lambda path: torch.save({"a": torch.zeros(2, device="meta")}, path),
        "holds 'a', 2 values of float32 that are not written out in its {size} bytes",
        id="meta",
    ),
]


@pytest.mark.parametrize(("name", "write", "said"), STATES)
def test_files_that_are_no_weights(tmp_path, name, write, said):
    """One sentence and what to do; torch's advice to trust the file is not passed on."""
    path = tmp_path / name
    write(path)
    with pytest.raises(WeightsError) as error:
        read_state(path)

    assert str(error.value) == f"{path}: {said.replace('{size}', f'{path.stat().st_size:,}')}"


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """The system's own reason."""

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")

    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", locked)
    with pytest.raises(WeightsError) as error:
        read_state(tmp_path / "a.pth")

    assert str(error.value) == f"{tmp_path / 'a.pth'}: cannot be read (Permission denied)"


def test_averages_are_taken_where_they_are_asked_for(tmp_path):
    """What was trained for a proof, the average for a start; counters beside them are neither."""
    own, average = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    for key in ("state_dict_ema", "model_ema"):
        torch.save({"epoch": torch.tensor(3), "model": own, key: average}, tmp_path / "a.pth")
        assert read_state(tmp_path / "a.pth") == own
        assert read_state(tmp_path / "a.pth", averages=True) == average
    torch.save({"state_dict": own}, tmp_path / "a.pth")
    assert read_state(tmp_path / "a.pth", averages=True) == own


@pytest.fixture
def probe(model, before, tmp_path):
    """A delta made on what is in ``before``."""
    live = apply_plan(model, "linear_probe")
    torch.nn.init.ones_(model.fc.weight)
    live.save_delta(tmp_path / "probe.safetensors")
    return tmp_path / "probe.safetensors"


def test_inspect_says_what_a_delta_holds(run, probe):
    """Plan, model, version, hash, sizes and tensors; the same as JSON."""
    code, out, _ = run("delta", "inspect", probe)
    lines = out.splitlines()
    data = json.loads(run("delta", "inspect", probe, "--json")[1])

    assert code == 0
    assert lines[:2] == ["plan   linear_probe", "model  test_resnet"]
    assert lines[4:] == ["held   90", "bytes  1,164", "  fc.bias  3", "  fc.weight  3 x 96"]
    assert data["tensors"] == {"fc.bias": [3], "fc.weight": [3, 96]}
    assert data["plan"]["name"] == "linear_probe"
    assert lines[3] == f"base   {data['base']}"


def test_apply_writes_whole_weights(run, model, before, probe, after):
    """The base with the delta in it is the trained model; a base with another head will do."""
    base = {name: tensor for name, tensor in load_file(before).items() if not name.startswith("fc.")}
    save_file({**base, "fc.weight": torch.zeros(9, 96), "fc.bias": torch.zeros(9)}, before)
    code, out, _ = run("delta", "apply", probe, before, after)
    whole = load_file(after)

    assert (code, out) == (0, f"{after}: test_resnet with 2 tensors of {probe}\n")
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("place", "what"), [("probe", "DELTA"), ("before", "BASE")])
def test_apply_replaces_neither_of_its_files(run, before, probe, place, what):
    """OUT has to be a third file; by whatever way it is called, the two stay."""
    files = {"probe": probe, "before": before}
    held = {name: path.read_bytes() for name, path in files.items()}
    out = files[place].parent / "." / "x" / ".." / files[place].name
    (files[place].parent / "x").mkdir()
    code, _, err = run("delta", "apply", probe, before, out)

    assert (code, err) == (
        1,
        f"error: {out}: OUT is {what} itself, which stays as it is\n  give the whole weights a file of their own\n",
    )
    assert {name: path.read_bytes() for name, path in files.items()} == held


@pytest.mark.parametrize("name", ["whole.pt", "whole.pth.tar", "whole", "whole.bin"])
def test_apply_writes_no_safetensors_under_another_name(run, before, probe, tmp_path, name):
    """A reader goes by the suffix, so nothing could read such a file again."""
    code, out, err = run("delta", "apply", probe, before, tmp_path / name)

    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / name}: OUT is written as safetensors, and ends in .safetensors\n  give ")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("command", [["inspect", "FOLDER"], ["diff", "FOLDER", "FOLDER"]])
def test_a_folder_is_called_one(run, tmp_path, command):
    """It is there, so "no such file" would send a reader to look for it."""
    _, out, err = run("delta", *(tmp_path if word == "FOLDER" else word for word in command))

    assert out == ""
    assert err == f"error: {tmp_path}: is a folder\n  expected a file that applied.save_delta(path) wrote\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["layer1.0.conv1.weight"].add_(1), "layer1.0.conv1.weight: its values are others than"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra: the delta does not know it"),
        (lambda state: state.pop("bn1.bias"), "bn1.bias: "),
    ],
    ids=["values", "more", "less"],
)
def test_apply_refuses_another_base(run, before, probe, after, change, said):
    """The first tensor that differs is named, and nothing is written."""
    state = load_file(before)
    change(state)
    save_file(state, before)
    code, _, err = run("delta", "apply", probe, before, after)

    assert code == 1
    assert f"\n  the first tensor that differs is {said}" in err
    assert not after.exists()


def test_diff_compares_two_deltas(run, model, probe, tmp_path):
    """Exit code 0 for the same, 1 with what differs, 2 where a file cannot be read."""
    other = tmp_path / "other.safetensors"
    live = apply_plan(model, "norm_and_head", replace=True)
    model.fc.bias.data.add_(0.25)
    live.save_delta(other)
    same = run("delta", "diff", probe, probe)
    code, out, _ = run("delta", "diff", probe, other)
    lines = out.splitlines()
    data = json.loads(run("delta", "diff", probe, other, "--json")[1])

    assert same == (0, "the same delta\n", "")
    assert code == 1
    assert lines[:2] == ["plan: linear_probe -> norm_and_head", "base: other tensors are frozen"]
    assert "fc.bias: differs by up to 0.25" in lines
    assert "bn1.weight: only in the second" in lines
    assert [entry["name"] for entry in data] == [line.partition(":")[0] for line in lines]
    assert run("delta", "diff", probe, tmp_path / "none")[0] == 2


def test_diff_names_what_two_bases_differ_in(run, probe, tmp_path):
    """Deltas of two bases: the first frozen tensor with other values."""
    torch.manual_seed(1)
    apply_plan(create_model("test_resnet", num_classes=3), "linear_probe").save_delta(tmp_path / "other.safetensors")
    out = run("delta", "diff", tmp_path / "other.safetensors", probe)[1]

    assert out.splitlines()[0] == "base: the first tensor that differs is conv1.0.weight"
