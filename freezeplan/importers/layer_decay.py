"""Layer-wise decay as OpenMMLab's optimizer constructors compute it: a tensor's layer by its name, and its factor.

Sources: ``LearningRateDecayOptimizerConstructor`` of mmdetection 3.3 and mmsegmentation 1.2 (``mmdet|mmseg/engine/
optimizers/layer_decay_optimizer_constructor.py``), ``LayerDecayOptimizerConstructor`` of mmsegmentation,
``LayerDecayOptimWrapperConstructor`` of mmpose 1.3 (``mmpose/engine/optim_wrappers/layer_decay_optim_wrapper.py``) and
``LearningRateDecayOptimWrapperConstructor`` of mmpretrain 1.2 with its backbones' ``get_layer_depth``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from freezeplan.errors import PlanError
from freezeplan.model.description import Description

MMPRETRAIN = "LearningRateDecayOptimWrapperConstructor"
READS = {
    "LearningRateDecayOptimizerConstructor": ("decay_rate", "num_layers", "decay_type"),
    "LayerDecayOptimizerConstructor": ("layer_decay_rate", "num_layers"),
    "LayerDecayOptimWrapperConstructor": ("layer_decay_rate", "num_layers"),
    MMPRETRAIN: ("layer_decay_rate", "custom_keys", "norm_decay_mult", "bias_decay_mult", "flat_decay_mult"),
}
"""Constructor -> the keys of ``paramwise_cfg`` that it reads; the first is the rate."""

_BACKBONE = re.compile(r"(?:.*\.)?backbone\.(?:timm_model\.)?")
_OF_STAGE = re.compile(r"(?:stages|layers)[._](\d+)\.(?:blocks\.)?(\d+)\.")
_DOWNSAMPLE = re.compile(r"(?:downsample_layers\.(\d+)|(?:stages|layers)[._](\d+)\.downsample)\.")
_OF_LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.(?!blocks\.)")


@dataclass(frozen=True)
class LayerDecay:
    """The settings of such a constructor."""

    constructor: str
    rate: float
    num_layers: int | None = None
    """Layers of the backbone between its stem and what is outside it; None: as the backbone has them."""
    decay_type: str = "layer_wise"

    def factors(self, model: Description) -> dict[str, float]:
        """Return the factor of the learning rate of each tensor.

        The names may be OpenMMLab's (``backbone.layers.0``) or timm's (``backbone.blocks.0``), with the backbone inside
        another module or alone, its classifier then being what is outside it.

        Raises:
            PlanError: If the constructor does not know the layers of this backbone.

        Examples:
            >>> from freezeplan.model import create_model, describe
            >>> vit = describe(create_model("test_vit", meta=True))
            >>> found = LayerDecay("LearningRateDecayOptimWrapperConstructor", 0.5).factors(vit)
            >>> found["pos_embed"], found["blocks.0.norm1.weight"], found["norm.weight"]
            (0.0078125, 0.015625, 1.0)
        """
        inside = self._inside(model)
        family = _family(inside.values())
        known = _KNOWN.get(self.constructor, ["convnext"] if self.decay_type == "stage_wise" else ["convnext", "vit"])
        if family not in known:
            raise PlanError(
                f"{self.constructor} ({self.decay_type}) does not know the layers of {model.model}",
                notes=[f"it knows those of {', '.join(_FAMILIES[name] for name in known)}; import without --model"],
            )
        depths = _depths(inside.values())
        number = self.num_layers or (len(depths) if family == "vit" else sum(depths.values()))
        if family == "convnext":
            number = self.num_layers or (12 if depths[max(depths) - 1] > 9 else 6)
        last = number + 1
        found = {}
        for tensor in model.tensors:
            name = inside.get(tensor.name)
            layer = last if name is None else self._layer(name, family, depths, number)
            found[tensor.name] = self.rate ** (last - layer)
        return found

    def _inside(self, model: Description) -> dict[str, str]:
        """Tensor -> its name inside the backbone; without those outside."""
        found = {t.name: t.name[m.end() :] for t in model.tensors if (m := _BACKBONE.match(t.name))}
        head = model.roles.get("head", frozenset())
        return found or {t.name: t.name for t in model.tensors if t.name not in head}

    def _layer(self, name: str, family: str, depths: Mapping[int, int], number: int) -> int:
        """The layer: 0 the stem, ``number + 1`` what the constructor puts outside the backbone."""
        block, downsample = _OF_STAGE.match(name), _DOWNSAMPLE.match(name)
        if family == "vit":
            layer = _OF_LAYER.match(name)
            stem = name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed")
            return 0 if stem else int(layer[1]) + 1 if layer else number + 1
        if family == "swin":
            if downsample:  # timm's stands ahead of the stage that it is named in, OpenMMLab's behind
                stage = int(downsample[2])
                return sum(depths[i] for i in range(stage + name.startswith("stages")))
            if block:
                return sum(depths[i] for i in range(int(block[1]))) + int(block[2]) + 1
            return 0 if name.startswith("patch_embed") else number + 1
        if self.decay_type == "stage_wise":
            first = downsample or name.startswith("stem")
            return 0 if first else int(block[1]) + 1 if block else number + 1
        if name.startswith("stem"):
            return 0
        if downsample:
            return (0, 2, 3, number)[int(downsample[1] or downsample[2])]
        if block:
            return (1, 2, 3 + int(block[2]) // 3, number)[int(block[1])]
        return number + 1


_KNOWN = {
    "LayerDecayOptimizerConstructor": ["vit"],
    "LayerDecayOptimWrapperConstructor": ["vit"],
    MMPRETRAIN: ["convnext", "vit", "swin"],
}
"""Constructor -> the backbones whose layers it knows."""
_FAMILIES = {"convnext": "ConvNeXt", "vit": "ViT, BEiT and MAE", "swin": "Swin"}


def _family(names: Collection[str]) -> str:
    text = "\n".join(names)
    if re.search(r"^(?:stages|layers)[._]\d+\.blocks\..*relative_position_bias_table", text, re.MULTILINE):
        return "swin"
    if re.search(r"^stages[._]\d+\.(?:blocks\.)?\d+\.(?:conv_dw|depthwise_conv)\.", text, re.MULTILINE):
        return "convnext"
    if re.search(r"^(?:layers|blocks)\.\d+\.attn\.", text, re.MULTILINE) and "patch_embed." in text:
        return "vit"
    return ""


def _depths(names: Collection[str]) -> dict[int, int]:
    """Blocks of each stage; of a ViT every layer is one."""
    found: dict[int, int] = {}
    for name in names:
        block, layer = _OF_STAGE.match(name), _OF_LAYER.match(name)
        if block:
            found[int(block[1])] = max(found.get(int(block[1]), 0), int(block[2]) + 1)
        elif layer:
            found.setdefault(int(layer[1]), 1)
    return found
