"""Colour to grey: a model of three channels takes images of one, and the layer that sees them learns first.

``python examples/grey.py`` trains on drawn stripes. The first convolution's kernels are summed over the channels, as
timm does under ``create_model(..., pretrained=True, in_chans=1)``, so a grey image gives what it gave in colour. For
another model call ``to_grey`` with a pretrained one and its name in timm; the plan fits any.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import adapt_input_conv

from freezeplan import apply_plan

PLAN = Path(__file__).with_name("grey_images.yaml")


def to_grey(colour: torch.nn.Module, name: str, classes: int) -> torch.nn.Module:
    """Return the model for one channel with the weights of one for three, and a new classifier."""
    grey = timm.create_model(name, in_chans=1, num_classes=classes)
    first = f"{grey.pretrained_cfg['first_conv']}.weight"
    head = {f"{grey.pretrained_cfg['classifier']}.{part}" for part in ("weight", "bias")}
    state = {key: tensor for key, tensor in colour.state_dict().items() if key not in head}
    state[first] = adapt_input_conv(1, state[first])
    grey.load_state_dict({**grey.state_dict(), **state})
    return grey


def stripes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw upright and lying stripes in noise: images (count, 1, 64, 64) and labels."""
    labels = torch.arange(count) % 2
    wave = torch.sin(torch.arange(64) * 0.8).expand(64, 64)
    images = torch.stack([wave if label else wave.T for label in labels])[:, None]
    return images + 0.5 * torch.randn_like(images), labels


def main() -> None:
    """Show that both models agree on grey, then train."""
    torch.manual_seed(0)
    colour = timm.create_model("test_resnet")
    model = to_grey(colour, "test_resnet", classes=2)
    images, labels = stripes(32)
    with torch.no_grad():
        pairs = colour.eval().forward_features(images.expand(-1, 3, -1, -1)), model.eval().forward_features(images)
    print(f"features of a grey image differ by at most {(pairs[0] - pairs[1]).abs().max():.0e}")

    applied = apply_plan(model, PLAN, lr=1e-2)
    print(applied)
    optimizer = torch.optim.AdamW(applied, weight_decay=0.05)
    applied.seal()
    model.train()
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(applied.verify())


if __name__ == "__main__":
    main()
