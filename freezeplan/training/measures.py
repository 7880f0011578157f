"""Errors of a model on a split: its answers, and what they are worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freezeplan.training.feed import Give
from freezeplan.training.processes import Processes
from freezeplan.training.voc import Split


@dataclass(frozen=True)
class Measured:
    """Errors of a model on one split, in eval mode; fractions from 0 to 1."""

    top1_error: float
    top5_error: float | None
    """None for five classes or fewer."""
    any_error: float
    """Fraction of images that do not show the guessed class at all."""
    average_precision: tuple[float | None, ...]
    """One a class; None where the split shows none of it. Images whose only such objects are difficult do not count.
    Empty where nobody asked for it."""
    largest_error: float
    """Top-1 error against the class of the largest box, whatever the model was trained on."""
    first_error: float
    """The same against the class of the first object."""


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


def measure(logits: Tensor, split: Split, *, precision: bool = True) -> Measured:
    """Compare answers with what is on the images.

    Args:
        logits: (N, classes).
        split: The images they answer, N of them.
        precision: Whether the average precision is asked for; it needs torchmetrics, which takes seconds to import.

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
        top1_error=fraction(~right[:, 0]),
        top5_error=fraction(~right.any(1)) if logits.shape[1] > 5 else None,
        any_error=fraction(~shown),
        average_precision=_average_precision(logits.softmax(1), split.present) if precision else (),
        largest_error=fraction(guesses[:, 0] != split.by_rule["largest"]),
        first_error=fraction(guesses[:, 0] != split.by_rule["first"]),
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


def fraction(wrong: Tensor) -> float:
    """Return the share of True in a bool tensor, (N,)."""
    return int(wrong.sum()) / len(wrong)
