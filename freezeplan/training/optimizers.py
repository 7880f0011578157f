"""Optimizers by name, with the constants that each is made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.optim
import torch

from freezeplan.training.settings import OptimizerName

CONSTANTS: Mapping[OptimizerName, str] = {
    "rmsprop-tf1": "decay 0.9, epsilon 1e-10 inside the root, mean square from one, no momentum",
    "rmsprop": "decay 0.9, epsilon 1e-10 outside the root, mean square from zero, no momentum",
    "adamw": "betas 0.9 and 0.999, epsilon 1e-8, weight decay 0.01, fused",
    "sgd": "momentum 0.9, no weight decay, fused",
}
"""What is fixed of an optimizer, in words; ``make_optimizer`` in numbers."""


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]], *, lr: float) -> torch.optim.Optimizer:
    """Make the lecture's RMSProp, decay 0.9 and epsilon 1e-10, or an optimizer that torch computes in one kernel.

    Args:
        name: ``rmsprop-tf1``: as TensorFlow 1 computes it, epsilon inside the root and the mean square starting at one,
            which warms up over about 100 steps (timm's ``RMSpropTF``); ``rmsprop``: torch's; ``adamw`` and ``sgd``,
            with momentum 0.9: torch's, fused.
        groups: Parameter groups.
        lr: Learning rate of groups that carry none.

    Examples:
        >>> type(make_optimizer("rmsprop", [{"params": [torch.nn.Parameter(torch.zeros(1))]}], lr=0.1)).__name__
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
