"""Depth as data: timm's groups or feature taps -> stages, and the exponent of layer decay. Pure, no torch, no timm.

Stage 0 is the stem, stages count from 1, the classifier and what belongs to it has none. What timm's matcher leaves out
has the stage of the tensor ahead of it in the model's own order, and is listed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence


def by_groups(ids: Mapping[str, int], unmatched: Collection[str], head: Collection[str]) -> dict[str, int]:
    """Take timm's coarse groups as stages.

    Args:
        ids: Tensor -> group, in the model's order; 0 is the stem.
        unmatched: Tensors that timm's matcher leaves out (it puts them into the last group, as if they were the head).
        head: The classifier's tensors.

    Returns:
        Tensor -> stage, without the classifier and what stands beside it in one module (``head.norm``, ``pre_logits``).

    Examples:
        >>> ids = {"stem.weight": 0, "blocks.0.weight": 1, "norm.weight": 2, "head.norm.weight": 2, "head.fc.weight": 2}
        >>> by_groups(ids, {"norm.weight", "head.norm.weight", "head.fc.weight"}, {"head.fc.weight"})
        {'stem.weight': 0, 'blocks.0.weight': 1, 'norm.weight': 1}
    """
    stages: dict[str, int] = {}
    ahead, placeless = 0, beside_head(unmatched, head).union(head)
    for name, group in ids.items():
        if name in placeless:
            continue
        ahead = stages[name] = ahead if name in unmatched else group
    return stages


def by_features(
    names: Sequence[str], order: Mapping[str, int], taps: Sequence[str], first: str, head: Collection[str]
) -> dict[str, int]:
    """Let stages end where timm taps features, at each new reduction.

    For models whose groups are single layers (VGG) or that have no matcher. A tap with parameters is a stage with what
    leads to it; one without (VGG's activations) ends a stage. What stands ahead of the first tap with parameters is the
    stem, and so is a first tap that is called so or holds the first convolution.

    Args:
        names: The tensors, in the model's order.
        order: Module -> position in the model's order; every tapped module and every one that owns a tensor is in it.
        taps: Names of the tapped modules, in order.
        first: Name of the first convolution, or an empty string.
        head: The classifier's tensors.

    Examples:
        >>> names = ["features.0.weight", "features.2.weight", "fc.weight"]
        >>> order = {"features.0": 1, "features.1": 2, "features.2": 3, "features.3": 4, "fc": 5}
        >>> by_features(names, order, ["features.1", "features.3"], "features.0", {"fc.weight"})
        {'features.0.weight': 1, 'features.2.weight': 2}
    """
    holds = [any(name.startswith(f"{tap}.") for name in names) for tap in taps]
    stem = sum("stem" in tap or first.startswith(f"{tap}.") for tap in taps[:1])
    stages: dict[str, int] = {}
    last, beside = 0, beside_head(names, head)
    for name in names:
        if name in head or name in beside:
            continue
        inside = next((index for index, tap in enumerate(taps) if name.startswith(f"{tap}.")), None)
        if inside is None:
            position = order.get(name.rpartition(".")[0], 0)
            following = next((index for index, tap in enumerate(taps) if order[tap] >= position), None)
            if following is None:
                inside = max(last - 1 + stem, 0)
            elif following == 0 and holds[0] and not stem:
                stages[name] = 0
                continue
            else:
                inside = following
        last = stages[name] = inside + 1 - stem
    return stages


def beside_head(names: Iterable[str], head: Collection[str]) -> frozenset[str]:
    """Return the tensors that stand in the module that holds the classifier, or in ``pre_logits``.

    Examples:
        >>> sorted(beside_head(["norm.weight", "head.norm.weight", "pre_logits.fc.weight"], {"head.fc.weight"}))
        ['head.norm.weight', 'pre_logits.fc.weight']
    """
    holders = {name.partition(".")[0] for name in head if name.count(".") >= 2}
    return frozenset(
        name
        for name in names
        if name.partition(".")[0] in holders or ("pre_logits" in name and "pre_logits" in name.split("."))
    )
