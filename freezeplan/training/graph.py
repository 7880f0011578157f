"""A training step as one launch: a CUDA graph of the pass over features, the loss, its gradients and the optimizer.

A graph repeats kernels with the addresses and numbers of one step, and no Python. So each is compared with plain steps
before it is used: two of both kinds from the same state have to give the same bits. What a step changes on the host,
such as a count of steps, is counted on. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from freezeplan.cache.independence import same

Step = Callable[[Tensor], Tensor]
"""Rows of the training split, (N,), on the device, to the loss; the model and the optimizer are changed."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A step to what repeats it, and where its loss then is."""


def cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a step as a CUDA graph; it is not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph.replay, loss


class GraphedStep:
    """Steps of one phase that are recorded when they come the second time, a graph for each batch size and rate.

    Args:
        step: A plain step.
        module: What is trained.
        optimizer: That trains it.
        record: Makes a graph of a step.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> def step(rows):
        ...     optimizer.zero_grad()
        ...     loss = layer(rows[:, None].float()).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> run = GraphedStep(step, layer, optimizer, record=lambda step: (step, step()))
        >>> for _ in range(3):
        ...     loss = run(torch.tensor([1, 2]))
        >>> run.reason  # what only calls the step again writes its loss elsewhere
        'its loss is not that of a plain step'
    """

    def __init__(self, step: Step, module: nn.Module, optimizer: torch.optim.Optimizer, record: Record = cuda_graph):
        self._step, self._module, self._optimizer, self._record = step, module, optimizer, record
        self._seen: set[tuple[Any, ...]] = set()
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self.steps = 0
        """How many were launched as a graph."""
        self.reason = ""
        """Why none is any more; empty while there is none."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Take a step on some rows; return its loss."""
        key = (len(rows), *(group["lr"] for group in self._optimizer.param_groups))
        if self.reason or key not in self._seen:
            self._seen.add(key)
            return self._step(rows)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._recorded(rows)
            if graph is None:
                return self._step(rows)
            self._graphs[key] = graph
        self.steps += 1
        return graph(rows)

    def finish(self) -> None:
        """Count on what graphs did not change on the host; call it before the optimizer's state is read."""
        for graph in self._graphs.values():
            graph.count_on()

    def _recorded(self, rows: Tensor) -> _Graph | None:
        """A graph of a step of this size that gives the bits of plain steps; None, and the reason, if there is none."""
        self.finish()
        state = _State(self._module, self._optimizer, rows.device)
        static = rows.clone()
        try:
            losses = [loss.clone() for loss in _beside(static, [self._step] * 2)]
            plain = state.now()
            state.restore()
            replay, loss = self._record(lambda: self._step(static))
            state.restore()
            graphed = []
            for _ in range(2):
                replay()
                graphed.append(loss.clone())
            self.reason = state.difference(plain)
            if not self.reason and not all(map(same, losses, graphed)):
                self.reason = "its loss is not that of a plain step"
        except RuntimeError as error:
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        state.restore()
        return None if self.reason else _Graph(replay, static, loss, state.counts(plain, steps=2))


def _beside(rows: Tensor, steps: Iterable[Step]) -> list[Tensor]:
    """Run steps on a stream of their own, which is to be done before a graph is recorded."""
    if rows.device.type != "cuda":
        return [step(rows) for step in steps]
    stream = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(rows.device))
    with torch.cuda.stream(stream):
        found = [step(rows) for step in steps]
    torch.cuda.current_stream(rows.device).wait_stream(stream)
    return found


class _Graph:
    def __init__(self, replay: Callable[[], None], rows: Tensor, loss: Tensor, counts: list[tuple[Tensor, float]]):
        self._replay, self._rows, self._loss, self._counts = replay, rows, loss, counts
        self._done = 0

    def __call__(self, rows: Tensor) -> Tensor:
        self._rows.copy_(rows)
        self._replay()
        self._done += 1
        return self._loss

    def count_on(self) -> None:
        for tensor, each in self._counts:
            tensor.fill_(tensor.item() + each * self._done)
        self._done = 0


class _State:
    """All that a step changes: tensors of the module and of the optimizer, and the device's random state."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
        self._device = device
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._tensors = [tensor.detach() for tensor in (*trained, *module.buffers(), *kept)]
        self._before = copy.deepcopy(self.now())
        self._random = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def now(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._tensors]

    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self._before, strict=True):
            tensor.copy_(value)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random, self._device)
        else:
            torch.set_rng_state(self._random)

    def difference(self, plain: list[Tensor]) -> str:
        """Why steps that were replayed are not the plain ones; what lies on the host is counted on, not compared."""
        for tensor, expected in zip(self._tensors, plain, strict=True):
            if not _on_host(tensor) and not same(tensor, expected):
                return "two of its steps do not give the bits of two plain steps"
        return ""

    def counts(self, plain: list[Tensor], steps: int) -> list[tuple[Tensor, float]]:
        """Tensors on the host that plain steps changed, and by how much each step."""
        found = zip(self._tensors, self._before, plain, strict=True)
        return [
            (tensor, float(after - before) / steps)
            for tensor, before, after in found
            if _on_host(tensor) and not same(before, after)
        ]


def _on_host(tensor: Tensor) -> bool:
    """Whether it is a number that Python counts, as optimizers keep their steps."""
    return tensor.device.type == "cpu" and not tensor.ndim
