"""One arm: a plan is applied to a model, the model is trained, and its errors are measured. One plain loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from freezeplan import AppliedPlan, Plan, apply_plan
from freezeplan.cache.memory import FeatureDtype
from freezeplan.errors import FreezePlanWarning, ModelError
from freezeplan.training.checkpoint import Checkpoint
from freezeplan.training.feed import Feed, Give, feed
from freezeplan.training.pixels import Augment, Normalise, Pixels, draw
from freezeplan.training.processes import Processes
from freezeplan.training.voc import LabelRule, Resize, Split

OptimizerName = Literal["rmsprop-tf1", "rmsprop", "adamw", "sgd"]
Amp = Literal["bf16", "fp16"]
Flatten = Literal["chw", "hwc"]
CONSTANTS: Mapping[OptimizerName, str] = {
    "rmsprop-tf1": "decay 0.9, epsilon 1e-10 inside the root, mean square from one, no momentum",
    "rmsprop": "decay 0.9, epsilon 1e-10 outside the root, mean square from zero, no momentum",
    "adamw": "betas 0.9 and 0.999, epsilon 1e-8, weight decay 0.01, fused",
    "sgd": "momentum 0.9, no weight decay, fused",
}
"""What is fixed of an optimizer, in words; ``make_optimizer`` in numbers."""
_NUMBERS: Mapping[Amp | None, tuple[torch.dtype, FeatureDtype]] = {
    None: (torch.bfloat16, "float32"),  # autocast is off
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp16": (torch.float16, "float16"),
}


@dataclass(frozen=True)
class Settings:
    """All that decides a run besides data, model, weights, arms and seeds."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step, at most: an epoch is cut into parts as equal as they can be, so that none is of one image."""
    image_size: int
    """Side of the square images in pixels."""
    lr: float = 5e-4
    """Base learning rate, constant after the warm-up; the lecture's."""
    optimizer: OptimizerName = "rmsprop-tf1"
    clip: float | None = None
    """Largest L2 norm of all gradients together; None: no clipping."""
    warmup: int = 0
    """Steps over which the rate grows linearly from nothing."""
    label: LabelRule = "largest"
    augment: Augment = "none"
    """How training images differ from epoch to epoch; validation images never do."""
    normalise: Normalise = "weights"
    flatten: Flatten = "chw"
    """Order in which VGG16's pool5 is flattened."""
    resize: Resize = "squash"
    device: str = "cpu"
    threads: int = 1
    """Threads inside torch; their number changes the last digits of a result on the CPU."""
    workers: int = 1
    """Threads that decode images, once, before training."""
    skip_bad: bool = False
    """Leave out images that do not decode."""
    cache: bool = True
    """Run what is frozen ahead of everything trained once an image, and keep its features on disk."""
    cache_dir: str | None = None
    """Folder of features; None: the user's cache folder."""
    cache_limit: int | None = None
    """Bytes that it may hold at most; None: what the disk has."""
    channels_last: bool = True
    """Keep numbers of images and convolutions channel by channel of a pixel, which convolutions run faster on."""
    compile: bool = False
    """Run the model, or what is left of it to run on features, and the optimizer's step through ``torch.compile``."""
    amp: Amp | None = None
    """Numbers of matrix products and convolutions under autocast, of fp16 with a scaled loss; None: float32."""


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
class Measured:
    """Errors of a model on one split, in eval mode; fractions from 0 to 1."""

    top1_error: float
    top5_error: float | None
    """None for five classes or fewer."""
    any_error: float
    """Fraction of images that do not show the guessed class at all."""
    average_precision: tuple[float | None, ...]
    """One a class; None where the split shows none of it. Images whose only such objects are difficult do not count."""
    largest_error: float
    """Top-1 error against the class of the largest box, whatever the model was trained on."""
    first_error: float
    """The same against the class of the first object."""


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
        processes: Those that share each batch. Their gradients are summed, so a model without batch norm learns what
            one process would teach it, up to the order of summation; statistics of batch norm are of each process's
            share, and averaged before validation.

    Returns:
        The arm's figures.

    Raises:
        PlanError: If the plan does not fit the model.
        ModelError: If the model cannot be trained on batches of this size: too large for the device's memory, or a
            single image where a norm layer needs several, or fewer images than processes.
    """
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None and "run" in saved:
        return _run_again(saved["run"])
    train, val = data
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
        fed, feeding, features = None, 0.0, _Features()

        def give() -> Feed:
            nonlocal feeding, features
            begun = time.perf_counter()
            with torch.random.fork_rng(devices=devices), _explained(settings):
                found = feed(
                    applied, (pixels[0], pixels[1]), batch_size=settings.batch_size, cache=settings.cache,
                    augmented=settings.augment != "none", limit=settings.cache_limit,
                    directory=Path(settings.cache_dir) if settings.cache_dir else None,
                    dtype=_NUMBERS[settings.amp][1], progress=progress.kept,
                )  # fmt: skip
            if settings.compile:
                found.module.compile()
            if found.spoilt and processes.first:
                warnings.warn(
                    f"{plan.title}: --augment {settings.augment} changes images ahead of what is frozen, so no "
                    "features are kept and the frozen layers run in every epoch",
                    FreezePlanWarning,
                    stacklevel=3,
                )
            feeding += time.perf_counter() - begun
            features = replace(
                features, computed=features.computed + found.computed, seconds=features.seconds + found.seconds
            )
            return found

        logits = None
        for epoch in epochs:
            progress.epoch(epoch)
        for number in range(len(epochs) + 1, settings.epochs + 1):
            # Nothing wraps the model: gradients are summed here, of whatever has one.
            if applied.step(epoch=number - 1, metrics=metrics, rewrap=True) or fed is None:
                fed = give()
            module = fed.module
            features = replace(features, epochs=features.epochs + fed.kept)
            started = time.perf_counter()
            module.train()
            if not processes.first:  # dropout of its own, also after a resumption
                torch.manual_seed(1_000_003 * seed + 1_009 * number + processes.rank)
            total = torch.zeros((), device=device)
            for rows in batches(len(train.labels), settings.batch_size, order):
                moving = draw(settings.augment, len(rows), train.images.shape[-1], moves)
                mine = processes.share(rows)
                with _explained(settings):
                    images = fed.train(mine, None if moving is None else processes.share(moving))
                    loss = F.cross_entropy(module(images), train.labels[mine.to(device)])
                    loss = loss * (len(mine) / len(rows))
                    optimizer.zero_grad()
                    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                loss = loss.detach()
                processes.sum([*(p.grad for p in trainable if p.grad is not None), loss])
                _step(optimizer, schedule, scaler, trainable, settings.clip)
                total += loss * len(rows)
                progress.batch(len(rows), loss)
            train_loss = float(total) / len(train.labels)
            trained = time.perf_counter()
            _average_statistics(module, processes)
            logits = predict(module, fed.val, len(val.labels), settings.batch_size, processes)
            error = _fraction(logits.argmax(1) != val.labels)
            epochs.append(Epoch(number, train_loss, error, trained - started, time.perf_counter() - trained))
            metrics = {
                "train_loss": train_loss,
                "val_loss": float(F.cross_entropy(logits, val.labels)),
                "val_top1_error": error,
            }
            if checkpoint is not None and processes.first:
                checkpoint.save(parts.state(epochs, metrics))
            progress.epoch(epochs[-1])
        fed = fed or give()
        if logits is None:  # stopped after the last epoch
            logits = predict(fed.module, fed.val, len(val.labels), settings.batch_size, processes)
        answers = predict(fed.module, fed.train, len(train.labels), settings.batch_size, processes)
    computed = torch.tensor([features.computed], device=device)
    processes.sum([computed])
    train_error = _fraction(answers.argmax(1) != train.labels)
    run = Run(
        seed=seed,
        epochs=tuple(epochs),
        val=measure(logits, val),
        train_error=train_error,
        learned=math.isfinite(epochs[-1].train_loss) and train_error < commonest_error(train.labels),
        seconds=feeding + sum(epoch.train_seconds + epoch.eval_seconds for epoch in epochs),
        features=len(train.labels) + len(val.labels) if features.epochs or fed.kept else 0,
        features_computed=int(computed),
        features_seconds=features.seconds,
        features_epochs=features.epochs,
        predicted=tuple(logits.argmax(1).tolist()),
    )
    if checkpoint is not None and processes.first:
        checkpoint.save({"run": asdict(run)})
    return run


@dataclass(frozen=True)
class _Features:
    """What was computed, how long that took, and how many epochs were trained on it."""

    computed: int = 0
    seconds: float = 0.0
    epochs: int = 0


def _step(
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    scaler: torch.amp.GradScaler,
    trainable: list[nn.Parameter],
    clip: float | None,
) -> None:
    """Take a step. A scaled loss's is left out where a gradient overflows: summed, that is in all processes alike."""
    scaler.unscale_(optimizer)
    if clip is not None:
        nn.utils.clip_grad_norm_(trainable, clip)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:
        schedule.step()


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


