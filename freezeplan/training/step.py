"""One step of training: some rows of the training split, their loss, its gradients, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezeplan.training.feed import Feed
from freezeplan.training.processes import Processes


@dataclass(frozen=True)
class TrainStep:
    """A step in the phase that holds now.

    Args:
        fed: What is run, and what it gets.
        shared: The same module, wrapped where several processes share each batch.
        labels: Of the training split, (images,), on its device.
        optimizer: Of what is trained.
        scaler: Scales the loss; disabled but for fp16.
        trainable: What is trained in any phase, for clipping.
        clip: Largest L2 norm of all gradients together; None: no clipping.
        processes: Those that share each batch.
    """

    fed: Feed
    shared: nn.Module
    labels: Tensor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    trainable: list[nn.Parameter]
    clip: float | None
    processes: Processes

    def __call__(self, rows: Tensor, moving: Tensor | None = None) -> Tensor:
        """Take the step; a scaled loss's is left out where a gradient overflows, in all processes alike.

        Args:
            rows: Of the whole batch, (N,), on the split's device.
            moving: How its images are moved; None: they are not.

        Returns:
            The mean loss of the batch, on that device.
        """
        mine = self.processes.share(rows)
        with self.processes.exchanging():
            images = self.fed.train(mine, None if moving is None else self.processes.share(moving))
            loss = F.cross_entropy(self.shared(images), self.labels[mine])
            self.optimizer.zero_grad()
            # The mean over the processes of these gradients is the gradient of the whole batch's mean loss.
            weighted = loss * (len(mine) * self.processes.count / len(rows))
            self.scaler.scale(weighted).backward()  # type: ignore[no-untyped-call]
        loss = loss.detach() * (len(mine) / len(rows))
        self.processes.sum([loss])
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trainable, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


def no_graph(fed: Feed, device: torch.device, amp: str | None, processes: Processes) -> str:
    """Say why steps of a phase cannot be recorded as CUDA graphs; empty where that can be tried."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if not fed.on_device:
        return "no features are in the device's memory"
    if amp == "fp16":
        return "a scaled loss is looked at in each step"
    if processes.count > 1:
        return "processes sum their gradients in each step"
    return ""
