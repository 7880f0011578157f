"""Which stages a loss pulls at: gradients relative to weights, stage by stage, and rates made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezeplan import Plan
from freezeplan.cache.calls import undisturbed
from freezeplan.model.description import Description

NEAR_ZERO = 1e-4
"""Root mean square of a tensor below which its relative gradient says nothing."""
LEAST = 0.01
"""The smallest rate of a plan made of gradients, relative to the largest."""


@dataclass(frozen=True)
class Pull:
    """The relative gradient norm of one stage."""

    stage: int
    norm: float
    """Norm of the gradient over norm of the weights, the mean over batches."""
    rate: float
    """It, relative to the largest stage's."""


def fit_head(inputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier by logistic regression: summed cross-entropy plus half the squared norm of its weights.

    That is what scikit-learn's ``LogisticRegression`` minimises with ``C=1``; here by torch's L-BFGS from zero.

    Args:
        inputs: What the classifier gets, (N, D).
        labels: int64, (N,).
        classes: Number of classes, C.

    Returns:
        Weights (C, D) and bias (C,).

    Examples:
        >>> weight, bias = fit_head(torch.tensor([[1.0], [-1.0]] * 8), torch.tensor([0, 1] * 8), classes=2)
        >>> (torch.tensor([[1.0], [-1.0]]) @ weight.T + bias).argmax(1).tolist()
        [0, 1]
    """
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(F.linear(inputs, weight, bias), labels) + weight.square().sum() / (2 * len(labels))
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def scored(model: nn.Module, description: Description) -> Mapping[str, int]:
    """Return tensor -> stage, of the tensors whose relative gradient says something.

    Left out are norms, biases, other tensors of one dimension, and those whose root mean square is below
    ``NEAR_ZERO``; and what has no stage, the head.

    Examples:
        >>> from freezeplan.model import create_model, describe
        >>> model = create_model("test_resnet", num_classes=3)
        >>> sorted(set(scored(model, describe(model)).values()))
        [0, 1, 2, 3, 4]
    """
    out = description.roles.get("norm", frozenset()) | description.roles.get("bias", frozenset())
    found = {}
    for name, parameter in model.named_parameters():
        stage = description.stages.get(name)
        if stage is None or name in out or parameter.ndim < 2:
            continue
        if float(parameter.detach().square().mean().sqrt()) >= NEAR_ZERO:
            found[name] = stage
    return found


def relative_gradient_norms(
    model: nn.Module, stages: Mapping[str, int], batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Pull, ...]:
    """Return the norm of each stage's gradient over the norm of its weights, the mean over batches.

    Source: Lee et al., Surgical Fine-Tuning Improves Adaptation to Distribution Shifts, ICLR 2023 (arXiv 2210.11466),
    Auto-RGN, which takes it anew in every epoch; here once, with the given weights. The model runs in eval, so without
    dropout and with the statistics of its weights, and is left as it was.

    Args:
        model: With a head that knows the classes.
        stages: Tensor to stage; others have no part. A stage without any is not in the result.
        batches: Images as the model gets them, (B, 3, S, S), and labels, int64, (B,).

    Returns:
        One figure a stage, in their order.

    Examples:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> batch = (torch.ones(1, 2), torch.tensor([0]))
        >>> [(pull.stage, pull.rate) for pull in relative_gradient_norms(model, {"weight": 3}, [batch])]
        [(3, 1.0)]
    """
    named = dict(model.named_parameters())
    wanted = [named[name] for name in stages]
    sums = dict.fromkeys(sorted(set(stages.values())), 0.0)
    weights = {stage: _norm([named[name] for name in stages if stages[name] == stage]) for stage in sums}
    flags = [parameter.requires_grad for parameter in named.values()]
    with undisturbed(model), torch.enable_grad():
        model.eval()
        try:
            model.requires_grad_(False)
            for parameter in wanted:
                parameter.requires_grad_(True)
            for images, labels in batches:
                loss = F.cross_entropy(model(images), labels)
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
                for stage in sums:
                    own = [g for g, name in zip(gradients, stages, strict=True) if stages[name] == stage]
                    sums[stage] += _norm(own) / weights[stage]
        finally:
            for parameter, flag in zip(named.values(), flags, strict=True):
                parameter.requires_grad_(flag)
    norms = {stage: total / len(batches) for stage, total in sums.items()}
    largest = max(norms.values(), default=0.0)
    return tuple(Pull(stage, norm, norm / largest if largest else 1.0) for stage, norm in norms.items())


def _norm(found: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.detach().float().square().sum() for tensor in found]).sum().sqrt())


def auto_rgn(pulls: Sequence[Pull], name: str = "auto_rgn") -> Plan:
    """Return a plan whose rates are the stages' relative gradient norms, the largest 1: static Auto-RGN.

    The head, and stages without a figure, learn at the full rate. Rates have two digits, and none is below ``LEAST``.

    Args:
        pulls: What ``relative_gradient_norms`` returned.
        name: Of the plan.

    Examples:
        >>> plan = auto_rgn([Pull(0, 0.02, 0.2), Pull(1, 0.1, 1.0)])
        >>> [(rule.role or rule.stage, rule.lr_mult) for rule in plan.rules]
        [(('head',), 1.0), (('0',), 0.2), (('1',), 1.0)]
    """
    rates = {pull.stage: max(LEAST, float(f"{pull.rate:.2g}")) for pull in pulls}
    stages = [{"stage": stage, "lr_mult": int(rate) if rate == 1 else rate} for stage, rate in rates.items()]
    data = {
        "version": 1, "name": name, "default": {"lr_mult": 1},
        "description": "Static Auto-RGN: each stage learns at its relative gradient norm, the largest 1.",
        "rules": [{"role": "head", "lr_mult": 1}, *stages],
    }  # fmt: skip
    return Plan.model_validate(data)