def _run_again(found: dict[str, Any]) -> Run:
    epochs = tuple(Epoch(**epoch) for epoch in found["epochs"])
    val, predicted = Measured(**found["val"]), tuple(found["predicted"])
    return Run(**{**found, "epochs": epochs, "val": val, "predicted": predicted})


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]], *, lr: float) -> torch.optim.Optimizer:
    """Make the lecture's RMSProp, decay 0.9 and epsilon 1e-10, or an optimizer that torch computes in one kernel.

    Args:
        name: ``rmsprop-tf1``: as TensorFlow 1 computes it, epsilon inside the root and the mean square starting at one,
            which warms up over about 100 steps (timm's ``RMSpropTF``); ``rmsprop``: torch's; ``adamw`` and ``sgd``,
            with momentum 0.9: torch's, fused.
        groups: Parameter groups.
        lr: Learning rate of groups that carry none.

    Examples:
        >>> type(make_optimizer("rmsprop", [{"params": [nn.Parameter(torch.zeros(1))]}], lr=0.1)).__name__
        'RMSprop'
    """
    if name == "rmsprop-tf1":
        optimizer: torch.optim.Optimizer = timm.optim.RMSpropTF(groups, lr=lr, alpha=0.9, eps=1e-10)
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.RMSprop(groups, lr=lr, alpha=0.9, eps=1e-10)


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


