"""Delta files: exactly what moved, back bit for bit onto the base that they were made on, and onto no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from freezeplan import apply_plan, load_delta
from freezeplan.errors import ApplyError, OutputError, WeightsError
from freezeplan.model.describer import create_model
from freezeplan.proof import delta

PROBE = {"version": 1, "name": "probe", "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}


def make(name="test_resnet", seed=0, **arguments):
    torch.manual_seed(seed)
    return create_model(name, num_classes=3, **arguments)


def train(model, live, size=32, steps=2):
    optimizer = torch.optim.SGD(live, lr=0.1, momentum=0.9)
    for _ in range(steps):
        model.train()
        model(torch.randn(4, 3, size, size)).square().mean().backward()
        optimizer.step()


def write_probe(path, name="test_resnet"):
    """A trained linear probe and its delta file."""
    model = make(name)
    live = apply_plan(model, PROBE, lr=0.1)
    train(model, live, size=model.pretrained_cfg["input_size"][-1])
    live.save_delta(path)
    return model


@pytest.fixture
def file(tmp_path):
    return tmp_path / "probe.safetensors"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_delta_brings_the_training_back_bit_for_bit(file, name):
    """A fresh base with the delta gives the logits of the trained model."""
    trained = write_probe(file, name).eval()
    base = make(name).eval()
    images = torch.randn(2, *base.pretrained_cfg["input_size"])
    before = base(images)
    found = load_delta(base, file)

    assert not torch.equal(before, trained(images))
    assert torch.equal(base(images), trained(images))
    assert (found.plan.name, found.phase, found.model) == ("probe", "", name)
    assert not any(hasattr(module, "_freezeplan") for module in base.modules())


def test_the_header_says_all_that_the_file_is_worth(file):
    """Plan, phase, model, timm's version, the base's content hash and its digests stand in the header."""
    import timm

    write_probe(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()

    assert sorted(header) == ["base", "format", "held", "model", "phase", "plan", "timm"]
    assert (header["format"], header["timm"]) == ("freezeplan-delta-1", timm.__version__)
    assert json.loads(header["plan"])["name"] == "probe"
    assert len(json.loads(header["held"])) == 90
    assert len(header["base"]) == 64
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_the_content_hash_is_of_what_stood_still(tmp_path):
    """Two trainings on one base have one hash; another base has another."""
    hashes = []
    for seed, value in ((0, 0.0), (0, 1.0), (1, 0.0)):
        model = make(seed=seed)
        live = apply_plan(model, PROBE)
        nn.init.constant_(model.fc.weight, value)
        live.save_delta(tmp_path / "x.safetensors")
        hashes.append(delta.read(tmp_path / "x.safetensors").base)

    assert hashes[0] == hashes[1] != hashes[2]


def test_statistics_that_moved_are_in_the_delta(file):
    """Buffers of what is in train mode travel too; those of what is frozen do not."""
    model = make()
    plan = {"version": 1, "rules": [{"match": "conv1|bn1|layer[1-3]", "frozen": True}, {"match": ".*", "lr_mult": 1}]}
    live = apply_plan(model, plan, lr=0.1)
    train(model, live)
    live.save_delta(file)
    base = make()
    found = load_delta(base, file)
    buffers = {name for name, _ in model.named_buffers()}

    assert found.tensors.keys() & buffers == {name for name in buffers if name.startswith("layer4")}
    for (name, one), two in zip(base.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_another_base_is_refused_and_left_as_it_is(file):
    """Another seed's base: the first tensor that differs is named, and nothing of the model changes."""
    import timm

    write_probe(file)
    other = make(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_delta(other, file)

    assert str(error.value) == (
        f"{file}: is the delta of another base\n"
        "  the first tensor that differs is conv1.0.weight: "
        "its values are others than those that the delta was made on (here shape (16, 3, 3, 3) of float32)\n"
        f"  it was made on test_resnet of timm {timm.__version__}"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def moved_statistics():
    model = make()
    model.layer2[0].bn1.running_mean.add_(1)
    return model


OTHERS = [
    pytest.param(moved_statistics, "layer2.0.bn1.running_mean: its values are others than those", id="a-buffer"),
    pytest.param(lambda: make().bfloat16(), "conv1.0.weight: its values are others than those", id="dtype"),
    pytest.param(
        lambda: create_model("test_resnet", num_classes=5),
        "conv1.0.weight: its values are others than those",
        id="values-come-first",
    ),
    pytest.param(
        lambda: make_with(5),
        "fc.weight: the delta has shape (3, 96) of float32, test_resnet has shape (5, 96) of float32",
        id="head",
    ),
    pytest.param(lambda: make("test_vit"), "cls_token: the delta does not know it", id="architecture"),
    pytest.param(lambda: nn.Sequential(), "conv1.0.weight: Sequential has no such tensor", id="nothing"),
]


def make_with(classes):
    model = make()
    model.reset_classifier(classes)
    return model


@pytest.mark.parametrize(("other", "said"), OTHERS)
def test_every_way_to_differ_is_named(file, other, said):
    """Values, dtype, shape, a tensor too many or too few: each is refused by name."""
    write_probe(file)
    with pytest.raises(WeightsError) as error:
        load_delta(other(), file)

    assert f"\n  the first tensor that differs is {said}" in str(error.value)


def test_what_was_trained_may_have_any_values_in_the_base(file):
    """A base with a fresh head of the right shape is the base."""
    trained = write_probe(file)
    base = make()
    nn.init.zeros_(base.fc.weight)
    load_delta(base, file)

    assert torch.equal(base.fc.weight, trained.fc.weight)


def test_wrapped_and_parametrized_models(file):
    """Names are canonical, and a weight held in two parts travels in two parts."""
    trained, base = make(), make()
    for model in (trained, base):
        weight_norm(model.fc)
    live = apply_plan(trained, PROBE, lr=0.1)
    train(trained, live)
    live.save_delta(file)
    found = load_delta(nn.DataParallel(base), file)

    assert sorted(found.tensors) == ["fc.bias", "fc.weight[0]", "fc.weight[1]"]
    assert torch.equal(base.fc.weight, trained.fc.weight)


def test_tied_weights_travel_once(file):
    """One tensor under two names is in the file once, and both names have it afterwards."""

    def tied():
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    plan = {"version": 1, "rules": [{"match": "body", "frozen": True}, {"match": ".*", "lr_mult": 1}]}
    trained, base = tied(), tied()
    live = apply_plan(trained, plan)
    nn.init.ones_(trained["a"].weight)
    live.save_delta(file)
    load_delta(base, file)

    assert sorted(load_file(file)) == ["a.bias", "a.weight", "b.bias"]
    assert base["b"].weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_what_was_initialised_anew_travels_although_it_is_frozen(file):
    """A frozen layer with new values is not the base's, so it is in the delta, its statistics too."""
    plan = {"version": 1, "rules": [{"match": "layer1", "frozen": True, "reinit": True}, {"match": "fc", "lr_mult": 1}]}
    plan["default"] = {"frozen": True}
    trained, base = make(), make()
    live = apply_plan(trained, plan)
    live.save_delta(file)
    found = load_delta(base, file)

    assert {name.partition(".")[0] for name in found.tensors} == {"layer1", "fc"}
    assert torch.equal(base.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)


def test_a_delta_of_a_freeze_that_did_not_hold_is_not_written(file):
    """Where a seal was broken no base would fit, so the file is refused."""
    model = make()
    live = apply_plan(model, PROBE)
    live.seal()
    with torch.no_grad():
        model.conv1[0].weight.add_(1)
    with pytest.raises(ApplyError) as error:
        live.save_delta(file)

    first, note = str(error.value).splitlines()
    assert first == "1 frozen tensors and buffers moved since the seal, so no base would fit this delta"
    assert note.startswith("  conv1.0.weight: ")
    assert not file.exists()


def test_the_phase_is_in_the_file(file):
    """A delta says in which phase it was taken; what any phase trains is in it."""
    phases = [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "all"}]
    live = apply_plan(make(), {"version": 1, "phases": phases, "rules": [{"match": ".*", "lr_mult": 1}]})
    live.save_delta(file)
    found = delta.read(file)

    assert (found.phase, len(found.tensors), len(found.held)) == ("head", 92, 0)


def header_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def damage(**changes):
    def change(file):
        tensors, header = load_file(file), header_of(file)
        save_file(tensors, file, metadata={**header, **changes})

    return change


DAMAGES = [
    pytest.param(lambda file: file.unlink(), "no such file\n  expected a file that", id="missing"),
    pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-9]), "cannot be read as safetensors (", id="cut"),
    pytest.param(lambda file: file.write_bytes(b"PK"), "cannot be read as safetensors (", id="another-format"),
    pytest.param(
        lambda file: save_file({"a": torch.zeros(1)}, file),
        "is no delta: its header says format ''\n  expected a file that applied.save_delta(path) wrote",
        id="plain-safetensors",
    ),
    pytest.param(damage(plan="{"), "its header is damaged: Expecting property name", id="json"),
    pytest.param(damage(held="[]"), "its header is damaged: expected a JSON object, found '[]'", id="not-an-object"),
    pytest.param(damage(held="[" * 100_000), "its header is damaged: nested too deeply", id="deep-held"),
    pytest.param(damage(plan="[" * 100_000), "its header is damaged: nested too deeply", id="deep-plan"),
    pytest.param(
        damage(plan=" " * 2**20 + "{}"), "its header is damaged: 1,048,578 characters, expected at most", id="large"
    ),
    pytest.param(
        damage(held='{"a": 1}'), "its header is damaged: expected digests of 64 digits, found 1", id="digests-no-text"
    ),
    pytest.param(
        damage(held='{"a": "0"}'), "its header is damaged: expected digests of 64 digits, found '0'", id="digests-short"
    ),
    pytest.param(
        damage(held='{"a\\u001b[2J": "0"}'),
        "its header is damaged: the name of a tensor is at most 1,000 printable characters, found 'a\\x1b[2J'",
        id="escape-in-held",
    ),
    pytest.param(
        lambda file: save_file({"a\x1b[2J": torch.zeros(1)}, file, metadata=header_of(file)),
        "its header is damaged: the name of a tensor is at most 1,000 printable characters, found 'a\\x1b[2J'",
        id="escape-in-a-tensor",
    ),
    *(
        pytest.param(
            damage(**{key: "x\x1b]0;y\a"}),
            f"its header is damaged: {key} is at most 1,000 printable characters, found 'x\\x1b]0;y\\x07'",
            id=f"escape-in-{key}",
        )
        for key in ("phase", "model", "timm")
    ),
    pytest.param(
        damage(plan='{"version": 1, "name": "\\u001b[2J", "rules": [{"match": ".*", "lr_mult": 1}]}'),
        "its header is damaged: name: expected printable characters on one line, found '\\x1b[2J'",
        id="escape-in-the-plan",
    ),
    pytest.param(
        lambda file: save_file({"a": torch.zeros(1)}, file, metadata={"format": "\x1b" * 99}),
        "is no delta: its header says format '" + "\\x1b" * 40 + "'\n",
        id="escape-in-the-format",
    ),
    pytest.param(
        lambda file: file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"\x1b32"')),
        "cannot be read as safetensors (",
        id="escape-in-a-type",
    ),
    pytest.param(damage(plan='{"version": 2}'), "its header is damaged: version: ", id="plan"),
    pytest.param(
        damage(base="0" * 64),
        "its header is damaged: the content hash of the base is not that of its digests",
        id="content-hash",
    ),
]


