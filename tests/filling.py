"""Features of the same images under the same model, computed by whichever process is asked to."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from freezeplan import apply_plan
from freezeplan.cache import fill
from freezeplan.cache.memory import Keep
from freezeplan.model import create_model

IMAGES, SHARD = 60, 4


def fill_folder(where: Path, keep: Keep = "auto") -> tuple[int, torch.Tensor]:
    """Return how many images were computed, and the features of all."""
    fill.SHARD_BYTES = SHARD * 64 * 64 * 3 * 4
    torch.manual_seed(0)
    torch.set_num_threads(1)
    live = apply_plan(create_model("resnet18", num_classes=3), "linear_probe", lr=0.1)
    data = TensorDataset(torch.randn(IMAGES, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    features, _ = live.cached(data, where, batch_size=SHARD, keep=keep)
    return features.computed, features.batch(range(IMAGES))


def tell(sender: Connection, where: Path, keep: Keep = "auto") -> None:
    """Do it, say that it begins, and send what came of it; for another process."""
    sender.send("ready")
    computed, features = fill_folder(where, keep)
    sender.send((computed, features.numpy()))