def predict(
    module: nn.Module,
    give: Give,
    count: int,
    batch_size: int,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> Tensor:
    """Return a model's answers to every row of a split, in eval mode, without gradients.

    The model is left in eval mode. What is not a number becomes zero: a model that blew up names one class.

    Args:
        module: The model, or what is left of it to run on features.
        give: Rows to what the model gets for them.
        count: Number of rows.
        batch_size: Rows a pass.
        processes: Those that share the rows; each gets all answers.

    Returns:
        float32 logits, (N, classes), on the device of the images.
    """
    module.eval()
    mine = processes.share(torch.arange(count))
    with torch.no_grad():
        found = torch.cat([module(give(rows)).float() for rows in torch.split(mine, batch_size)]).nan_to_num(nan=0.0)
    logits = found.new_zeros(count, found.shape[1])
    logits[mine.to(found.device)] = found
    processes.sum([logits])
    return logits


def measure(logits: Tensor, split: Split) -> Measured:
    """Compare answers with what is on the images.

    Args:
        logits: (N, classes).
        split: The images they answer, N of them.

    Returns:
        Errors, and the average precision of each class by its softmax probability (torchmetrics; the area under the
        precision-recall steps, without VOC's smoothing).

    Examples:
        >>> images = torch.zeros(2, 3, 1, 1)
        >>> labels = {"largest": torch.tensor([0, 1]), "first": torch.tensor([0, 0])}
        >>> split = Split(images, labels, torch.tensor([[1, 1], [1, 1]]), rule="largest")
        >>> measured = measure(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), split)
        >>> measured.top1_error, measured.top5_error, measured.first_error, measured.any_error
        (0.5, None, 0.0, 0.0)
    """
    guesses = logits.topk(min(5, logits.shape[1])).indices
    right = guesses == split.labels[:, None]
    shown = split.present.gather(1, guesses[:, :1]) != 0
    return Measured(
        top1_error=_fraction(~right[:, 0]),
        top5_error=_fraction(~right.any(1)) if logits.shape[1] > 5 else None,
        any_error=_fraction(~shown),
        average_precision=_average_precision(logits.softmax(1), split.present),
        largest_error=_fraction(guesses[:, 0] != split.by_rule["largest"]),
        first_error=_fraction(guesses[:, 0] != split.by_rule["first"]),
    )


def commonest_error(labels: Tensor) -> float:
    """Return the error of always naming the commonest of these classes.

    Examples:
        >>> commonest_error(torch.tensor([0, 0, 0, 1]))
        0.25
    """
    return 1 - int(labels.bincount().max()) / len(labels)


def _average_precision(scores: Tensor, present: Tensor) -> tuple[float | None, ...]:
    from torchmetrics.functional.classification import binary_average_precision  # an extra, and slow to import

    found = []
    for score, shown in zip(scores.T, present.T, strict=True):
        counts = shown >= 0
        any_shown = bool((shown == 1).any())
        found.append(float(binary_average_precision(score[counts], shown[counts])) if any_shown else None)
    return tuple(found)


def _fraction(wrong: Tensor) -> float:
    return int(wrong.sum()) / len(wrong)


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


@contextmanager
def _explained(settings: Settings) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        notes = [f"--batch-size {max(1, settings.batch_size // 2)}, or a smaller --image-size"]
        raise ModelError(
            f"a batch of {settings.batch_size} does not fit in the device's memory", notes=notes
        ) from error
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise ModelError("a norm layer needs more than one image a batch", notes=["--batch-size 2 or more"]) from error
