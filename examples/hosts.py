"""Real models that contain timm models, and the presets that fit them.

``pip install '.[hosts]'``, then ``python examples/hosts.py`` prints the table of docs/your_own_model.md: each model
with its parts, and how many presets resolve on it. ``python examples/hosts.py --why`` adds what the others say. All
weights are random, nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import freezeplan
from freezeplan import resolve_plan
from freezeplan.errors import FreezePlanError

PRESETS = sorted(path.stem for path in Path(freezeplan.__file__).with_name("presets").glob("*.yaml"))


@dataclass(frozen=True)
class Host:
    """A model that contains timm models."""

    build: Callable[[], nn.Module]
    """Makes it, with random weights."""
    size: int = 64
    """Height and width of its images, in pixels."""
    call: Callable[[nn.Module, Tensor], Any] | None = None
    """Calls it on a batch of images, (N, 3, size, size); None: it takes the batch and nothing else."""


def smp(architecture: str, encoder: str) -> nn.Module:
    """Return a model of segmentation_models_pytorch."""
    import segmentation_models_pytorch

    build = getattr(segmentation_models_pytorch, architecture)
    model: nn.Module = build(encoder, encoder_weights=None, classes=3)
    return model


def clip(kind: str) -> nn.Module:
    """Return a model of open_clip with a timm tower."""
    import open_clip.model

    image = {
        "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
        "image_size": 160,
    }  # fmt: skip
    text = {"context_length": 16, "vocab_size": 500, "width": 64, "heads": 2, "layers": 2}
    model: nn.Module = getattr(open_clip.model, kind)(64, image, text)
    return model


def read_pair(model: nn.Module, images: Tensor) -> Any:
    """Call a model on images and texts."""
    return model(images, torch.ones(len(images), 16, dtype=torch.long))


def wrapper() -> nn.Module:
    """Return transformers' classifier around a timm model."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3))


def on_timm_backbone(family: str, task: str, **settings: Any) -> nn.Module:
    """Return a model of transformers on a TimmBackbone."""
    import transformers

    backbone = transformers.TimmBackboneConfig(
        backbone="resnet18", out_indices=(1, 2, 3, 4), use_pretrained_backbone=False
    )
    config = getattr(transformers, f"{family}Config")(backbone_config=backbone, num_labels=3, **settings)
    model: nn.Module = getattr(transformers, f"{family}{task}")(config)
    return model


