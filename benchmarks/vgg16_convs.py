"""VGG16's convolutions alone: a second model for ``benchmarks/suggest.py``, from a file without the other layers.

``python benchmarks/suggest.py DATA... --model vgg16_convs:pooled --weights vgg16_convs.npy``
"""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

from freezeplan.training.pixels import MEAN, STD
from freezeplan.voc_vgg16.npy import read_npy


class Pooled(nn.Module):
    """VGG16's convolutions, averaged over positions, and a linear layer."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = timm.create_model("vgg16", features_only=True, out_indices=[5])
        self.backbone.pretrained_cfg = {**self.backbone.pretrained_cfg, "mean": MEAN, "std": STD}
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, 3, S, S)."""
        logits: Tensor = self.head(self.backbone(images)[-1].mean((2, 3)))
        return logits


def pooled(num_classes: int = 1000) -> nn.Module:
    """Return the model; its input is RGB from 0 to 255 less the mean."""
    return Pooled(num_classes)


def written(npy: Path, folder: Path) -> Path:
    """Write the convolutions of a file like ``vgg16.npy`` under the names of ``Pooled``; return the new file."""
    state = {
        f"backbone.{name.replace('.', '_', 1)}": tensor
        for name, tensor in read_npy(npy).items()
        if name.startswith("features.")
    }
    path = folder / f"{npy.stem}.safetensors"
    save_file(state, path)
    return path
