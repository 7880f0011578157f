"""Steps launched as graphs. On the CPU a graph is emulated: operations are repeated without Python."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from freezeplan import apply_plan
from freezeplan.training.feed import Feed
from freezeplan.training.graph import GraphedStep
from freezeplan.training.processes import Processes
from freezeplan.training.step import TrainStep, no_graph


class Recorder(TorchDispatchMode):
    """Notes each operation with its tensors. As in a CUDA graph, numbers of Python are fixed, and the host's count is
    not repeated: what is changed in place and has no axis."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if str(function).split(".")[1].endswith("_") and not given[0].ndim:
            return answer
        self.operations.append((function, args, kwargs or {}, answer))
        return answer

    def replay(self):
        for function, args, kwargs, answer in self.operations:
            given = {
                leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            }
            for new, old in zip(tree_leaves(function(*args, **kwargs)), tree_leaves(answer), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def record(step: Callable[[], Tensor]):
    recorder = Recorder()
    with recorder:
        loss = step()

    def replay():
        with torch.no_grad():
            recorder.replay()

    return replay, loss


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.head(self.dropout(self.norm(self.hidden(x)).relu()))


OPTIMIZERS = {
    "rmsprop-tf1": lambda groups: timm.optim.RMSpropTF(groups, lr=0.01, alpha=0.9, eps=1e-10),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}
PLAN = {
    "version": 1,
    "weight_decay": "all",
    "rules": [{"match": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}],
}


def trained(optimizer, graphs, *, dropout=0.0, factor=lambda step: 1.0, sizes=(5, 4, 4), record=record):
    """Three epochs; the weights, the optimizer's state and the losses, and the steps."""
    torch.manual_seed(0)
    model, features, labels = Net(dropout), torch.randn(13, 4), torch.arange(13) % 3
    live = apply_plan(model, PLAN, scheduler="any")
    optimizer = OPTIMIZERS[optimizer](live)
    live.attach(optimizer)
    schedule = LambdaLR(optimizer, factor)
    fed = Feed(model, lambda rows, moves=None: features[rows], lambda rows, moves=None: features[rows])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plain = TrainStep(fed, model, labels, optimizer, scaler, live.trainable_parameters(), 1.0, Processes())
    step = GraphedStep(plain, model, optimizer, record) if graphs else plain
    losses = []
    for _ in range(3):
        for rows in torch.randperm(13).split(list(sizes)):
            losses.append(step(rows).item())
            schedule.step()
        if graphs:
            step.finish()
    state = [value.clone() for found in optimizer.state.values() for value in found.values()]
    return [*copy.deepcopy(model).state_dict().values(), *state, torch.tensor(losses)], step


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["rmsprop-tf1", "sgd"])
def test_graphs_give_the_bits_of_plain_steps(optimizer, dropout):
    """Of batches of two sizes; the first of each is plain. What the host counts, batch norm's batches too, is right."""
    plain, _ = trained(optimizer, False, dropout=dropout)
    graphed, step = trained(optimizer, True, dropout=dropout)

    assert (step.steps, step.reason) == (7, "")
    assert len(plain) == len(graphed)
    assert all(map(torch.equal, plain, graphed))


def test_a_rate_that_changes_each_step_has_no_graphs():
    plain, _ = trained("sgd", False, factor=lambda step: (step + 1) / 9)
    graphed, step = trained("sgd", True, factor=lambda step: (step + 1) / 9)

    assert (step.steps, step.reason) == (0, "")
    assert all(map(torch.equal, plain, graphed))


def test_a_number_that_changes_each_step_is_found():
    """AdamW's correction of its means is a number of Python: a graph would repeat that of one step."""
    plain, _ = trained("adamw", False)
    graphed, step = trained("adamw", True)

    assert (step.steps, step.reason) == (0, "two of its steps do not give the bits of two plain steps")
    assert all(map(torch.equal, plain, graphed))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nand more"), None),
        (torch.OutOfMemoryError("no memory"), "OutOfMemoryError: no memory"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_taken_plainly(fault, reason):
    def fail(step):
        step()
        raise fault

    plain, _ = trained("sgd", False)
    graphed, step = trained("sgd", True, record=fail)

    assert step.reason == (reason or "RuntimeError: operation not permitted when stream is capturing")
    assert all(map(torch.equal, plain, graphed))


@pytest.mark.parametrize(
    ("device", "on_device", "amp", "count", "reason"),
    [
        ("cpu", True, None, 1, "there is no CUDA device"),
        ("cuda", False, None, 1, "no features are in the device's memory"),
        ("cuda", True, "fp16", 1, "a scaled loss is looked at in each step"),
        ("cuda", True, "bf16", 2, "processes sum their gradients in each step"),
        ("cuda", True, "bf16", 1, ""),
    ],
)
def test_where_no_graph_is_tried_the_reason_is_said(device, on_device, amp, count, reason):
    fed = SimpleNamespace(on_device=on_device)

    assert no_graph(fed, torch.device(device), amp, Processes(0, count)) == reason
