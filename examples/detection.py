"""Classification to detection: torchvision's Faster R-CNN on a backbone of timm, whose first stages are frozen.

``python examples/detection.py`` trains some steps on drawn shapes with boxes, ``--data FOLDER_OR_TAR`` on photos with
boxes in VOC's layout; ``--weights FILE`` gives the backbone pretrained weights of timm's ``tf_efficientnet_lite0``. The
plan is ``examples/frozen_stages.yaml``: written with ``match``, since roles are timm's and a detector is not one of its
models.
"""

from __future__ import annotations

import argparse
import io
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from freezeplan import apply_plan
from freezeplan.training.voc import Photo, VocData, read_voc
from freezeplan.voc_vgg16.sample import write_sample

PLAN = Path(__file__).with_name("frozen_stages.yaml")
SIZE = 128


class Backbone(nn.Module):
    """Three feature maps of a timm model, through a feature pyramid."""

    def __init__(self, weights: Path | None):
        super().__init__()
        self.body = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
        self.out_channels = 64
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)
        if weights is not None:
            own = self.body.state_dict()
            self.body.load_state_dict({name: tensor for name, tensor in load_file(weights).items() if name in own})

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images, (N, 3, H, W), to maps of 64 channels at 1/8, 1/16 and 1/32 of their size."""
        return self.fpn(OrderedDict(zip("012", self.body(images), strict=True)))


def build(classes: int, weights: Path | None) -> FasterRCNN:
    """Make a small Faster R-CNN; class 0 is the background."""
    return FasterRCNN(
        Backbone(weights),
        num_classes=classes + 1,
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
    )


def read(data: VocData, photo: Photo) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a photo, (3, SIZE, SIZE) from 0 to 1, and its boxes in the pixels of that."""
    with Image.open(io.BytesIO(data.files.read(photo.file))) as picture:
        scale = torch.tensor([SIZE / picture.width, SIZE / picture.height] * 2)
        pixels = np.array(picture.convert("RGB").resize((SIZE, SIZE)))
    boxes = torch.tensor([[box.xmin, box.ymin, box.xmax, box.ymax] for box in photo.objects]) * scale
    labels = torch.tensor([data.classes.index(box.name) + 1 for box in photo.objects])
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255, {"boxes": boxes, "labels": labels}


def read_some(root: Path) -> tuple[int, list[tuple[Tensor, dict[str, Tensor]]]]:
    """Return the number of classes and eight photos with their boxes."""
    data = read_voc(root)
    return len(data.classes), [read(data, photo) for photo in data.train[:8]]


def main() -> None:
    """Train some steps, and prove that the frozen stages held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()

    torch.manual_seed(0)
    if given.data is None:
        with TemporaryDirectory() as folder:
            classes, samples = read_some(write_sample(Path(folder), train=20, val=20))
    else:
        classes, samples = read_some(given.data)
    model = build(classes, given.weights)
    applied = apply_plan(model, PLAN, lr=0.02)
    print(applied)
    optimizer = torch.optim.SGD(applied, momentum=0.9, weight_decay=1e-4)
    applied.seal()

    losses = []
    model.train()
    for step in range(given.steps):
        images, targets = zip(*(samples[row % len(samples)] for row in range(2 * step, 2 * step + 2)), strict=True)
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(applied.trainable_parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of the first three steps {np.mean(losses[:3]):.2f}, of the last three {np.mean(losses[-3:]):.2f}")
    print(applied.verify())


if __name__ == "__main__":
    main()
