"""OpenMMLab configs as people have them: layer-wise decay, frozen backbones, and how a file says what it does.

Layer-wise decay is not in mmengine. What its constructors compute is rebuilt here from what they are, layer by layer,
not from names: ``layer_decay_optimizer_constructor.py`` of mmdetection 3.3 and mmsegmentation 1.2,
``layer_decay_optim_wrapper.py`` of mmpose 1.3, ``layer_decay_optim_wrapper_constructor.py`` of mmpretrain 1.2 with
``get_layer_depth`` of its backbones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peers import peer
from torch import nn
from torch.nn import Parameter
from typer.testing import CliRunner

from freezeplan import cli, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.importers import mmengine
from freezeplan.model.describer import create_model, describe
from freezeplan.plan.schema import Rule


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def put(name: str, text: str) -> Path:
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return put


# layer-wise decay -----------------------------------------------------------------------------------------------------


class Contained(nn.Module):
    """A backbone and a head, as OpenMMLab's models have them."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 2)


def empty(*shape: int) -> Parameter:
    return Parameter(nn.Linear(1, 1).weight.new_zeros(shape))


def block(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


def mm_convnext(depths: tuple[int, ...]) -> nn.Module:
    """The names of mmpretrain's ConvNeXt."""
    backbone = nn.Module()
    backbone.downsample_layers = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4)) for _ in depths)
    backbone.stages = nn.ModuleList(
        nn.Sequential(*(block(depthwise_conv=nn.Conv2d(4, 4, 1, groups=4), norm=nn.LayerNorm(4)) for _ in range(depth)))
        for depth in depths
    )
    backbone.norm3 = nn.LayerNorm(4)
    return Contained(backbone)


def mm_vit(depth: int) -> nn.Module:
    """The names of mmpretrain's VisionTransformer."""
    backbone = nn.Module()
    backbone.cls_token, backbone.pos_embed = empty(1, 1, 4), empty(1, 5, 4)
    backbone.patch_embed = block(projection=nn.Conv2d(3, 4, 2))
    backbone.layers = nn.ModuleList(block(ln1=nn.LayerNorm(4), attn=nn.Linear(4, 4)) for _ in range(depth))
    backbone.ln1 = nn.LayerNorm(4)
    return Contained(backbone)


def mm_swin(depths: tuple[int, ...]) -> nn.Module:
    """The names of mmpretrain's SwinTransformer: a stage's downsample is its last part."""
    backbone = nn.Module()
    backbone.patch_embed = block(projection=nn.Conv2d(3, 4, 2))
    backbone.stages = nn.ModuleList()
    for depth in depths:
        stage = nn.Module()
        stage.blocks = nn.ModuleList()
        for _ in range(depth):
            attention = nn.Linear(4, 4)
            attention.relative_position_bias_table = empty(9, 2)
            stage.blocks.append(block(norm1=nn.LayerNorm(4), attn=attention))
        stage.downsample = block(norm=nn.LayerNorm(4), reduction=nn.Linear(4, 4))
        backbone.stages.append(stage)
    backbone.norm3 = nn.LayerNorm(4)
    return Contained(backbone)


