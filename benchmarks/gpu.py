"""What freezing gains on a GPU: full and frozen training, cached features, the head alone, four arms at VOC's size.

    python benchmarks/gpu.py --json gpu.json

One process, at most four minutes on one H100 or H200. VGG16 with the experiment's head, random weights and images.
Nothing is downloaded. Without a GPU, ``--smoke`` runs all of it on small images and a small model, to test the script.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezeplan.training.optimizers import make_optimizer
from freezeplan.training.settings import Settings
from freezeplan.training.train import Run, train_arm
from freezeplan.training.voc import Split
from freezeplan.voc_vgg16.arms import ARMS, load_arms
from freezeplan.voc_vgg16.weights import build

VOC = (5_717, 5_823)
"""Training and validation images of PASCAL VOC 2012."""
EPOCHS = 20
GOALS = {
    "cached epoch / head alone in memory": (1.3, "at most"),
    "plain frozen epoch in bf16 / cached epoch": (10.0, "at least"),
    "feature pass, share of the bare forward": (0.85, "at least"),
    "four arms at VOC's size in bf16, minutes": (4.0, "at most"),
}


class Quiet:
    """A progress that nobody reads."""

    def batch(self, images: int, loss: Tensor) -> None:
        """Do nothing."""

    def kept(self, done: int, images: int) -> None:
        """Do nothing."""

    def epoch(self, epoch: Any) -> None:
        """Do nothing."""


def split(count: int, size: int, classes: int, device: torch.device) -> Split:
    """Return random images, uint8, on the device."""
    random = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=random)
    labels = torch.arange(count) % classes
    by_rule = {"largest": labels, "first": labels}
    return Split(images, by_rule, F.one_hot(labels, classes), "largest").to(device)


@contextmanager
def tf32(on: bool):
    """Let float32 products be TF32 or not, as ``torch.set_float32_matmul_precision`` says it, and cuDNN's too."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = on
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run, with all that the device was told."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The experiment's model and images, and ways of training on them."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = torch.device(arguments.device)
        self.settings = Settings(
            epochs=arguments.epochs, batch_size=arguments.batch_size, image_size=arguments.image_size, lr=1e-5,
            device=arguments.device, threads=torch.get_num_threads(),
        )  # fmt: skip
        self.start = build(
            arguments.model, classes=20, image_size=arguments.image_size, weights="random", seed=0
        )  # fmt: skip
        images = split(arguments.images, arguments.image_size, 20, self.device)
        self.data = images, split(arguments.images, arguments.image_size, 20, self.device)
        self.plans = load_arms(ARMS)

    def train(self, arm: str, **changes: Any) -> Run:
        """Train an arm from the same start."""
        model = copy.deepcopy(self.start).to(self.device)
        settings = replace(self.settings, **changes)
        return train_arm(model, self.plans[arm], self.data, settings, seed=0, progress=Quiet())

    def autocast(self, amp: str | None) -> torch.autocast:
        """As the runner does it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=amp == "bf16", cache_enabled=False)

    def forward(self, amp: str | None) -> float:
        """Seconds of the bare forward of the frozen part over all training images, which lie there as floats."""
        model = copy.deepcopy(self.start).to(self.device).eval().to(memory_format=torch.channels_last)
        part = model.features if hasattr(model, "features") else model
        size = self.settings.batch_size
        batch = self.data[0].images[:size].float().contiguous(memory_format=torch.channels_last)
        steps = -(-len(self.data[0].images) // size)

        def run() -> None:
            with torch.no_grad(), self.autocast(amp):
                for _ in range(steps):
                    part(batch)

        run()
        return min(timed(run, self.device) for _ in range(3))

    def head_alone(self, elements: int, amp: str | None) -> float:
        """Seconds of an epoch of the head on features that lie on the device: the limit of any cache."""
        count, size = len(self.data[0].images), self.settings.batch_size
        head = nn.Sequential(nn.Linear(elements, 256), nn.ReLU(), nn.Linear(256, 20)).to(self.device)
        optimizer = make_optimizer(self.settings.optimizer, [{"params": list(head.parameters())}], lr=1e-5)
        features, labels = torch.randn(count, elements, device=self.device), self.data[0].labels

        def run() -> None:
            rows = torch.randperm(count).to(self.device)
            with self.autocast(amp):
                for part in rows.split(size):
                    optimizer.zero_grad()
                    F.cross_entropy(head(features.index_select(0, part)), labels[part]).backward()
                    optimizer.step()

        run()
        return min(timed(run, self.device) for _ in range(3))

    def timms_way(self, amp: str | None) -> float:
        """Seconds of an epoch with timm's own means: ``timm.utils.freeze`` and timm's optimizer, a plain loop."""
        model = copy.deepcopy(self.start).to(self.device).to(memory_format=torch.channels_last)
        frozen = [name for name, _ in model.named_children() if name not in ("head", "pre_logits", "fc", "classifier")]
        timm.utils.freeze(model, frozen)
        optimizer = timm.optim.create_optimizer_v2(model, opt="rmsproptf", lr=1e-5)
        train, size = self.data[0], self.settings.batch_size

        def run() -> None:
            model.train()
            for part in torch.randperm(len(train.labels)).to(self.device).split(size):
                with self.autocast(amp):
                    images = train.images[part].float().div(255).contiguous(memory_format=torch.channels_last)
                    loss = F.cross_entropy(model(images), train.labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        run()
        return timed(run, self.device)


def best(run: Run) -> float:
    """Return the seconds of the fastest epoch but the first, which warms up."""
    return min(epoch.train_seconds for epoch in run.epochs[1:])


def at_vocs_size(run: Run, images: int) -> float:
    """Return the seconds of an arm of 20 epochs at VOC's size, from its measured epochs and its pass for features."""
    train = best(run) * VOC[0] / images
    check = min(epoch.eval_seconds for epoch in run.epochs[1:]) * VOC[1] / images
    return EPOCHS * (train + check) + run.features_seconds * sum(VOC) / (2 * images)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything; return seconds and ratios."""
    bench = Bench(arguments)
    images = arguments.images
    seconds: dict[str, float] = {}
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    elements = 0
    with tf32(on=True), tempfile.TemporaryDirectory() as folder:
        for name, amp in (("TF32", None), ("bf16", "bf16")):
            seconds[f"full, {name}"] = best(bench.train("same_lr", cache=False, amp=amp))
            seconds[f"frozen, {name}"] = best(bench.train("frozen_convs", cache=False, amp=amp))
            seconds[f"timm.utils.freeze, {name}"] = bench.timms_way(amp)
            cached = bench.train(
                "frozen_convs", amp=amp, cache_dir=str(Path(folder) / name), epochs=arguments.epochs + 2
            )
            seconds[f"cached, {name}"] = best(cached)
            graphed = bench.train(
                "frozen_convs",
                amp=amp,
                cache_dir=str(Path(folder) / name),
                epochs=arguments.epochs + 2,
                cuda_graph=True,
            )
            seconds[f"cached, CUDA graph, {name}"] = best(graphed)
            notes[f"CUDA graph, {name}"] = graphed.graph_reason or f"{graphed.graphed_steps} steps"
            seconds[f"feature pass, {name}"] = cached.features_seconds / 2  # of one split
            seconds[f"bare forward, {name}"] = bench.forward(amp)
            elements = elements or _elements(bench)
            seconds[f"head alone, {name}"] = bench.head_alone(elements, amp)
        for arm in ARMS:
            runs[arm] = bench.train(arm, amp="bf16", cache_dir=str(Path(folder) / "arms"))
    arms = {arm: at_vocs_size(run, images) for arm, run in runs.items()}
    found = {
        "cached epoch / head alone in memory": seconds["cached, bf16"] / seconds["head alone, bf16"],
        "plain frozen epoch in bf16 / cached epoch": seconds["frozen, bf16"] / seconds["cached, bf16"],
        "feature pass, share of the bare forward": seconds["bare forward, bf16"] / seconds["feature pass, bf16"],
        "four arms at VOC's size in bf16, minutes": sum(arms.values()) / 60,
    }
    return {
        "machine": machine(bench.device),
        "images": images,
        "seconds": seconds,
        "arms": arms,
        "goals": found,
        "notes": notes,
    }


def _elements(bench: Bench) -> int:
    from freezeplan import apply_plan

    live = apply_plan(copy.deepcopy(bench.start).to(bench.device), bench.plans["frozen_convs"], lr=1.0, scheduler="any")
    size = bench.settings.image_size
    return live.prefix(torch.rand(2, 3, size, size, device=bench.device)).elements


def machine(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": card,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
    }


def show(found: dict[str, Any]) -> None:
    """Print seconds of an epoch, ratios, and whether the goals are met."""
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    print(f"seconds for {found['images']:,} images, one epoch or one pass; how many times faster than full, TF32")
    base = found["seconds"]["full, TF32"]
    for name, value in found["seconds"].items():
        print(f"  {name:28}{value:9.3f} s{base / value:9.1f}x")
    print(f"arms of {EPOCHS} epochs at VOC's size, bf16, from measured epochs")
    for arm, value in found["arms"].items():
        print(f"  {arm:28}{value:9.1f} s")
    for name, note in found["notes"].items():
        print(f"{name}: {note}")
    for name, value in found["goals"].items():
        goal, side = GOALS[name]
        met = value <= goal if side == "at most" else value >= goal
        print(f"  {name:46}{value:8.2f}   {side} {goal:g}: {'met' if met else 'MISSED'}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--images", type=int, default=2_048, help="images of each split")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are measured, at least 2")
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="all of it, small, on the CPU")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.images, arguments.image_size, arguments.batch_size = 12, 64, 4
        arguments.model, arguments.device, arguments.epochs = "vgg16_slim_fc256", "cpu", 2
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --smoke tries the script on the CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure(arguments)
    show(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
