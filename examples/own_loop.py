"""A plan in a training loop of your own: two lines, and a proof at the end.

Run it with ``python examples/own_loop.py``; it takes a few seconds on a CPU and downloads nothing: the images are
random noise and the weights too, so only the mechanics are real.
"""

from __future__ import annotations

import timm
import torch

from freezeplan import apply_plan


def main() -> None:
    """Train the classifier of a small ResNet for three epochs; everything else stands still."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    images, labels = torch.randn(64, 3, 64, 64), torch.randint(0, 4, (64,))

    applied = apply_plan(model, "linear_probe", lr=1e-2)  # a preset; a path or a dict works too
    optimizer = torch.optim.AdamW(applied, weight_decay=0.05)  # it iterates over its groups

    applied.seal()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for epoch in range(3):
        model.train()  # what is frozen stays in eval
        for batch in torch.arange(64).split(16):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(applied.trainable_parameters(), 1.0)
            optimizer.step()
        scheduler.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    print(applied)
    print(applied.verify())


if __name__ == "__main__":
    main()
