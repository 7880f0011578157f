"""The arms of the experiment, what the lecture published for them, and the run over all arms and seeds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from freezeplan import Plan, load_plan
from freezeplan.errors import PlanError, did_you_mean
from freezeplan.training.checkpoint import Checkpoints
from freezeplan.training.processes import Processes
from freezeplan.training.settings import Settings
from freezeplan.training.train import Progress, Run, train_arm
from freezeplan.training.voc import VocData, load_split
from freezeplan.voc_vgg16.weights import build

ARMS = ("scratch", "frozen_convs", "low_conv_lr", "same_lr")
"""The lecture's four arms, in its order; each is the preset ``voc_vgg16/ARM``."""


@dataclass(frozen=True)
class Published:
    """What the lecture's slide gives for an arm: VGG16 on the validation images of PASCAL VOC 2012, as fractions."""

    top1_error: float
    top5_error: float
    train_error: float | None = None
    """Only given for ``scratch``."""


PUBLISHED: Mapping[str, Published] = {
    "scratch": Published(0.309, 0.042, 0.0),
    "frozen_convs": Published(0.191, 0.0179),
    "low_conv_lr": Published(0.204, 0.0208),
    "same_lr": Published(0.167, 0.0153),
}
"""The lecture's figures: 5,717 training and 5,823 validation images, RMSProp 0.0005 (convolutions 0.0001 where low)."""
SOURCE = (
    "VGG16 on all of PASCAL VOC 2012 (scratch: 0 % in training), from a lecture that this project's description quotes "
    "and does not name"
)


class Watch(Progress, Protocol):
    """Who is told how the whole run is getting on."""

    def decoded(self, done: int, images: int) -> None:
        """Take note of the images of a split, ``done`` of ``images``, that are decoded."""

    def started(self, arm: str, seed: int, images: int) -> None:
        """Take note of an arm that starts and of the images it will be trained on, all epochs together."""

    def finished(self, arm: str, run: Run) -> None:
        """Take note of an arm that is done."""


@dataclass(frozen=True)
class Outcome:
    """Everything that a run found out."""

    plans: Mapping[str, Plan]
    """Arm to plan, in the order they were trained."""
    runs: Mapping[str, tuple[Run, ...]]
    """Arm to its runs, one a seed."""
    train_images: int
    val_images: int
    skipped: tuple[str, ...]
    """Images left out because they do not decode."""
    val: tuple[tuple[str, int], ...] = ()
    """File and label of each validation image."""


def load_arms(names: Sequence[str], more: Sequence[str | Path] = ()) -> Mapping[str, Plan]:
    """Load the plans of arms.

    Args:
        names: Of the experiment's own arms.
        more: Plan files or presets, each an arm that is called like the file.

    Raises:
        PlanError: If there is no such arm, a plan cannot be loaded, or two arms have one name.

    Examples:
        >>> load_arms(["frozen_convs"])["frozen_convs"].name
        'voc_vgg16/frozen_convs'
    """
    unknown = next((name for name in names if name not in ARMS), None)
    if unknown is not None:
        notes = [*did_you_mean(unknown, ARMS), f"the arms are {', '.join(ARMS)}"]
        raise PlanError(f"no arm is called {unknown!r}", notes=notes)
    plans = {name: load_plan(f"voc_vgg16/{name}") for name in names}
    for given in more:
        plan, name = load_plan(given), Path(given).stem
        if name in plans:
            raise PlanError(
                f"two arms would be called {name!r}", where=str(given), notes=["give the file another name"]
            )
        plans[name] = plan
    return plans


def run(
    data: VocData,
    plans: Mapping[str, Plan],
    settings: Settings,
    *,
    model: str,
    weights: str | Path | None,
    seeds: Sequence[int],
    watch: Watch,
    checkpoints: Checkpoints | None = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> Outcome:
    """Train every arm with every seed and measure it.

    Images are decoded once. For each seed one starting model is built, and every arm is trained from a copy of it: the
    same head, the same weights, the same order of images. Arms of a seed run one after the other, then the next seed.

    Torch's number of threads is set while it runs.

    Args:
        data: What to train on.
        plans: Arm to plan.
        settings: Of every arm.
        model: A timm model name; ``vgg16`` gets the lecture's head.
        weights: A file, ``random``, or None for timm's pretrained weights; see ``weights.build``.
        seeds: Each decides the head, ``reinit``, the order of images, and dropout.
        watch: Is told of every image, step, epoch and arm.
        checkpoints: Where states are kept, and found again; None: nowhere.
        processes: Those that share each batch; all of them call this.

    Returns:
        Plans and figures.

    Raises:
        FreezePlanError: What reading, building, applying and training raise.
    """
    device = torch.device(settings.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        runs: dict[str, list[Run]] = {arm: [] for arm in plans}
        splits = None
        for seed in seeds:
            start = build(
                model, classes=len(data.classes), image_size=settings.image_size, weights=weights, seed=seed,
                flatten=settings.flatten,
            )  # fmt: skip
            if splits is None:  # after the first model, whose mistakes are found sooner than an image that is broken
                train, val = (
                    load_split(
                        data,
                        split,
                        image_size=settings.image_size,
                        rule=settings.label,
                        resize=settings.resize,
                        workers=settings.workers,
                        skip_bad=settings.skip_bad,
                        progress=watch.decoded,
                    ).to(device)
                    for split in ("train", "val")
                )
                splits = train, val
            for arm, plan in plans.items():
                watch.started(arm, seed, len(splits[0].labels) * settings.epochs)
                trained = train_arm(
                    copy.deepcopy(start).to(device),
                    plan,
                    splits,
                    settings,
                    seed=seed,
                    progress=watch,
                    checkpoint=checkpoints.of(arm, seed) if checkpoints is not None else None,
                    precision=True,
                    processes=processes,
                )
                runs[arm].append(trained)
                watch.finished(arm, trained)
    finally:
        torch.set_num_threads(threads)
    assert splits is not None, "at least one seed"
    return Outcome(
        plans=plans,
        runs={arm: tuple(found) for arm, found in runs.items()},
        train_images=len(splits[0].labels),
        val_images=len(splits[1].labels),
        skipped=splits[0].skipped + splits[1].skipped,
        val=tuple(
            zip(
                (photo.file for photo in data.val if photo.file not in splits[1].skipped),
                splits[1].labels.tolist(),
                strict=True,
            )
        ),
    )
