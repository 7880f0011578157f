"""One arm: a plan is applied to a model, the model is trained, and its errors are measured. One plain loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from freezeplan import AppliedPlan, Plan, apply_plan
from freezeplan.cache.memory import FeatureDtype
from freezeplan.errors import ModelError
from freezeplan.training.checkpoint import Checkpoint
from freezeplan.training.feed import Feed
from freezeplan.training.feeder import Feeder, explained
from freezeplan.training.graph import GraphedStep
from freezeplan.training.measures import Measured, commonest_error, fraction, measure, predict
from freezeplan.training.optimizers import make_optimizer
from freezeplan.training.pixels import Pixels, draw
from freezeplan.training.processes import Processes
from freezeplan.training.settings import Amp, Settings
from freezeplan.training.shared import Shared
from freezeplan.training.step import TrainStep, no_graph
from freezeplan.training.voc import Split

_NUMBERS: Mapping[Amp | None, tuple[torch.dtype, FeatureDtype]] = {
    None: (torch.bfloat16, "float32"),  # autocast is off
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp16": (torch.float16, "float16"),
}


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    """Mean cross-entropy over the epoch, in train mode, while learning; NaN if it blew up."""
    val_top1_error: float
    """Fraction of validation images whose label is not the first guess."""
    train_seconds: float
    eval_seconds: float


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed."""

    seed: int
    epochs: tuple[Epoch, ...]
    val: Measured
    """After the last epoch."""
    train_error: float
    """Top-1 error on the training images, in eval mode, after the last epoch."""
    learned: bool
    """Whether ``train_error`` is below the error of always naming the commonest training class."""
    seconds: float
    """Training and validation, all epochs, and computing features."""
    features: int = 0
    """Images, of both splits, that were trained and validated on by kept features; 0 where the images were."""
    features_computed: int = 0
    """How many of those features were computed for this run and not found on disk."""
    features_seconds: float = 0.0
    """That this took."""
    features_epochs: int = 0
    """Epochs that were trained on features."""
    features_difference: float = 0.0
    """By how much the features differ from those of a plain step, relative to the largest; measured."""
    graphed_steps: int = 0
    """Steps that were launched as a CUDA graph."""
    graph_reason: str = ""
    """Why others were not; empty where nobody asked for graphs, or where all but the first of a size were."""
    predicted: tuple[int, ...] = ()
    """Index of the class that each validation image was taken for, after the last epoch."""


class Progress(Protocol):
    """Who is told how an arm is getting on."""

    def batch(self, images: int, loss: Tensor) -> None:
        """Take note of a step over ``images`` images; reading ``loss`` waits for the device, so do it seldom."""

    def epoch(self, epoch: Epoch) -> None:
        """Take note of a finished epoch."""

    def kept(self, done: int, images: int) -> None:
        """Take note of the images of a split, ``done`` of ``images``, whose features are there."""


