"""Reading kept features in random order: freezeplan's shards against other ways to keep them.

``python benchmarks/formats.py``. VGG16's features of 2,000 images (25,088 float32 each, 201 MB), batches of 32, page
cache warm for all. ``tensor in memory`` is the limit.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import alternate, show
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from freezeplan import apply_plan


class Toy(nn.Module):
    """A frozen part that gives what VGG16's convolutions give, without their arithmetic."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, 2), of images, (N, 1, 1, width)."""
        return self.head(self.body(images).flatten(1))


def main() -> None:
    """Time an epoch of reading, all ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--width", type=int, default=25088)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    images = torch.randn(given.images, 1, 1, given.width)
    rules = [{"match": "body", "frozen": True}, {"match": "head", "lr_mult": 1}]
    live = apply_plan(Toy(given.width), {"version": 1, "rules": rules})
    with tempfile.TemporaryDirectory() as folder:
        features, _ = live.cached(TensorDataset(images), Path(folder, "cache"))
        memory = features.batch(torch.arange(given.images))
        np.save(Path(folder, "all.npy"), memory.numpy())
        mapped = np.load(Path(folder, "all.npy"), mmap_mode="r")
        for row in range(given.images):
            torch.save(memory[row].clone(), Path(folder, f"{row}.pt"))

        def single(rows: Tensor) -> Tensor:
            return torch.stack([torch.load(Path(folder, f"{row}.pt"), weights_only=True) for row in rows.tolist()])

        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "tensor in memory": lambda rows: memory[rows],
            "freezeplan's shards": features.batch,
            "one .npy, memory-mapped": lambda rows: torch.from_numpy(mapped[rows.numpy()]),
            "one .pt an image": single,
        }
        order = torch.randperm(given.images)

        def epoch(read: Callable[[Tensor], Tensor]) -> Callable[[], None]:
            def run() -> None:
                for rows in order.split(32):
                    read(rows)

            return run

        seconds = alternate({way: epoch(read) for way, read in ways.items()}, given.rounds)
    size = memory.numel() * memory.element_size() / 1e6
    show(f"Reading {given.images} features, {size:.0f} MB", seconds, "one .pt an image", given.json)


if __name__ == "__main__":
    main()
