"""Plans from other tools' files: the same tensors with the same factors as the tool itself computes, or a refusal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peers import peer
from timm.optim import create_optimizer_v2
from torch import nn
from typer.testing import CliRunner

from freezeplan import cli, load_plan, resolve_plan
from freezeplan.apply.phases import Progress, advance
from freezeplan.errors import PlanError
from freezeplan.importers import finetuning_scheduler, mmengine, timm_args
from freezeplan.model.describer import create_model, describe
from freezeplan.plan.schema import Plateau


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def put(name: str, text: str) -> Path:
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return put


# timm -----------------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    pytest.param("args.yaml", "lr: 0.001\nlayer_decay: 0.65\nlayer_decay_min_scale: 0.1\n", 0.65, 0.1, id="args.yaml"),
    pytest.param("args.yaml", "layer_decay: null\nmodel: x\n", None, 0.0, id="none"),
    pytest.param("run.sh", "python train.py --layer-decay 0.75 \\\n  --lr 1e-3  # a note\n", 0.75, 0.0, id="shell"),
    pytest.param("run.txt", "--layer-decay=.8 --layer-decay-min-scale=0.2", 0.8, 0.2, id="with-equals"),
]


@pytest.mark.parametrize(("name", "text", "decay", "floor"), ARGUMENTS)
@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_convnext"])
def test_timms_arguments_give_timms_rates(write, model, name, text, decay, floor):
    """Rate and decay of every tensor are those of timm.optim.create_optimizer_v2."""
    net = create_model(model, num_classes=3)
    names = {id(p): n for n, p in net.named_parameters()}
    options = {} if decay is None else {"layer_decay": decay, "layer_decay_min_scale": floor}
    groups = create_optimizer_v2(net, opt="sgd", lr=1.0, weight_decay=0.05, **options).param_groups
    expected = {names[id(p)]: (g.get("lr_scale", 1.0), g["weight_decay"] > 0) for g in groups for p in g["params"]}

    rows = resolve_plan(timm_args.read(write(name, text)).plan, net).rows

    assert {row.name: (row.lr_mult, row.wd_mult > 0) for row in rows} == expected


# finetuning-scheduler -------------------------------------------------------------------------------------------------

SCHEDULE = """\
0:
  params:
  - fc.bias
  - fc.weight
  max_transition_epoch: 3
1:
  params:
  - layer4.*
  - layer3.0.conv[12]
  max_transition_epoch: 9
  lr: 1.0e-04
2:
  params:
  - layer1
  - bn1.weight
"""


@pytest.mark.slow  # importing lightning takes seconds
def test_a_schedule_thaws_what_the_package_thaws(write):
    """Depth by depth, the package's own reading of names and patterns; its rates, its epochs."""
    fts = peer("finetuning_scheduler.fts_supporters")
    file = write("schedule.yaml", SCHEDULE)
    net = create_model("resnet18", num_classes=3)

    class Reader(fts.ScheduleParsingMixin):
        """As much of the callback as reading a schedule needs."""

        base_max_lr = 1e-5
        pl_module = net
        ft_schedule = fts.ScheduleImplMixin.load_yaml_schedule(file)

        class strategy_adapter:  # noqa: N801
            get_named_params_for_schedule_validation = staticmethod(lambda: dict(net.named_parameters()))

    reader = Reader()
    named = dict(net.named_parameters()).keys()
    for depth in reader.ft_schedule:
        reader._parse_phase(depth, named, ((), frozenset()))
        reader._parse_phase_lr(depth)
    plan = finetuning_scheduler.read(file, lr=1e-3).plan
    parts = resolve_plan(plan, net).parts

    thawed: dict[str, float] = {}
    for depth, part in enumerate(parts):
        rate = 1e-3 if depth == 0 else float(reader.ft_schedule[depth]["lr"])
        thawed |= dict.fromkeys(reader.ft_schedule[depth]["params"], rate)
        assert {row.name: row.lr_mult * 1e-3 for row in part.trained} == pytest.approx(thawed)
    assert [phase.until for phase in plan.phases] == [3, 9, None]
    assert [len(part.trained) for part in parts] == [2, 19, 32]