def layers_of_convnext(net: nn.Module, number: int) -> list[tuple[nn.Module | Parameter, int]]:
    """mmdetection's layers: one for each of stages 1, 2 and 4, one for three blocks of the third."""
    found = []
    if hasattr(net, "stem"):  # timm's
        downsamples = [net.stem, *(stage.downsample for stage in list(net.stages)[1:])]
        stages = [stage.blocks for stage in net.stages]
    else:
        downsamples, stages = net.backbone.downsample_layers, net.backbone.stages
    found += zip(downsamples, (0, 2, 3, number), strict=True)
    for stage, first in zip(stages, (1, 2, 3, number), strict=True):
        found += [(part, first + (index // 3 if first == 3 else 0)) for index, part in enumerate(stage)]
    return found


def stages_of_convnext(net: nn.Module, number: int) -> list[tuple[nn.Module | Parameter, int]]:
    """mmdetection's ``stage_wise``: all that halves the resolution is the first layer, then one for each stage."""
    if hasattr(net, "stem"):
        ahead = [net.stem, *(stage.downsample for stage in list(net.stages)[1:])]
        stages = [stage.blocks for stage in net.stages]
    else:
        ahead, stages = [net.backbone.downsample_layers], net.backbone.stages
    return [*((part, 0) for part in ahead), *((stage, index + 1) for index, stage in enumerate(stages))]


def layers_of_vit(net: nn.Module, number: int) -> list[tuple[nn.Module | Parameter, int]]:
    """mmsegmentation's, mmpose's and mmpretrain's: the embeddings, the layers one by one; the last norm is outside."""
    inner = net.backbone if hasattr(net, "backbone") else net
    layers = inner.layers if hasattr(inner, "layers") else inner.blocks
    ahead = [(part, 0) for part in (inner.cls_token, inner.pos_embed, inner.patch_embed)]
    return [*ahead, *((layer, index + 1) for index, layer in enumerate(layers))]


def layers_of_swin(net: nn.Module, number: int) -> list[tuple[nn.Module | Parameter, int]]:
    """mmpretrain's: block by block; what halves the resolution is in the layer of the block ahead of it."""
    inner = net.backbone if hasattr(net, "backbone") else net
    found, layer = [(inner.patch_embed, 0)], 0
    for stage in inner.stages if hasattr(inner, "stages") else inner.layers:
        if hasattr(inner, "layers"):  # timm's stand ahead of the blocks
            found.append((stage.downsample, layer))
        for part in stage.blocks:
            layer += 1
            found.append((part, layer))
        if hasattr(inner, "stages"):
            found.append((stage.downsample, layer))
    return found


def expected_rates(net: nn.Module, layers: list[tuple[nn.Module | Parameter, int]], number: int, rate: float):
    """What is in no layer is one behind the last of them."""
    of = {
        id(p): layer for part, layer in layers for p in ([part] if isinstance(part, Parameter) else part.parameters())
    }
    return {name: rate ** (number + 1 - of.get(id(p), number + 1)) for name, p in net.named_parameters()}


MMDET = "LearningRateDecayOptimizerConstructor"
MMSEG = "LayerDecayOptimizerConstructor"
MMPOSE = "LayerDecayOptimWrapperConstructor"
MMPRETRAIN = "LearningRateDecayOptimWrapperConstructor"
DECAYED = [
    pytest.param(
        MMDET, {"decay_rate": 0.7, "decay_type": "layer_wise", "num_layers": 12}, mm_convnext((3, 3, 27, 3)),
        layers_of_convnext, 12, id="mmdet-convnext",
    ),
    pytest.param(
        MMDET, {"decay_rate": 0.95, "decay_type": "layer_wise", "num_layers": 6}, "convnext_tiny",
        layers_of_convnext, 6, id="mmdet-timm-convnext",
    ),
    pytest.param(
        MMDET, {"decay_rate": 0.9, "decay_type": "stage_wise", "num_layers": 6}, mm_convnext((3, 3, 9, 3)),
        stages_of_convnext, 6, id="mmdet-stages",
    ),
    pytest.param(
        MMDET, {"decay_rate": 0.9, "decay_type": "stage_wise", "num_layers": 6}, "convnext_tiny",
        stages_of_convnext, 6, id="mmdet-timm-stages",
    ),
    pytest.param(
        MMDET, {"decay_rate": 0.65, "decay_type": "layer_wise_vit", "num_layers": 12}, mm_vit(12),
        layers_of_vit, 12, id="mmseg-vit",
    ),
    pytest.param(MMSEG, {"layer_decay_rate": 0.9, "num_layers": 12}, mm_vit(12), layers_of_vit, 12, id="mmseg-beit"),
    pytest.param(MMPOSE, {"layer_decay_rate": 0.75, "num_layers": 6}, "test_vit", layers_of_vit, 6, id="mmpose-timm"),
    pytest.param(MMPRETRAIN, {"layer_decay_rate": 0.65}, mm_vit(12), layers_of_vit, 12, id="mmpretrain-vit"),
    pytest.param(MMPRETRAIN, {"layer_decay_rate": 0.65}, "test_vit", layers_of_vit, 6, id="mmpretrain-timm-vit"),
    pytest.param(MMPRETRAIN, {"layer_decay_rate": 0.9}, mm_swin((2, 2, 6, 2)), layers_of_swin, 12, id="mm-swin"),
    pytest.param(
        MMPRETRAIN, {"layer_decay_rate": 0.9}, "swin_tiny_patch4_window7_224", layers_of_swin, 12,
        id="mmpretrain-timm-swin",
    ),
    pytest.param(
        MMPRETRAIN, {"layer_decay_rate": 0.8}, mm_convnext((3, 3, 27, 3)), layers_of_convnext, 12,
        id="mmpretrain-convnext",
    ),
    pytest.param(
        MMPRETRAIN, {"layer_decay_rate": 0.8}, "convnext_tiny", layers_of_convnext, 6, id="mmpretrain-timm-convnext"
    ),
]  # fmt: skip


def expected_decays(net, constructor, settings):
    """1-d tensors and biases have none; mmpose's position embeddings neither; mmpretrain's go by its keys."""
    found = {}
    norms = {f"{n}.{k}" for n, m in net.named_modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for k, _ in
             m.named_parameters(recurse=False)}  # fmt: skip
    for name, p in net.named_parameters():
        plain = p.ndim != 1 and not name.endswith(".bias")
        if constructor == MMPOSE:
            plain = plain and "pos_embed" not in name
        if constructor == MMPRETRAIN:
            key = next((key for key in settings.get("custom_keys", ()) if key in name), None)
            plain = settings["custom_keys"][key]["decay_mult"] if key else (
                settings.get("norm_decay_mult", 1.0) if name in norms else
                settings.get("bias_decay_mult", settings.get("flat_decay_mult", 1.0)) if name.endswith("bias") else
                settings.get("flat_decay_mult", 1.0) if p.ndim == 1 else 1.0
            )  # fmt: skip
        found[name] = float(plain)
    return found


@pytest.mark.parametrize(("constructor", "settings", "net", "layers", "number"), DECAYED)
def test_layer_decay_is_exact_for_a_model(write, constructor, settings, net, layers, number):
    """Tensor by tensor what the constructor gives, under OpenMMLab's names and under timm's."""
    net = create_model(net, num_classes=3, meta=True) if isinstance(net, str) else net
    if constructor == MMPRETRAIN:
        custom = {".cls_token": {"decay_mult": 0.0}, ".pos_embed": {"decay_mult": 0.5}}
        settings = {**settings, "custom_keys": custom, "norm_decay_mult": 0.25, "flat_decay_mult": 0.0}
    file = write("c.json", json.dumps({"optim_wrapper": {"constructor": constructor, "paramwise_cfg": settings}}))

    plan = mmengine.read(file, describe(net)).plan
    rows = resolve_plan(plan, net).rows

    rates = expected_rates(
        net, layers(net, number), number, settings.get("decay_rate", settings.get("layer_decay_rate"))
    )
    assert {row.name: row.lr_mult for row in rows} == pytest.approx(rates, rel=1e-11)
    assert {row.name: row.wd_mult for row in rows} == expected_decays(net, constructor, settings)


BLOCKS = (
    "there the backbone's last norm has the rate of the head, and ConvNeXt's blocks share rates (one in each stage, in "
    "the third one for three blocks); layer_decay gives each block its own, and the last norm that of the last block"
)
STAGES = "stage_wise: there a stage has one rate; layer_decay gives each block its own"
DECAY = (
    "weight decay: there {} and what else timm's no_weight_decay() lists have it, if they have two dimensions or more; "
    "in the plan they have none"
)
EXACT = "freezeplan import mmengine c.json --model MODEL writes rules with the exact factors of each tensor of a model"
PLANNED = [
    pytest.param(
        MMDET, {"decay_rate": 0.7, "decay_type": "layer_wise", "num_layers": 12},
        [BLOCKS, DECAY.format("pos_embed, cls_token"), EXACT], id="mmdet",
    ),
    pytest.param(
        f"mmdet.{MMDET}", {"decay_rate": 0.9, "decay_type": "stage_wise", "num_layers": 6},
        [STAGES, DECAY.format("pos_embed, cls_token"), EXACT], id="mmdet-stages",
    ),
    pytest.param(
        MMPOSE, {"layer_decay_rate": 0.75, "num_layers": 12, "custom_keys": {"bias": {"decay_multi": 0.0}}},
        [f"c.json:1:149: {MMPOSE} does not read custom_keys, so it is left out", BLOCKS, DECAY.format("cls_token"),
         EXACT], id="mmpose",
    ),
    pytest.param(
        MMPRETRAIN, {"layer_decay_rate": 0.65, "custom_keys": {".norm": {"decay_mult": 0.0, "lr_mult": 2.0}}},
        [f"c.json:1:179: {MMPRETRAIN} sets rates by layers alone, so lr_mult of '.norm' is left out", BLOCKS, EXACT],
        id="mmpretrain",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("constructor", "settings", "notes"), PLANNED)
def test_layer_decay_of_any_model_is_timms(write, constructor, settings, notes):
    """Without a model: the plan's ``layer_decay``, and what is different in words."""
    file = write("c.json", json.dumps({"optim_wrapper": {"constructor": constructor, "paramwise_cfg": settings}}))

    imported = mmengine.read(file)

    assert imported.plan.layer_decay == settings.get("decay_rate", settings.get("layer_decay_rate"))
    assert imported.plan.rules[-1] == Rule(match=".*", lr_mult=1.0)
    assert list(imported.notes) == notes
    assert imported.plan.weight_decay == ("all" if constructor == MMPRETRAIN else "timm")
    own = [Rule(match=r".*\.norm.*", wd_mult=0.0)] if constructor == MMPRETRAIN else []
    assert list(imported.plan.rules[:-1]) == own


def test_the_differences_are_those_that_the_notes_name():
    """timm's ``layer_decay`` of a ViT against the constructor's: the last norm alone has another rate."""
    net = create_model("test_vit", num_classes=3)
    plan = {"version": 1, "layer_decay": 0.65, "rules": [{"match": ".*", "lr_mult": 1}]}
    rates = {row.name: row.lr_mult for row in resolve_plan(plan, net).rows}
    expected = expected_rates(net, layers_of_vit(net, 6), 6, 0.65)

    assert {name for name, rate in rates.items() if rate != pytest.approx(expected[name])} == {
        "norm.weight",
        "norm.bias",
    }


# what a config freezes ------------------------------------------------------------------------------------------------

DETECTOR = """\
norm_cfg = dict(type='BN', requires_grad=False)
model = dict(
    type='FasterRCNN',
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        frozen_stages=1,
        norm_cfg=norm_cfg,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    roi_head=dict(bbox_head=dict(num_classes=len(classes), reg_class_agnostic=False)))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001))
"""
FROZEN = [
    pytest.param(
        DETECTOR,
        [
            Rule(match="backbone", stage="..1", frozen=True),
            Rule(match="backbone", role="norm", frozen=True),
            Rule(match="backbone", role="norm", mode="eval"),
            Rule(match=".*", lr_mult=1.0),
        ],
        [],
        id="detector",
    ),
    pytest.param(
        "model = dict(backbone=dict(type='mmpretrain.MobileNetV2', frozen_stages=0))\n",
        [Rule(match="backbone", stage="0", frozen=True), Rule(match=".*", lr_mult=1.0)],
        [
            "c.py:1:73: frozen_stages of mmpretrain.MobileNetV2 may count other parts than timm's stages; see which "
            "tensors are frozen with freezeplan show"
        ],
        id="another-count",
    ),
    pytest.param(
        "model = {'back(bone': dict(type='ResNet', frozen_stages=1)}\n",
        [Rule(match=r"back\(bone", stage="..1", frozen=True), Rule(match=".*", lr_mult=1.0)],
        [],
        id="a-name-that-is-no-pattern",
    ),
    pytest.param(
        "model = dict(img_backbone=dict(type='ResNet', frozen_stages=-1, norm_eval=False),\n"
        "             detector=dict(backbone=dict(type='ResNet3dCSN', bn_frozen=True)))\n",
        [Rule(match=r"detector\.backbone", role="norm", frozen=True), Rule(match=".*", lr_mult=1.0)],
        ["c.py:2:72: the statistics of these norms go on there; in the plan they stay as they are"],
        id="bn-frozen",
    ),
    pytest.param(
        "model = dict(backbone=dict(type='ViT', freeze_patch_embed=True), neck=dict(requires_grad=False))\n"
        "custom_hooks = [dict(type='FreezeHook', freeze_iters=100)]\n"
        "train_cfg = dict(freeze_at=2)\n",
        [Rule(match=".*", lr_mult=1.0)],
        [
            "c.py:1:59: freeze_patch_embed=True is not taken over; write a rule for what it freezes",
            "c.py:1:90: requires_grad=False is not taken over; write a rule for what it freezes",
            "c.py:2:27: type 'FreezeHook' is not taken over; write a rule for what it freezes",
            "c.py:2:54: freeze_iters=100 is not taken over; write a rule for what it freezes",
            "c.py:3:28: freeze_at=2 is not taken over; write a rule for what it freezes",
        ],
        id="named",
    ),
    pytest.param(
        "model = dict(backbone=dict(type='ResNet'))\nmodel['backbone']['frozen_stages'] = 2\n"
        "paramwise_cfg = dict(bias_lr_mult=2)\n",
        [
            Rule(type=["_BatchNorm", "_InstanceNorm", "GroupNorm", "LayerNorm"], lr_mult=1.0, optional=True),
            Rule(match=r"(?:.*\.)?bias", lr_mult=2.0, optional=True),
            Rule(match=".*", lr_mult=1.0),
        ],
        ["c.py:2:1: model is made by code (model['backbone']['frozen_stages']); what it freezes is not known here"],
        id="made-by-code",
    ),
]


@pytest.mark.parametrize(("text", "rules", "notes"), FROZEN)
def test_what_a_config_freezes_is_a_rule_or_a_note(write, text, rules, notes):
    imported = mmengine.read(write("c.py", text))

    assert list(imported.plan.rules) == rules
    assert list(imported.notes) == notes


def test_a_frozen_backbone_is_the_one_that_the_config_freezes(write):
    """As ``ResNet._freeze_stages`` and ``ResNet.train`` of mmdetection 3.3: the stem, layer1, the norms' statistics."""
    backbone = create_model("resnet18", num_classes=0)
    text = DETECTOR.replace("norm_cfg=norm_cfg", "norm_cfg=dict(type='BN')")
    resolution = resolve_plan(mmengine.read(write("c.py", text)).plan, Contained(backbone))

    ahead = ("conv1", "bn1", "layer1")
    frozen = {f"backbone.{name}" for name, _ in backbone.named_parameters() if name.startswith(ahead)}
    norms = {f"backbone.{name}" for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {row.name for row in resolution.frozen} == frozen
    assert {name for name, mode in resolution.modes.items() if mode == "eval"} >= norms


def test_what_is_frozen_has_no_rule_for_its_rate(write):
    """Exact rules beside frozen stages: none of them is shadowed."""
    net = create_model("convnext_tiny", num_classes=3, meta=True)
    settings = {"decay_rate": 0.8, "num_layers": 6}
    config = {
        "model": {"frozen_stages": 1, "type": "ConvNeXt"},
        "optim_wrapper": {"constructor": MMDET, "paramwise_cfg": settings},
    }
    plan = mmengine.read(write("c.json", json.dumps(config)), describe(net)).plan
    resolution = resolve_plan(plan, net)
    expected = expected_rates(net, layers_of_convnext(net, 6), 6, 0.8)

    assert {row.name for row in resolution.frozen} == {n for n in expected if n.startswith(("stem.", "stages.0."))}
    assert {row.name: row.lr_mult for row in resolution.trained} == pytest.approx(
        {n: rate for n, rate in expected.items() if not n.startswith(("stem.", "stages.0."))}
    )


# how a file says it ---------------------------------------------------------------------------------------------------

RESOLVED = (
    "write the whole config with mmengine, and import that:\n"
    "  python -c \"from mmengine import Config; Config.fromfile('{}').dump('resolved.py')\""
)
REFUSED = [
    pytest.param(
        "c.yaml",
        "paramwise_cfg:\n  dwconv_decay_mult: 0\n",
        "c.yaml:2:22: dwconv_decay_mult has no counterpart in a plan for any model\n"
        "  a plan does not select depthwise convolutions; name them: {match: '.*conv_dw', wd_mult: 0}\n"
        "  for one model: freezeplan import mmengine c.yaml --model MODEL",
        id="depthwise",
    ),
    pytest.param(
        "c.yaml",
        "paramwise_cfg:\n  dcn_offset_lr_mult: 0.1\n",
        "c.yaml:2:23: dcn_offset_lr_mult has no counterpart in a plan\n"
        "  name the offsets: {match: '.*conv_offset', lr_mult: 0.1}",
        id="offsets",
    ),
    pytest.param(
        "c.py",
        "import os\nparamwise_cfg = dict(\n    bias_lr_mult=os.system('echo run'))\n",
        "c.py:3:18: os.system('echo run') is not a literal; the file is read, not executed\n"
        "  write its value out; or\n  " + RESOLVED.format("c.py"),
        id="code",
    ),
    pytest.param(
        "c.py",
        "keys = {'backbone': dict(lr_mult=0.1)}\n"
        "keys.update({f'layers.{i}': dict(lr_mult=0.2) for i in range(2)})\n"
        "optimizer = dict(type='AdamW', paramwise_cfg=dict(custom_keys=keys))\n",
        "c.py:2:1: keys.update({f'layers.{i}': dict(lr_mult=0.2) for i in ra... is not a literal; the file is read, "
        "not executed\n  write its value out; or\n  " + RESOLVED.format("c.py"),
        id="update",
    ),
    pytest.param(
        "c.py",
        "_base_ = ['../base.py']\noptim_wrapper = dict(paramwise_cfg=dict(bias_lr_mult=2.0))\n",
        "c.py:1:10: this config inherits from others, and what they freeze is not in it\n  " + RESOLVED.format("c.py"),
        id="base",
    ),
    pytest.param(
        "c.py",
        "from mmengine.config import read_base\n\nwith read_base():\n    from .base import *\n",
        "c.py:3:6: this config inherits from others, and what they freeze is not in it\n  " + RESOLVED.format("c.py"),
        id="read-base",
    ),
    pytest.param(
        "c.py",
        "optimizer = build()\n",
        "c.py:1:13: build() is not a literal; the file is read, not executed\n"
        "  write its value out; or\n  " + RESOLVED.format("c.py"),
        id="optimizer",
    ),
    pytest.param(
        "c.py",
        "optim_wrapper = dict(constructor=MyConstructor, paramwise_cfg=dict())\n",
        "c.py:1:34: MyConstructor is not a literal; the file is read, not executed\n"
        "  write its value out; or\n  " + RESOLVED.format("c.py"),
        id="constructor-by-code",
    ),
    pytest.param(
        "c.py",
        "model = dict(backbone=dict(frozen_stages=stages()))\n",
        "c.py:1:42: frozen_stages is stages(), which is not a literal; the file is read, not executed\n"
        "  write its value out",
        id="frozen-by-code",
    ),
    pytest.param(
        "c.py",
        "model = dict(backbone=dict(frozen_stages='all'))\n",
        "c.py:1:42: frozen_stages is an integer, found 'all'",
        id="frozen-text",
    ),
    pytest.param(
        "c.py",
        "optimizer = dict(type='SGD', lr=0.1, paramwise_options=dict(norm_decay_mult=0.))\n",
        "c.py:1:56: paramwise_options is the name of paramwise_cfg before mmcv 1.0; newer versions do not read it\n"
        "  rename it to paramwise_cfg",
        id="old-name",
    ),
    pytest.param(
        "c.py",
        "paramwise_cfg = dict(custom_keys={'norm': dict(decay_multi=0.0)})\n",
        "c.py:1:60: decay_multi of 'norm' is neither lr_mult nor decay_mult; mmengine hands it to the optimizer, which "
        "does not read it\n  did you mean 'decay_mult'?",
        id="misspelt",
    ),
    pytest.param(
        "c.json",
        '{"custom_keys": {"a": {"momentum": 1}}}',
        "c.json:1:36: momentum of 'a' is neither lr_mult nor decay_mult; mmengine hands it to the optimizer, which "
        "does not read it\n  take it out",
        id="other-setting",
    ),
    pytest.param(
        "c.py",
        "paramwise_cfg = dict(norm_decay_multi=0.0)\n",
        "c.py:1:39: norm_decay_multi has no counterpart in a plan\n  did you mean 'norm_decay_mult', "
        "'dwconv_decay_mult', 'flat_decay_mult'?",
        id="misspelt-key",
    ),
    pytest.param(
        "c.py",
        "paramwise_cfg = dict(learns=0.0)\n",
        "c.py:1:29: learns has no counterpart in a plan\n  known here: custom_keys, bias_lr_mult, bias_decay_mult, "
        "norm_decay_mult, bypass_duplicate, dwconv_decay_mult, flat_decay_mult",
        id="unknown-key",
    ),
    pytest.param(
        "c.py",
        "paramwise_cfg = dict(num_layers=6, decay_rate=0.7)\n",
        "c.py:1:33: num_layers has no counterpart in a plan\n  it is read by constructor="
        f"'{MMDET}' or '{MMSEG}' or '{MMPOSE}' alone",
        id="layers-without-constructor",
    ),
    pytest.param(
        "c.py",
        "optim_wrapper = dict(constructor='LayerDecayOptimWraperConstructor', paramwise_cfg=dict())\n",
        "c.py:1:34: constructor LayerDecayOptimWraperConstructor has no counterpart in a plan\n"
        f"  did you mean '{MMPOSE}', '{MMSEG}', '{MMPRETRAIN}'?",
        id="misspelt-constructor",
    ),
    pytest.param(
        "c.py",
        "optim_wrapper = dict(constructor='Mine', paramwise_cfg=dict())\n",
        "c.py:1:34: constructor Mine has no counterpart in a plan\n  known here: DefaultOptimWrapperConstructor, "
        f"DefaultOptimizerConstructor, {MMDET}, {MMSEG}, {MMPOSE}, {MMPRETRAIN}",
        id="unknown-constructor",
    ),
    pytest.param(
        "c.py",
        f"optim_wrapper = dict(constructor='{MMDET}', paramwise_cfg=dict(num_layers=6, decay_rate=2))\n",
        f"c.py:1:119: {MMDET} takes decay_rate, a number in (0, 1]; found 2",
        id="rate",
    ),
    pytest.param(
        "c.py",
        f"optim_wrapper = dict(constructor='{MMPOSE}', paramwise_cfg=dict(num_layers=6))\n",
        f"c.py:1:85: {MMPOSE} takes layer_decay_rate, a number in (0, 1]; it is not given",
        id="no-rate",
    ),
    pytest.param(
        "c.py",
        f"optim_wrapper = dict(constructor='{MMPOSE}', paramwise_cfg=dict(layer_decay_rate=0.5))\n",
        f"c.py:1:85: {MMPOSE} takes num_layers, an integer of 1 or more; it is not given",
        id="no-layers",
    ),
    pytest.param(
        "c.py",
        f"optim_wrapper = dict(constructor='{MMPOSE}', paramwise_cfg=dict(layer_decay_rate=0.5, num_layers='all'))\n",
        f"c.py:1:123: {MMPOSE} takes num_layers, an integer of 1 or more; found 'all'",
        id="layers-text",
    ),
    pytest.param(
        "c.py",
        f"optim_wrapper = dict(constructor='{MMDET}', paramwise_cfg=dict(decay_rate=0.5, num_layers=6, "
        "decay_type='x'))",
        "c.py:1:135: decay_type is layer_wise, layer_wise_vit or stage_wise, found 'x'",
        id="decay-type",
    ),
    pytest.param(
        "c.py",
        "generator = dict(paramwise_cfg=dict(bias_lr_mult=2))\ndiscriminator = dict(paramwise_cfg=dict())\n",
        "c.py:2:17: a second optimizer with settings of its own, beside the one at c.py:1:13\n"
        "  a plan is for one optimizer; import each from a file of its own",
        id="two-optimizers",
    ),
    pytest.param(
        "c.py",
        "paramwise_cfg = dict(custom_keys={'a': dict(lr_mult=-1)})",
        "c.py:1:53: a factor is a number of 0 or more, found -1",
        id="negative",
    ),
    pytest.param(
        "c.json", '{"custom_keys": {"": {}}}', "c.json:1:22: an empty key is a part of every name\n  take it out",
        id="empty-key",
    ),
    pytest.param(
        "c.yaml", "custom_keys:\n  backbone: {lr_mult: 0.1}\n  0: {lr_mult: 0.5}\n",
        "c.yaml:3:6: a key of custom_keys is a part of a name, as text; found 0\n  write it in quotes",
        id="number-as-key",
    ),
    pytest.param(
        "c.yaml", "custom_keys: {1.5: {}, true: {}}",
        "c.yaml:1:20: a key of custom_keys is a part of a name, as text; found 1.5\n  write it in quotes",
        id="no-text-as-key",
    ),
    pytest.param(
        "c.yaml", "paramwise_cfg: {bias_lr_mult: 2, 7: 1}",
        "c.yaml:1:37: 7 has no counterpart in a plan\n  known here: custom_keys, bias_lr_mult, bias_decay_mult, "
        "norm_decay_mult, bypass_duplicate, dwconv_decay_mult, flat_decay_mult",
        id="number-as-setting",
    ),
    pytest.param(
        "c.yaml", "custom_keys: {a: {2: 1}}",
        "c.yaml:1:22: 2 of 'a' is neither lr_mult nor decay_mult; mmengine hands it to the optimizer, which does not "
        "read it\n  take it out",
        id="number-as-factor",
    ),
    pytest.param(
        "c.yaml", f"custom_keys: {{a: {{lr_mult: 1{'0' * 400}}}}}",
        f"c.yaml:1:28: a factor is a number of 0 or more, found 1{'0' * 400}",
        id="large-integer",
    ),
    pytest.param(
        "c.yaml", 'custom_keys: {"a\\e": {lr_mult: 0.1}}',
        "c.yaml:1:14: pattern '.*a\\\\\\x1b.*' has characters that cannot be printed",
        id="key-not-printable",
    ),
    pytest.param(
        "c.yaml", 'model: {"": {frozen_stages: 1}}',
        "c.yaml:1:29: an empty pattern matches no name",
        id="part-without-name",
    ),
    pytest.param(
        "c.json", '{"custom_keys": {"a": 1}}', "c.json:1:23: 'a' has a dict with lr_mult and decay_mult", id="no-dict"
    ),
    pytest.param("c.json", '{"custom_keys": 1}', "c.json:1:17: custom_keys is a dict of parts of names", id="keys"),
    pytest.param("c.json", '{"paramwise_cfg": 1}', "c.json:1:19: paramwise_cfg is a dict", id="no-mapping"),
    pytest.param("c.json", "[1]", "c.json: a config is a mapping", id="list"),
    pytest.param(
        "c.yaml", "model: x", "c.yaml:1:1: there is no paramwise_cfg in this file, and nothing that freezes", id="none"
    ),
    pytest.param(
        "c.py", "x = 1", "c.py: there is no paramwise_cfg in this file, and nothing that freezes", id="none-python"
    ),
    pytest.param("c.py", "x = (", "c.py: not Python: '(' was never closed (<unknown>, line 1)", id="syntax"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_what_is_refused_says_where_and_what_to_do(write, name, text, message):
    with pytest.raises(PlanError) as error:
        mmengine.read(write(name, text))

    assert str(error.value) == message


def test_a_backbone_that_a_constructor_does_not_know(write):
    config = {"constructor": MMPOSE, "paramwise_cfg": {"layer_decay_rate": 0.5, "num_layers": 6}}
    file = write("c.json", json.dumps({"optim_wrapper": config}))
    with pytest.raises(PlanError) as error:
        mmengine.read(file, describe(create_model("resnet18", meta=True)))

    assert str(error.value) == (
        f"{MMPOSE} (layer_wise) does not know the layers of resnet18\n"
        "  it knows those of ViT, BEiT and MAE; import without --model"
    )


@pytest.mark.slow
def test_the_way_that_the_error_names_leads_there(write):
    """mmengine itself writes the whole config, with what the base freezes, and that is imported."""
    peer("mmengine")
    write("base.py", DETECTOR.replace("len(classes)", "80"))
    file = write(
        "c.py",
        "_base_ = './base.py'\noptim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.))\n"
        "model = dict(backbone=dict(frozen_stages=2))\n",
    )
    with pytest.raises(PlanError) as error:
        mmengine.read(file)
    command = error.value.problems[0].notes[-1].removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-W", "ignore", "-c", command], check=True, capture_output=True)

    found = mmengine.read(Path("resolved.py"))

    assert found.notes == ()
    norms = ["_BatchNorm", "_InstanceNorm", "GroupNorm", "LayerNorm"]
    assert list(found.plan.rules) == [
        Rule(match="backbone", stage="..2", frozen=True),
        Rule(match="backbone", role="norm", frozen=True),
        Rule(match="backbone", role="norm", mode="eval"),
        Rule(type=norms, wd_mult=0.0, optional=True),
        Rule(match=".*", lr_mult=1.0),
    ]


# the command ----------------------------------------------------------------------------------------------------------


def test_the_notes_are_comments_of_the_plan(write):
    """In the YAML that is printed; where nothing of it is on the terminal, on stderr."""
    settings = {"decay_rate": 0.7, "num_layers": 6}
    write("c.json", json.dumps({"optim_wrapper": {"constructor": MMDET, "paramwise_cfg": settings}}))
    runner = CliRunner()
    printed = runner.invoke(cli.app, ["import", "mmengine", "c.json"])
    to_file = runner.invoke(cli.app, ["import", "mmengine", "c.json", "--out", "plan.yaml"])
    exact = runner.invoke(cli.app, ["import", "mmengine", "c.json", "--model", "convnext_tiny", "--num-classes", "3"])
    notes = (BLOCKS, DECAY.format("pos_embed, cls_token"), EXACT)

    assert printed.stdout == "".join(f"# {note}\n" for note in notes) + (
        "version: 1\nname: c\nlayer_decay: 0.7\nrules:\n  - {match: '.*', lr_mult: 1}\n"
    )
    assert Path("plan.yaml").read_text(encoding="utf-8") == printed.stdout
    assert (printed.stderr, to_file.stdout) == ("", "")
    assert to_file.stderr == "".join(f"warning: {note}\n" for note in notes)
    assert "weight_decay: all\n" in exact.stdout
    assert "#" not in exact.stdout


MISPLACED = [
    (["timm", "c.json", "--lr", "1"], "Invalid value for --lr: only with finetuning-scheduler"),
    (["mmengine", "c.json", "--monitor", "loss"], "Invalid value for --monitor: only with finetuning-scheduler"),
    (["timm", "c.json", "--patience", "2"], "Invalid value for --patience: only with finetuning-scheduler"),
    (["timm", "c.json", "--model", "resnet18"], "Invalid value for --model: only with mmengine"),
    (["mmengine", "c.json", "--num-classes", "3"], "Invalid value for --num-classes: only with --model"),
    (["mmengine", "c.json", "--model-arg", "a=1"], "Invalid value for --model-arg: only with --model"),
    (["finetuning-scheduler", "c.json", "--lr", "0"], "Invalid value for --lr: a number above 0"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISPLACED)
def test_options_that_belong_elsewhere(write, monkeypatch, arguments, sentence):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    found = CliRunner().invoke(cli.app, ["import", *arguments])

    assert found.exit_code == 2
    assert sentence in found.stderr
