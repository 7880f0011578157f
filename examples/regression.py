"""Classification to regression: where on the image is the disc? Two numbers instead of classes.

``python examples/regression.py`` draws the discs itself. timm's ``num_classes`` is the number of outputs, whatever they
mean, so the head of a regression has the role ``head``. The answer needs places, which an average over the image would
forget: VGG's head reads the flattened map. The model is the slim VGG16 of the sample that freezeplan ships, with the
weights that come with it, which have seen drawn textures and no discs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from freezeplan import apply_plan
from freezeplan.voc_vgg16.sample import weights_path
from freezeplan.voc_vgg16.weights import build

PLAN = Path(__file__).with_name("regression.yaml")


def discs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a disc an image: images (count, 3, 64, 64), and its middle (count, 2) as fractions of the side."""
    centres = 0.2 + 0.6 * torch.rand(count, 2)
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    away = (x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2
    images = (away < 0.15**2).float()[:, None].expand(-1, 3, -1, -1)
    return images + 0.1 * torch.randn(count, 3, 64, 64), centres


def main() -> None:
    """Train, and compare with always answering the middle."""
    torch.manual_seed(0)
    model = build("vgg16_slim_fc256", classes=2, image_size=64, weights=weights_path(), seed=0)
    images, centres = discs(256)
    seen, unseen = slice(0, 192), slice(192, 256)

    applied = apply_plan(model, PLAN, lr=1e-3)
    print(applied)
    optimizer = torch.optim.AdamW(applied, weight_decay=0.01)
    applied.seal()
    for _ in range(20):
        model.train()
        for rows in torch.randperm(192).split(32):
            loss = nn.functional.mse_loss(model(images[rows]), centres[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        error = (model.eval()(images[unseen]) - centres[unseen]).norm(dim=1).mean()
    middle = (centres[seen].mean(0) - centres[unseen]).norm(dim=1).mean()
    print(f"distance to the disc's middle {error:.3f} of the side, by always answering the mean {middle:.3f}")
    print(applied.verify())


if __name__ == "__main__":
    main()