def detector() -> nn.Module:
    """Return torchvision's Faster R-CNN on a timm backbone with a feature pyramid."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4))
            self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels=32)
            self.out_channels = 32

        def forward(self, images: Tensor) -> Any:
            return self.pyramid({str(at): level for at, level in enumerate(self.body(images))})

    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
    return FasterRCNN(Backbone(), num_classes=3, min_size=64, max_size=64, rpn_anchor_generator=anchors)


def find_boxes(model: nn.Module, images: Tensor) -> Any:
    """Call a detector of torchvision: in train mode with a box an image."""
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    return model(list(images), [box for _ in images]) if model.training else model(list(images))


def lora() -> nn.Module:
    """Return a timm ViT with LoRA and a trained head, by PEFT."""
    from peft import LoraConfig, get_peft_model

    vit = timm.create_model("test_vit", num_classes=3)
    return get_peft_model(vit, LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))


def two_heads() -> nn.Module:
    """Return a Lightning module with one backbone and two heads."""
    import lightning

    class TwoHeads(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("test_resnet", num_classes=0)
            self.kind = nn.Linear(self.backbone.num_features, 5)
            self.quality = nn.Linear(self.backbone.num_features, 1)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            features = self.backbone(images)
            return self.kind(features), self.quality(features)

    return TwoHeads()


class Siamese(nn.Module):
    """One backbone for both images of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.same = nn.Linear(self.backbone.num_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return whether an image and its mirror image are the same, (N, 1)."""
        answer: Tensor = self.same((self.backbone(images) - self.backbone(images.flip(-1))).abs())
        return answer


class Towers(nn.Module):
    """A backbone each for photos and sketches."""

    def __init__(self) -> None:
        super().__init__()
        self.photo = timm.create_model("test_convnext", num_classes=0)
        self.sketch = timm.create_model("test_resnet", num_classes=0)
        self.join = nn.Linear(self.photo.num_features + self.sketch.num_features, 16)

    def forward(self, images: Tensor) -> Tensor:
        """Return one vector an image, (N, 16)."""
        sketches = images.mean(1, keepdim=True).expand(images.shape)
        answer: Tensor = self.join(torch.cat([self.photo(images), self.sketch(sketches)], 1))
        return answer


class Distilled(nn.Module):
    """A student that learns the answers of a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = timm.create_model("test_resnet", num_classes=3)
        self.student = timm.create_model("test_convnext", num_classes=3)

    def forward(self, images: Tensor) -> Tensor:
        """Return by how much both differ, (N, 3)."""
        answer: Tensor = self.student(images) - self.teacher(images)
        return answer


class MAE(VisionTransformer):
    """A ViT of one's own, with a decoder."""

    def __init__(self) -> None:
        super().__init__(img_size=64, embed_dim=64, depth=4, num_heads=2, num_classes=0)
        self.decoder = nn.Linear(64, 768)

    def forward(self, images: Tensor) -> Tensor:
        """Return pixels of every patch, (N, tokens, 768)."""
        answer: Tensor = self.decoder(self.forward_features(images))
        return answer


class OwnMatcher(nn.Module):
    """A model of one's own with the method by which timm's models name their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.stages = nn.Sequential(*(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3)))
        self.fc = nn.Linear(8, 3)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the names of the stem and of the layers."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """Return scores, (N, 3)."""
        answer: Tensor = self.fc(self.stages(self.stem(images).relu()).mean((2, 3)))
        return answer


def compiled() -> nn.Module:
    """Return a compiled backbone with a classifier behind it."""
    backbone = timm.create_model("test_resnet", num_classes=0)
    return nn.Sequential(torch.compile(backbone, backend="eager"), nn.Linear(backbone.num_features, 3))


SMALL_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
}  # fmt: skip
SMALL_MASKS = {
    "hidden_size": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2, "num_queries": 5,
}  # fmt: skip
SMALL_UPER = {"hidden_size": 32, "use_auxiliary_head": False, "pool_scales": [1, 2]}

HOSTS = {
    "segmentation_models_pytorch Unet, tu-resnet18": Host(lambda: smp("Unet", "tu-resnet18")),
    "segmentation_models_pytorch Unet, tu-convnext_atto": Host(lambda: smp("Unet", "tu-convnext_atto")),
    "segmentation_models_pytorch DPT, tu-vit_tiny_patch16_224": Host(
        lambda: smp("DPT", "tu-vit_tiny_patch16_224"), 224
    ),
    "open_clip CLIP": Host(lambda: clip("CLIP"), 160, read_pair),
    "open_clip CustomTextCLIP": Host(lambda: clip("CustomTextCLIP"), 160, read_pair),
    "transformers TimmWrapperForImageClassification": Host(wrapper),
    "transformers UperNet on TimmBackbone": Host(
        lambda: on_timm_backbone("UperNet", "ForSemanticSegmentation", **SMALL_UPER)
    ),
    "transformers Mask2Former on TimmBackbone": Host(
        lambda: on_timm_backbone("Mask2Former", "ForUniversalSegmentation", **SMALL_MASKS)
    ),
    "transformers DETR on TimmBackbone": Host(lambda: on_timm_backbone("Detr", "ForObjectDetection", **SMALL_DETR)),
    "torchvision FasterRCNN, features_only": Host(detector, 64, find_boxes),
    "PEFT LoRA on a ViT": Host(lora, 160),
    "Lightning module with two heads": Host(two_heads),
    "siamese": Host(Siamese),
    "two towers": Host(Towers),
    "teacher and student": Host(Distilled),
    "class MAE(VisionTransformer)": Host(MAE),
    "own group_matcher": Host(OwnMatcher),
    "torch.compile inside": Host(compiled),
}


def refused(model: nn.Module) -> dict[str, str]:
    """Return the presets that do not fit a model, each with what it says."""
    found = {}
    for preset in PRESETS:
        try:
            resolve_plan(preset, model)
        except FreezePlanError as error:
            found[preset] = str(error)
    return found


def row(name: str, model: nn.Module, others: dict[str, str]) -> str:
    """Return a model's row of the table, in Markdown.

    Args:
        name: Of the host.
        model: It.
        others: What ``refused`` returned.
    """
    parts = resolve_plan("full", model).subject.partition(" (")[2].removesuffix(")") or "the model itself"
    return f"| {name} | {parts} | {len(PRESETS) - len(others)} of {len(PRESETS)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--why", action="store_true", help="say why a preset does not fit")
    why = parser.parse_args().why
    print("| model | its parts | presets that fit |")
    print("|---|---|---|")
    for name, host in HOSTS.items():
        model = host.build()
        others = refused(model)
        print(row(name, model, others))
        for preset, error in others.items() if why else ():
            print(f"  {preset}: {error}")


if __name__ == "__main__":
    main()
