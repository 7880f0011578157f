"""What is frozen in every phase of a plan, as live tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from freezeplan.model import names
from freezeplan.resolve.resolution import Resolution


def frozen_values(model: nn.Module, resolution: Resolution) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the name and tensors of each frozen parameter and buffer; no tensor where the model lost it."""
    live = names.survey(model)
    for row in resolution.always_frozen:
        yield row.name, list(live.parameters.get(row.name, ()))
    for name in resolution.always_frozen_buffers:
        yield name, live.buffers.get(name, [])