def train_arm(
    model: nn.Module,
    plan: Plan,
    data: tuple[Split, Split],
    settings: Settings,
    *,
    seed: int,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    until: int | None = None,
    shared: Shared | None = None,
    precision: bool = False,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> Run:
    """Train one arm and measure it.

    Softmax cross-entropy, constant rate. Every arm of a seed sees the same images, moved alike, in the same order. A
    loss that is not finite does not stop the run; its errors show what it has come to. Phases begin with an epoch; one
    that waits for a plateau can wait for ``train_loss``, ``val_loss`` and ``val_top1_error``.

    The model is changed in place: the plan stays applied and the weights are trained ones. Torch's global random state
    is the caller's again afterwards.

    Args:
        model: A timm model with a class for each class of the data, on the device of ``data``.
        plan: What is frozen and what learns how fast.
        data: Training and validation split, on the device.
        settings: Everything else.
        seed: Decides shuffling, ``reinit``, dropout.
        progress: Is told of every step and epoch.
        checkpoint: Where the state after each epoch is kept, and found again: on the CPU a run that was stopped at
            any moment and goes on gives the same bits as one that was not.
        until: Epoch to stop after; with a checkpoint the run can go on from there. None: the last one.
        shared: What earlier runs left, on the same images; and what this one leaves.
        precision: Whether the average precision of each class is measured too.
        processes: Those that share each batch, by DistributedDataParallel. A model without batch norm learns what one
            process would teach it, up to the order of summation; statistics of batch norm are of each process's share,
            and averaged before validation.

    Returns:
        The arm's figures.

    Raises:
        PlanError: If the plan does not fit the model.
        ModelError: If the model cannot be trained on batches of this size: too large for the device's memory, or a
            single image where a norm layer needs several, or fewer images than processes.
    """
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None and "run" in saved:
        return TypeAdapter(Run).validate_python(saved["run"])
    train, val = data
    last = settings.epochs if until is None else until
    _check_shares(data, settings, processes)
    device = train.images.device
    devices = [device] if device.type == "cuda" else []
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=devices), _autocast(settings, device):
        torch.manual_seed(seed)
        applied = apply_plan(model, plan, lr=settings.lr, scheduler="any", epochs=settings.epochs)
        torch.manual_seed(seed)
        optimizer = make_optimizer(settings.optimizer, applied.param_groups, lr=settings.lr)
        applied.attach(optimizer)
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (settings.warmup or 1)))
        if settings.compile:  # after the scheduler, which wraps a plain method alone
            optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign, assignment]
        scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        trainable = list(applied.trainable_parameters())
        order, moves = (torch.Generator().manual_seed(seed) for _ in range(2))
        parts = _Parts(applied, optimizer, schedule, scaler, order, moves)
        epochs, metrics = parts.restore(saved) if saved is not None else ([], {})
        pixels = [
            Pixels(model, split, normalise=settings.normalise, channels_last=settings.channels_last) for split in data
        ]
        feeder = Feeder(
            applied, (pixels[0], pixels[1]), settings, _NUMBERS[settings.amp][1], processes, progress.kept, shared
        )
        fed: Feed | None = None
        step: TrainStep | None = None
        take: Callable[[Tensor], Tensor] | None = None
        graphed, graph_reason = 0, ""

        logits = None
        for epoch in epochs:
            progress.epoch(epoch)
        for number in range(len(epochs) + 1, last + 1):
            if applied.step(epoch=number - 1, metrics=metrics, rewrap=True) or fed is None:
                step = take = None  # of the phase before: what is wrapped would still sum gradients
                fed = feeder.feed()
                step = TrainStep(
                    fed, processes.shared(fed.module), train.labels, optimizer, scaler, trainable,
                    settings.clip, processes,
                )  # fmt: skip
                graph_reason = no_graph(fed, device, settings.amp, processes) if settings.cuda_graph else ""
                take = GraphedStep(step, fed.module, optimizer) if settings.cuda_graph and not graph_reason else step
            assert step is not None
            assert take is not None
            module = fed.module
            feeder.epochs += fed.kept
            started = time.perf_counter()
            module.train()
            if not processes.first:  # dropout of its own, also after a resumption
                torch.manual_seed(1_000_003 * seed + 1_009 * number + processes.rank)
            total = torch.zeros((), device=device)
            drawn = batches(len(train.labels), settings.batch_size, order)
            placed = torch.split(torch.cat(drawn).to(device), [len(rows) for rows in drawn])  # one copy an epoch
            for rows in placed:
                moving = draw(settings.augment, len(rows), train.images.shape[-1], moves)
                scale = scaler.get_scale()
                with explained(settings.batch_size):
                    loss = take(rows) if moving is None else step(rows, moving)
                if scaler.get_scale() >= scale:  # a scaled loss's step is left out where a gradient overflows
                    schedule.step()
                total += loss * len(rows)
                progress.batch(len(rows), loss)
            if isinstance(take, GraphedStep):
                take.finish()
                graphed, graph_reason, take.steps = graphed + take.steps, take.reason, 0
            train_loss = float(total) / len(train.labels)
            trained = time.perf_counter()
            _average_statistics(module, processes)
            logits = predict(module, fed.val, len(val.labels), settings.batch_size, processes)
            error = fraction(logits.argmax(1) != val.labels)
            epochs.append(Epoch(number, train_loss, error, trained - started, time.perf_counter() - trained))
            metrics = {
                "train_loss": train_loss,
                "val_loss": float(F.cross_entropy(logits, val.labels)),
                "val_top1_error": error,
            }
            if checkpoint is not None and processes.first:
                checkpoint.save(parts.state(epochs, metrics))
            progress.epoch(epochs[-1])
        fed = fed or feeder.feed()
        if logits is None:  # stopped after the last epoch
            logits = predict(fed.module, fed.val, len(val.labels), settings.batch_size, processes)
        answers = predict(fed.module, fed.train, len(train.labels), settings.batch_size, processes)
    computed = torch.tensor([feeder.computed], device=device)
    processes.sum([computed])
    train_error = fraction(answers.argmax(1) != train.labels)
    run = Run(
        seed=seed,
        epochs=tuple(epochs),
        val=measure(logits, val, precision=precision),
        train_error=train_error,
        learned=math.isfinite(epochs[-1].train_loss) and train_error < commonest_error(train.labels),
        seconds=feeder.seconds + sum(epoch.train_seconds + epoch.eval_seconds for epoch in epochs),
        features=len(train.labels) + len(val.labels) if feeder.epochs or fed.kept else 0,
        features_computed=int(computed),
        features_seconds=feeder.features_seconds,
        features_epochs=feeder.epochs,
        features_difference=feeder.difference,
        graphed_steps=graphed,
        graph_reason=graph_reason,
        predicted=tuple(logits.argmax(1).tolist()),
    )
    if checkpoint is not None and processes.first and last == settings.epochs:
        checkpoint.save({"run": asdict(run)})
    return run


