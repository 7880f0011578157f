"""What decides about kept features besides the images: their key, and the check that they are the model's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freezeplan import names, seal, zoo
from freezeplan.errors import ApplyError
from freezeplan.features import Features
from freezeplan.memory import FeatureDtype as FeatureDtype
from freezeplan.prefix import Prefix, close
from freezeplan.replay import capture
from freezeplan.resolution import Resolution

_TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}


def key(model: nn.Module, part: Resolution, prefix: Prefix, dtype: FeatureDtype, device: torch.device) -> str:
    """Return a digest of all that decides about features but the images.

    Frozen parameters and buffers, bit by bit; which outputs are kept; the modules' own settings; the numbers that are
    computed with; the versions of torch and timm.
    """
    found = hashlib.sha256()
    live = names.modules(model)
    facts = {
        "format": 1,
        "model": [zoo.title(model), type(model).__module__, type(model).__qualname__],
        "calls": [(call.module, call.number, repr(call.outputs), repr(live.get(call.module))) for call in prefix.calls],
        "image": [prefix.image_shape, str(prefix.image_dtype)],
        "dtype": dtype,
        "device": device.type,
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "",
        "precision": torch.get_float32_matmul_precision(),
        "versions": [torch.__version__, zoo.version()],
    }
    found.update(json.dumps(facts).encode())
    for name, tensors in seal.still(model, part):
        found.update(f"{name} {seal.digest(tensors)}".encode())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Boundary:
    """Where the frozen part ends in one phase, and where its features are kept."""

    prefix: Prefix
    folder: Path
    about: Mapping[str, Any]
    """What ``freezeplan cache ls`` says of them."""


def check_stored(model: nn.Module, prefix: Prefix, images: Tensor, features: Features, dtype: FeatureDtype) -> None:
    """Compare the first stored rows with features computed now.

    Raises:
        ApplyError: If they differ: something that no digest covers has changed.
    """
    fresh = capture(model, [prefix], images)[0].cpu()
    stored = features.batch(range(min(len(fresh), len(features)))).cpu()
    if not close(fresh[: len(stored)], stored, _TOLERANCE[dtype]):
        raise ApplyError(
            "the features on disk are not those that the model gives now",
            notes=["freezeplan cache rm, then again; if it stays so, the frozen part is not deterministic"],
        )