@pytest.mark.slow
def test_the_packages_own_default_schedule(write):
    """Two parameters a depth from the end, none with an epoch: its early stopping ends each, and a note says so."""
    fts = peer("finetuning_scheduler.fts_supporters")
    net = create_model("test_resnet", num_classes=3)
    file = Path(fts.ScheduleImplMixin._gen_ft_schedule_impl(net, Path("schedules")))
    schedule = fts.ScheduleImplMixin.load_yaml_schedule(file)

    imported = finetuning_scheduler.read(file, lr=1e-3)
    parts = resolve_plan(imported.plan, net).parts

    thawed: set[str] = set()
    for depth, part in zip(schedule, parts, strict=True):
        thawed |= set(schedule[depth]["params"])
        assert {row.name for row in part.trained} == thawed
    assert thawed == {name for name, _ in net.named_parameters()}
    assert {phase.until for phase in imported.plan.phases[:-1]} == {Plateau(metric="val_loss", patience=3)}
    assert imported.notes == notes_of_early_stopping(f"{len(schedule) - 1} depths have", 3, "val_loss")


def notes_of_early_stopping(depths, patience, metric):
    return (
        f"{depths} no max_transition_epoch: the package ends them by FTSEarlyStopping, here after {patience} epochs "
        f"without a new best {metric}; set others by --monitor and --patience",
        "at the end of a depth the package goes back to its best checkpoint and keeps its best value; a plan goes on "
        "with the weights as they are, and each phase has a best value of its own",
    )


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_depth_ends_when_the_packages_early_stopping_ends_it(write, patience):
    """The same losses to FTSEarlyStopping and to the plan's plateau; each phase begins with a new best value."""
    fts = peer("finetuning_scheduler.fts_supporters")
    file = write("s.yaml", "0: {params: [fc.weight]}\n1: {params: [fc.bias]}\n2: {params: [layer4]}\n")
    losses = [0.9, 0.8, *[0.85] * (patience - 1), 0.79, *[0.79] * patience, 0.7, 0.6, *[0.65] * patience, 0.5]
    stopping = fts.FTSEarlyStopping(monitor="val_loss", patience=patience)
    stopping.finetuningscheduler_callback = SimpleNamespace(curr_depth=0)
    stopping.es_phase_complete, stopping.final_phase = False, False
    ended = []
    for epoch, loss in enumerate(losses):
        stopping._evaluate_stopping_criteria(torch.tensor(loss))
        if stopping.es_phase_complete:
            ended.append(epoch + 1)
            stopping._reset_es_phase()

    imported = finetuning_scheduler.read(file, lr=1e-3, patience=patience)
    progress = Progress()
    for epoch, loss in enumerate(losses):
        progress = advance(imported.plan.phases, progress, None, epoch + 1, {"val_loss": loss})

    assert [epoch for _, epoch in progress.ended] == ended[:2]
    assert len(ended) >= 2
    assert imported.notes == notes_of_early_stopping("2 depths have", patience, "val_loss")


def test_another_metric_and_depths_of_both_kinds(write):
    """``max_transition_epoch`` stays an epoch; the last depth has no end."""
    text = "0: {params: [a.weight], max_transition_epoch: 4}\n1: {params: [b.weight]}\n2: {params: [c.weight]}\n"
    imported = finetuning_scheduler.read(write("s.yaml", text), lr=1e-3, monitor="val/error", patience=7)

    plateau = Plateau(metric="val/error", patience=7)
    assert [phase.until for phase in imported.plan.phases] == [4, plateau, None]
    assert imported.notes == notes_of_early_stopping("1 depth has", 7, "val/error")


# mmengine -------------------------------------------------------------------------------------------------------------