@pytest.mark.parametrize(("change", "said"), DAMAGES)
def test_a_file_that_is_no_delta_is_named(file, change, said):
    """A missing, cut, foreign or changed file is refused before the model is looked at."""
    apply_plan(make(), PROBE).save_delta(file)
    change(file)
    with pytest.raises(WeightsError) as error:
        load_delta(make(), file)

    assert str(error.value).startswith(f"{file}: {said}")
    assert all(line.isprintable() for line in str(error.value).splitlines())


def test_where_a_delta_cannot_be_written(tmp_path):
    """A folder that does not exist, or is where the file should be, is named; nothing half-written is left."""
    (tmp_path / "folder").mkdir()
    live = apply_plan(make(), PROBE)
    for path in (tmp_path / "missing" / "probe.safetensors", tmp_path / "folder"):
        with pytest.raises(OutputError) as error:
            live.save_delta(path)

        assert str(error.value).startswith(f"cannot write {str(path)!r}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.slow
def test_the_delta_of_vgg16s_linear_probe(tmp_path):
    """timm's own head with 20 classes: 327,760 bytes of weights; logits bit for bit; another seed is refused."""

    def vgg(seed):
        torch.manual_seed(seed)
        return create_model("vgg16", num_classes=20)

    file = tmp_path / "probe.safetensors"
    trained = vgg(0)
    live = apply_plan(trained, "linear_probe", lr=0.1)
    live.seal()
    train(trained, live, size=64, steps=1)
    live.save_delta(file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    base, images = vgg(0).eval(), torch.randn(2, 3, 64, 64)
    load_delta(base, file)

    assert live.verify()
    assert delta.read(file).bytes == 327_760
    assert file.stat().st_size == 327_760 + header
    assert header < 8_000
    assert torch.equal(base(images), trained.eval()(images))
    with pytest.raises(WeightsError, match=r"the first tensor that differs is features\.0\.weight"):
        load_delta(vgg(1), Path(file))