@dataclass(frozen=True)
class _Parts:
    """All that an epoch changes."""

    applied: AppliedPlan
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    order: torch.Generator
    moves: torch.Generator

    def state(self, epochs: list[Epoch], metrics: Mapping[str, float]) -> dict[str, Any]:
        model = self.applied.model
        learning = {id(parameter) for parameter in self.applied.trainable_parameters()}  # in any phase
        still = {name for name, parameter in model.named_parameters() if id(parameter) not in learning}
        return {
            "model": {name: value for name, value in model.state_dict().items() if name not in still},
            "plan": self.applied.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "moves": self.moves.get_state(),
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            "epochs": [asdict(epoch) for epoch in epochs],
            "metrics": dict(metrics),
        }

    def restore(self, state: dict[str, Any]) -> tuple[list[Epoch], dict[str, float]]:
        self.applied.model.load_state_dict(state["model"], strict=False)
        self.applied.load_state_dict(state["plan"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self.moves.set_state(state["moves"])
        own, *cuda = state["random"]
        torch.set_rng_state(own)
        torch.cuda.set_rng_state_all(cuda)
        return [Epoch(**epoch) for epoch in state["epochs"]], state["metrics"]


def batches(count: int, size: int, order: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffle the rows 0 to ``count`` and cut them into parts of at most ``size``, as equal as they can be.

    Args:
        count: Number of rows.
        size: Rows a part, at most.
        order: The generator that shuffles; it is advanced.

    Examples:
        >>> [len(rows) for rows in batches(9, 4, torch.Generator())]
        [3, 3, 3]
    """
    return torch.randperm(count, generator=order).tensor_split(math.ceil(count / size))


def _check_shares(data: tuple[Split, Split], settings: Settings, processes: Processes) -> None:
    train, val = (len(split.labels) for split in data)
    smallest = min(train // math.ceil(train / settings.batch_size), val)
    if smallest < processes.count:
        raise ModelError(
            f"{processes.count} processes share batches of {smallest} images",
            notes=[f"--batch-size {processes.count} or more, or fewer processes"],
        )


def _average_statistics(module: nn.Module, processes: Processes) -> None:
    if processes.count == 1:
        return
    parts = [part for part in module.modules() if part.training]
    moving = {id(b): b for part in parts for b in part.buffers(recurse=False) if b.is_floating_point()}
    if moving:
        processes.sum(list(moving.values()))
        for buffer in moving.values():
            buffer.div_(processes.count)


def _autocast(settings: Settings, device: torch.device) -> torch.autocast:
    # Over a whole training: what is cached in the first step would be the weights of all others.
    dtype, _ = _NUMBERS[settings.amp]
    return torch.autocast(device.type, dtype, enabled=settings.amp is not None, cache_enabled=False)