CONFIGS = [
    pytest.param(
        "config.py",
        "multi = {'layer1': dict(lr_mult=0.1), 'layer1.0.bn': dict(decay_mult=0.3, lr_mult=0.2),\n"
        "         'conv1': dict(lr_mult=0.5, decay_mult=0.9)}\n"
        "optim_wrapper = dict(\n    type='OptimWrapper',\n    optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),\n"
        "    paramwise_cfg=dict(\n        norm_decay_mult=0.0, bias_decay_mult=0.5, bias_lr_mult=2.0,\n"
        "        custom_keys=multi))\n",
        {
            "norm_decay_mult": 0.0,
            "bias_decay_mult": 0.5,
            "bias_lr_mult": 2.0,
            "custom_keys": {
                "layer1": {"lr_mult": 0.1},
                "layer1.0.bn": {"decay_mult": 0.3, "lr_mult": 0.2},
                "conv1": {"lr_mult": 0.5, "decay_mult": 0.9},
            },
        },
        id="python",
    ),
    pytest.param(
        "config.yaml",
        "paramwise_cfg:\n  norm_decay_mult: 0\n  bias_lr_mult: 2\n",
        {"norm_decay_mult": 0, "bias_lr_mult": 2},
        id="norms-and-biases",
    ),
    pytest.param(
        "config.json",
        '{"custom_keys": {"fc": {"lr_mult": 10}, "layer": {"lr_mult": 0.1}}}',
        {"custom_keys": {"fc": {"lr_mult": 10}, "layer": {"lr_mult": 0.1}}},
        id="json",
    ),
    pytest.param(
        "config.toml",
        "[custom_keys]\nlayer4 = {lr_mult = 0.1, decay_mult = 0}\n",
        {"custom_keys": {"layer4": {"lr_mult": 0.1, "decay_mult": 0}}},
        id="toml",
    ),
    pytest.param(
        "config.yaml",
        "optim_wrapper: {paramwise_cfg: {bypass_duplicate: true, bias_decay_mult: 0}}",
        {"bypass_duplicate": True, "bias_decay_mult": 0},
        id="bias",
    ),
    pytest.param(
        "config.py",
        "optimizer = dict(type='AdamW', lr=1e-3, paramwise_cfg=dict(custom_keys={\n"
        "    '.cls_token': dict(decay_mult=0.0), '.pos_embed': dict(decay_mult=0.0), "
        "'.norm': dict(decay_mult=0.5)}))\n",
        {
            "custom_keys": {
                ".cls_token": {"decay_mult": 0.0},
                ".pos_embed": {"decay_mult": 0.0},
                ".norm": {"decay_mult": 0.5},
            }
        },
        id="keys-with-a-dot",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text", "config"), CONFIGS)
@pytest.mark.parametrize("model", ["resnet18", "test_vit"])
def test_a_paramwise_cfg_gives_mmengines_factors(write, model, name, text, config):
    """Rate and decay of every tensor are those of mmengine.optim.DefaultOptimWrapperConstructor."""
    optim = peer("mmengine.optim")
    file = write(name, text)
    net = create_model(model, num_classes=3)
    plan = mmengine.read(file).plan
    if model != "resnet18" and "layer" in text:
        pytest.skip("its keys are names of a ResNet")
    if model != "test_vit" and "token" in text:
        pytest.skip("its keys are names of a ViT")
    expected = mmengines_factors(optim, net, config)

    exact = mmengine.read(file, describe(net)).plan
    for rows in (resolve_plan(plan, net).rows, resolve_plan(exact, net).rows):
        rates = {row.name: row.lr_mult or 0.0 for row in rows}
        assert rates == pytest.approx({n: lr for n, (lr, _) in expected.items()})
        assert {row.name: row.wd_mult for row in rows} == pytest.approx({n: wd for n, (_, wd) in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_what_depends_on_shapes_is_exact_for_a_model(write, model):
    """Depthwise convolutions and 1-d tensors, which no plan selects, as mmengine's constructor finds them."""
    optim = peer("mmengine.optim")
    config = {"dwconv_decay_mult": 0.3, "flat_decay_mult": 0.0, "bias_decay_mult": 0.5, "bias_lr_mult": 2.0}
    net = create_model(model, num_classes=3)
    plan = mmengine.read(write("c.json", json.dumps({"paramwise_cfg": config})), describe(net)).plan

    rows = resolve_plan(plan, net).rows

    assert {row.name: (row.lr_mult, row.wd_mult) for row in rows} == mmengines_factors(optim, net, config)


def mmengines_factors(optim, net, config):
    """Tensor -> rate and decay that the package itself gives, with 1 as rate and decay of the optimizer."""
    logging.disable()
    try:
        constructor = optim.DefaultOptimWrapperConstructor(
            {"optimizer": {"type": "SGD", "lr": 1.0, "weight_decay": 1.0}}, config
        )
        groups: list[dict] = []
        constructor.add_params(groups, net)
    finally:
        logging.disable(logging.NOTSET)
    names = {id(p): n for n, p in net.named_parameters()}
    return {names[id(g["params"][0])]: (g.get("lr", 1.0), g.get("weight_decay", 1.0)) for g in groups}


def test_a_rate_of_nothing_is_frozen(write):
    """lr_mult 0 would still let statistics drift."""
    plan = mmengine.read(write("c.yaml", "custom_keys: {layer1: {lr_mult: 0}}")).plan

    assert {row.name.split(".")[0] for row in resolve_plan(plan, create_model("resnet18")).frozen} == {"layer1"}


# refusals -------------------------------------------------------------------------------------------------------------

REFUSED = [
    pytest.param(
        timm_args.read,
        "args.yaml",
        "lr: 1\nlayer_decay: 1.5\n",
        "args.yaml:2:14: layer_decay is a number in (0, 1], found 1.5",
        id="timm-number",
    ),
    pytest.param(
        timm_args.read,
        "run.sh",
        "train.py\n  --layer-decay-no-opt-scale 0.1",
        "run.sh:2:3: layer_decay_no_opt_scale has no counterpart in a plan\n"
        "  freeze those layers by a rule ahead, such as {stage: ..2, frozen: true}",
        id="timm-no-opt-scale",
    ),
    pytest.param(
        timm_args.read, "run.sh", "a 'b", "run.sh:1:1: not a command line: No closing quotation", id="timm-shell"
    ),
    pytest.param(
        timm_args.read, "a.yaml", "- 1", "a.yaml: timm's args.yaml is a mapping of options to values", id="timm-list"
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        "0: {params: [fc.weight]}\n2: {params: [layer1]}\n",
        "s.yaml:1:1: a schedule is a mapping with the depths 0, 1, 2, ... as keys",
        id="fts-depths",
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        "0: {params: [fc.weight], max_transition_epoch: 2}\n1: {params: [layer1]}\n",
        "s.yaml:2:4: the depths behind the first name their rates themselves, so a plan needs the first one's\n"
        "  --lr 1e-3: the learning rate that the optimizer is made with",
        id="fts-lr",
    ),
    pytest.param(
        lambda path: finetuning_scheduler.read(path, lr=1.0),
        "s.yaml",
        "0: {params: [fc.weight], max_transition_epoch: soon}\n1: {params: [layer1]}\n",
        "s.yaml:1:48: max_transition_epoch of depth 0 is 1 or more, or -1 for none; found 'soon'",
        id="fts-no-epoch",
    ),
    pytest.param(
        lambda path: finetuning_scheduler.read(path, lr=1.0),
        "s.yaml",
        "0: {params: [a], max_transition_epoch: 3}\n1: {params: [b], max_transition_epoch: 3}\n2: {params: [c]}\n",
        "s.yaml:2:40: max_transition_epoch of depth 1 is above that of the depths before, 3; found 3",
        id="fts-order",
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        "0:\n  params: [fc.weight]\n  new_optimizer: {}\n",
        "s.yaml:3:18: new_optimizer of depth 0 has no counterpart in a plan\n"
        "  take it out and set it in the training code",
        id="fts-new-optimizer",
    ),
    pytest.param(
        finetuning_scheduler.read, "s.yaml", "0: {}", "s.yaml:1:4: depth 0 has a list of params", id="fts-no-params"
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        "0: {params: [1]}",
        "s.yaml:1:14: a parameter is named by text, found 1",
        id="fts-number",
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        "0: {params: ['a(']}",
        "s.yaml:1:14: 'a(' is not a regular expression: missing ), unterminated subpattern at character 2",
        id="fts-pattern",
    ),
    *(
        pytest.param(
            lambda path: finetuning_scheduler.read(path, lr=1.0),
            "s.yaml",
            f"0: {{params: [a], max_transition_epoch: 1}}\n1: {{params: [b], lr: {written}}}",
            f"s.yaml:2:22: lr of depth 1 is a number above 0, found {found}",
            id=f"fts-{name}",
        )
        for name, written, found in (
            ("rate", "none", "'none'"),
            ("endless-rate", ".inf", "inf"),
            ("true", "true", "True"),
            ("large-integer", f"1{'0' * 400}", f"1{'0' * 400}"),
        )
    ),
    pytest.param(
        lambda path: finetuning_scheduler.read(path, lr=1e-300),
        "s.yaml",
        "0: {params: [a], max_transition_epoch: 1}\n1: {params: [b], lr: 1.0e+300}",
        "s.yaml:2:4: lr_mult must be a finite number, found inf",
        id="fts-large-ratio",
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        '0:\n  params: ["a.weight", "b\\e"]',
        "s.yaml:2:3: pattern '(?:b\\x1b).*' has characters that cannot be printed",
        id="fts-not-printable",
    ),
    pytest.param(
        finetuning_scheduler.read,
        "s.yaml",
        "0: {params: ['(?x)a #']}",
        "s.yaml:1:4: pattern '(?:(?x)a #).*' is not a regular expression: global flags not at the start of the "
        "expression at character 4",
        id="fts-flags",
    ),
    pytest.param(
        timm_args.read,
        "args.yaml",
        f"layer_decay: 1{'0' * 400}",
        f"args.yaml:1:14: layer_decay is a number in (0, 1], found 1{'0' * 400}",
        id="timm-large-integer",
    ),
    *[
        pytest.param(
            read,
            f"a\x1b.{suffix}",
            text,
            f"a\x1b.{suffix}: expected printable characters on one line, found 'a\\x1b'",
            id=f"name-{suffix}",
        )
        for read, suffix, text in [
            (timm_args.read, "txt", "--layer-decay 0.5"),
            (finetuning_scheduler.read, "yaml", "0: {params: [fc.weight]}"),
            (mmengine.read, "json", '{"bias_lr_mult": 2}'),
        ]
    ],
    pytest.param(mmengine.read, "no.py", None, "no.py: no such file", id="no-file"),
]


@pytest.mark.parametrize(("read", "name", "text", "message"), REFUSED)
def test_what_a_plan_cannot_say_is_refused(write, read, name, text, message):
    """With the place, and what to write instead where there is something."""
    file = Path(name) if text is None else write(name, text)
    with pytest.raises(PlanError) as error:
        read(file)

    assert str(error.value) == message


FILES = {
    "a plan of freezeplan": {
        "p.yaml": "version: 1\nrules:\n  - {stage: ..2, frozen: true}\n  - {match: .*, lr_mult: 1}\n",
        "p.toml": 'version = 1\nlayer_decay = 0.5\n[[rules]]\nmatch = ".*"\nlr_mult = 1\n',
        "p.json": '{"version": 1, "layer_decay": 0.5, "rules": [{"match": ".*", "lr_mult": 1}]}',
    },
    "a schedule of finetuning-scheduler": {
        "s.yaml": "0: {params: [fc.weight]}\n",
        "s.json": '{"0": {"params": ["fc"]}}',
    },
    "a config of mmengine": {
        "c.yaml": "model: {backbone: {frozen_stages: 1}}\nlr: 1\nseed: 1\n",
        "c.json": '{"paramwise_cfg": {"bias_lr_mult": 2}}',
        "c.py": "optim_wrapper = dict(paramwise_cfg=dict(bias_lr_mult=2))\n",
    },
    "the arguments of timm's train.py": {
        "a.yaml": "lr: 0.1\nopt: sgd\nfreeze: true\n",
        "a.json": '{"layer_decay": 0.5, "lr": 1}',
    },
}
"""What a file looks like -> such files."""
COMMANDS = {
    "a plan of freezeplan": "there is nothing to import: freezeplan show {} MODEL reads it as it is",
    "a schedule of finetuning-scheduler": "freezeplan import finetuning-scheduler {}",
    "a config of mmengine": "freezeplan import mmengine {}",
    "the arguments of timm's train.py": "freezeplan import timm {}",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_tool_is_refused_by_what_it_looks_like(write, kind):
    """By each importer but its own, which reads it."""
    readers = {
        "a schedule of finetuning-scheduler": finetuning_scheduler.read,
        "a config of mmengine": mmengine.read,
        "the arguments of timm's train.py": timm_args.read,
    }
    for name, text in FILES[kind].items():
        write(name, text)
        for own, read in readers.items():
            if own == kind:
                assert read(Path(name)).plan.rules
                continue
            with pytest.raises(PlanError) as error:
                read(Path(name))
            assert (
                str(error.value) == f"{name}: expected {own}; this looks like {kind}\n  {COMMANDS[kind].format(name)}"
            )


NOTHING_OF_TIMM = [
    pytest.param("a.txt", "", "it holds no options", id="empty"),
    pytest.param("a.json", "{}", "it holds no options", id="empty-json"),
    pytest.param("a.sh", "pip install timm -U # --lr 0.1", "it holds no options", id="another-script"),
    pytest.param("a.yaml", "max_steps: 3\nfp16: true", "of its 2 options train.py knows none", id="unknown"),
    pytest.param(
        "a.sh",
        "run.py --lr 1 --seed 2 --fp16 --learning_rate 1 --num_train_epochs 1",
        "of its 5 options train.py knows lr, seed",
        id="mostly-unknown",
    ),
    pytest.param(
        "a.yaml",
        "layer_decay: 0.5\nlearning_rate: 1\nmax_steps: 1\n",
        "of its 3 options train.py knows layer_decay",
        id="layer-decay-of-another",
    ),
]


@pytest.mark.parametrize(("name", "text", "found"), NOTHING_OF_TIMM)
def test_a_file_without_timms_arguments_is_refused(write, name, text, found):
    """It would become a plan that trains everything."""
    with pytest.raises(PlanError) as error:
        timm_args.read(write(name, text))

    assert str(error.value) == (
        f"{name}: expected the arguments of timm's train.py; {found}\n"
        "  expected args.yaml as train.py saves it, or a text file with its command line"
    )


def test_options_of_a_launcher_do_not_count(write):
    """They stand ahead of the script."""
    text = (
        "#!/bin/sh\nsrun --gres=gpu:4 --ntasks 4 --mem 8G --time 1 sh/distributed_train.sh 4 --layer-decay=.7 -b 64\n"
    )
    plan = timm_args.read(write("run.sh", text)).plan

    assert plan.layer_decay == 0.7


@pytest.mark.parametrize("text", ["layer_decay: null\nlr: 1\n", "opt: sgd\nlayer_decay_min_scale: 0.1\n"])
def test_arguments_without_layer_decay_say_so(write, text):
    """The plan trains everything at one rate, which nobody would import a file for."""
    imported = timm_args.read(write("args.yaml", text))

    assert imported.notes == ("args.yaml sets no layer_decay, so everything is trained at one rate",)
    assert imported.plan.layer_decay is None


OPTIONS = [
    pytest.param({"lr": -1}, "lr is a number above 0, found -1", id="negative"),
    pytest.param({"lr": 0}, "lr is a number above 0, found 0", id="nothing"),
    pytest.param({"lr": float("inf")}, "lr is a number above 0, found inf", id="endless"),
    pytest.param({"lr": "fast"}, "lr is a number above 0, found 'fast'", id="text"),
    pytest.param(
        {"monitor": ""}, "--monitor and --patience: metric must not be empty, found '' (text)", id="no-metric"
    ),
    pytest.param(
        {"monitor": "\x1b"},
        "--monitor and --patience: expected printable characters on one line, found '\\x1b'",
        id="metric",
    ),
    pytest.param({"patience": 0}, "--monitor and --patience: patience must be 1 or greater, found 0", id="no-patience"),
    pytest.param(
        {"patience": "3"}, "--monitor and --patience: patience must be an integer, found '3' (text)", id="patience"
    ),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
@pytest.mark.parametrize("text", ["0: {params: [a]}", "0: {params: [a]}\n1: {params: [b]}\n"])
def test_options_that_no_schedule_can_have(write, options, message, text):
    """Whether the schedule needs them or not."""
    with pytest.raises(PlanError) as error:
        finetuning_scheduler.read(write("s.yaml", text), **{"lr": 1e-3, **options})

    assert str(error.value) == message


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_plan(write):
    """To stdout, as JSON, or to a file, whole."""
    write("schedule.yaml", SCHEDULE)
    write("args.yaml", "layer_decay: 0.65\n")
    runner = CliRunner()
    printed = runner.invoke(cli.app, ["import", "timm", "args.yaml"])
    as_json = runner.invoke(cli.app, ["import", "mmengine", str(write("c.json", '{"bias_lr_mult": 2}')), "--json"])
    to_file = runner.invoke(
        cli.app, ["import", "finetuning-scheduler", "schedule.yaml", "--lr", "1e-3", "--out", "plan.yaml"]
    )

    assert printed.output == "version: 1\nname: args\nlayer_decay: 0.65\nrules:\n  - {match: '.*', lr_mult: 1}\n"
    assert json.loads(as_json.output)["rules"][1] == {"match": r"(?:.*\.)?bias", "lr_mult": 2.0, "optional": True}
    assert (to_file.exit_code, to_file.output) == (0, "")
    assert load_plan("plan.yaml") == finetuning_scheduler.read(Path("schedule.yaml"), lr=1e-3).plan
    assert sorted(path.name for path in Path().iterdir()) == ["args.yaml", "c.json", "plan.yaml", "schedule.yaml"]


@pytest.mark.parametrize(("name", "is_json"), [("p.yaml", False), ("p.YML", False), ("p.json", True)])
def test_what_is_written_can_be_read(write, name, is_json):
    """The suffix decides on the format; notes that JSON cannot hold are printed."""
    write("args.yaml", "lr: 1\n")
    done = CliRunner().invoke(cli.app, ["import", "timm", "args.yaml", "--out", name])

    text = Path(name).read_text(encoding="utf-8")
    assert (done.exit_code, text.startswith("{"), text.startswith("# args.yaml sets no")) == (0, is_json, not is_json)
    assert "args.yaml sets no layer_decay" in done.stderr
    assert load_plan(name) == timm_args.read(Path("args.yaml")).plan


@pytest.mark.parametrize("name", ["p.toml", "p.txt", "p", "sub/p.py"])
def test_a_plan_goes_to_no_file_that_cannot_be_read(write, name):
    """Refused before the other file is read."""
    write("args.yaml", "lr: 1\n")
    done = CliRunner().invoke(cli.app, ["import", "timm", "args.yaml", "--out", name])

    assert str(done.exception) == (
        f"{name}: a plan is written to a file that ends in .yaml, .yml or .json\n  --out p.yaml"
    )
    assert [path.name for path in Path().iterdir()] == ["args.yaml"]


def test_no_file_is_replaced_unasked(write):
    """The file that is read never, by whatever path; another one with --overwrite alone."""
    file = write("c.json", '{"bias_lr_mult": 2}')
    Path("link.json").symlink_to(file)
    write("mine.yaml", "mine")
    command = ["import", "mmengine", "c.json", "--out"]
    same = [
        CliRunner().invoke(cli.app, [*command, out, *more])
        for out in ("c.json", str(file.resolve()), "link.json")
        for more in ([], ["--overwrite"])
    ]
    there = CliRunner().invoke(cli.app, [*command, "mine.yaml"])
    usage = CliRunner().invoke(cli.app, [*command[:-1], "--overwrite"])

    assert {str(done.exception).partition(": ")[2] for done in same} == {
        "OUT is FILE itself, which stays as it is\n  give the plan a file of its own"
    }
    assert str(there.exception) == (
        "mine.yaml: is there already\n  --overwrite replaces it, or give another file with --out"
    )
    assert (file.read_text(), Path("mine.yaml").read_text()) == ('{"bias_lr_mult": 2}', "mine")
    assert (usage.exit_code, "only with --out" in usage.output) == (2, True)
    assert CliRunner().invoke(cli.app, [*command, "mine.yaml", "--overwrite"]).exit_code == 0
    assert load_plan("mine.yaml") == mmengine.read(file).plan


def test_tied_and_plain_modules_are_read_too(write):
    """A schedule of a module that is nobody's model, its patterns anchored at the end."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plan = finetuning_scheduler.read(write("s.yaml", "0: {params: ['.*bias$']}")).plan

    assert [row.name for row in resolve_plan(plan, net).trained] == ["0.bias", "1.bias"]
