"""An epoch of a linear probe under Lightning's Trainer: its BackboneFinetuning, finetuning-scheduler, and a plan.

``python benchmarks/peers.py --model resnet18``. Each side trains epochs of the same random images with SGD on the head;
the first epoch is not counted. Printed is the time of an epoch, all sides in turns.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from finetuning_scheduler import FinetuningScheduler
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from timing import show
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import applied, apply_plan
from freezeplan.integrations.lightning import FreezePlanCallback, configure_optimizers
from freezeplan.model.describer import create_model


class Probe(pl.LightningModule):
    """A timm model whose head learns, frozen by whoever is asked."""

    def __init__(self, model: nn.Module, way: str):
        super().__init__()
        self.backbone = model
        self.way = way
        self.run = model
        self.head = model.get_classifier()

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the loss of images, (N, 3, S, S), or of their features, and labels, (N,)."""
        return nn.functional.cross_entropy(self.run(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD."""
        live = applied(self.backbone)
        if live is not None:
            return configure_optimizers(live, torch.optim.SGD(live, momentum=0.9))
        return torch.optim.SGD([p for p in self.head.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)


class Body(BackboneFinetuning):
    """Freezes all but the head, which timm's models hold inside."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        """Freeze."""
        self.freeze([part for part in pl_module.backbone.children() if part is not pl_module.head], train_bn=False)

    def finetune_function(self, *_: Any) -> None:
        """Never thaw."""


class Clock(Callback):
    """Seconds of each epoch but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start."""
        self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop."""
        if trainer.current_epoch > 0:
            self.seconds.append(time.perf_counter() - self.begun)


def main() -> None:
    """Train all sides in turns, two epochs a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = given.image_size
    data = TensorDataset(torch.randn(given.images, 3, size, size), torch.randint(0, 10, (given.images,)))

    def epoch(way: str, folder: str) -> float:
        module = Probe(create_model(given.model, num_classes=10), way)
        clock, callbacks, used = Clock(), [], data
        if way.startswith("plan"):
            live = apply_plan(module.backbone, "linear_probe", lr=1e-3)
            callbacks = [FreezePlanCallback()]
            if way == "plan, kept features":
                used, module.run = live.cached(data, Path(folder, "features"))
        elif way == "BackboneFinetuning":
            callbacks = [Body()]
        elif way == "finetuning-scheduler":
            head = [name for name, p in module.named_parameters() if any(p is own for own in module.head.parameters())]
            schedule = Path(folder, "schedule.yaml")
            lines = "".join(f"  - {name}\n" for name in head)
            schedule.write_text(f"0:\n  params:\n{lines}", encoding="utf-8")
            callbacks = [FinetuningScheduler(ft_schedule=str(schedule), max_depth=0)]
        trainer = pl.Trainer(
            max_epochs=2, callbacks=[*callbacks, clock], logger=False, enable_checkpointing=way.startswith("fine"),
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, DataLoader(used, batch_size=16))
        return min(clock.seconds)

    ways = ("BackboneFinetuning", "finetuning-scheduler", "plan", "plan, kept features")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                seconds[way].append(epoch(way, folder))
    title = f"A second epoch under Lightning: {given.model}, {given.images} images of {size} pixels"
    show(f"{title}, {torch.get_num_threads()} threads", seconds, ways[0], given.json)


if __name__ == "__main__":
    main()
