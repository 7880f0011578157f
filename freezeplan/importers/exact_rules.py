"""A factor for each tensor of one model -> the shortest rules found that give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freezeplan.importers.infer import shortest_rules
from freezeplan.model.description import Description
from freezeplan.plan.schema import Rule


def exact_rules(model: Description, rates: Mapping[str, float], decays: Mapping[str, float]) -> list[Rule]:
    """Return rules for a plan with ``weight_decay: all``.

    Args:
        model: The model.
        rates: Tensor -> factor of the rate, 0 where it is frozen; tensors that are missing may get any.
        decays: Tensor -> factor of the weight decay.
    """

    def rate(value: Any) -> dict[str, Any]:
        return {"lr_mult": value} if value else {"frozen": True}

    tidy = {name: float(f"{value:.12g}") for name, value in rates.items()}
    return [
        *(Rule(**selector, wd_mult=value) for selector, value in shortest_rules(model, decays, usual=1.0)),
        *(Rule(**selector, **rate(value)) for selector, value in shortest_rules(model, tidy)),
    ]
