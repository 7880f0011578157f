"""What decides about cached features besides the images: their key, and the check that they are the model's own."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freezeplan.cache.features import Features
from freezeplan.cache.independence import largest_difference, same
from freezeplan.cache.memory import FeatureDtype as FeatureDtype
from freezeplan.cache.prefix import Prefix
from freezeplan.errors import ApplyError
from freezeplan.model import describer, names


def key(model: nn.Module, weights: str, prefix: Prefix, dtype: FeatureDtype, device: torch.device) -> str:
    """Return a digest of all that decides about the bits of features but the images.

    Frozen parameters and buffers, bit by bit; which outputs are kept; the modules' own settings; the device and the
    numbers that it computes with; the versions of torch and timm.
    """
    live = names.modules(model)
    facts = {
        "format": 2,  # convolutions of cached calls lie channels-last while features are computed
        "model": [describer.title(model), type(model).__module__, type(model).__qualname__],
        "calls": [(call.module, call.number, repr(call.outputs), repr(live.get(call.module))) for call in prefix.calls],
        "image": [prefix.image_shape, str(prefix.image_dtype)],
        "dtype": dtype,
        **arithmetic(device),
        "versions": [torch.__version__, describer.version()],
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def arithmetic(device: torch.device) -> dict[str, Any]:
    """Return what decides about the bits of a product of matrices besides its numbers, as plain data.

    The kind of device and its name; autocast; how exact float32 products are (TF32); cuDNN's version; on the CPU its
    instruction set and the number of threads, which change the order of sums.

    Examples:
        >>> arithmetic(torch.device("cpu"))["device"][0]
        'cpu'
    """
    kind = device.type
    named = torch.cuda.get_device_name(device) if kind == "cuda" else ""
    cpu = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()] if kind == "cpu" else []
    return {
        "device": [kind, named, *cpu],
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "",
        "precision": {place: _setting(place) for place in _PRECISIONS},
        "cudnn": torch.backends.cudnn.version() if kind == "cuda" else None,  # type: ignore[no-untyped-call]
        "override": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
    }


_PRECISIONS = (
    "fp32_precision", "cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision", "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision", "cuda.matmul.allow_tf32", "cudnn.allow_tf32",
    "cuda.matmul.allow_bf16_reduced_precision_reduction", "cuda.matmul.allow_fp16_reduced_precision_reduction",
)  # fmt: skip
"""Settings below ``torch.backends``; the newer ones are there from torch 2.9 on, which refuses to read the older ones
where a newer one was set."""


def _setting(place: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(operator.attrgetter(place)(torch.backends))
    except (AttributeError, RuntimeError):
        return ""


@dataclass(frozen=True)
class Boundary:
    """Where the frozen part ends in one phase, and where its features are kept."""

    prefix: Prefix
    folder: Path
    weights: str
    """The digest of what is frozen in that phase."""
    about: Mapping[str, Any]
    """What ``freezeplan cache ls`` says of them."""


def check_stored(features: Features, fresh: Tensor, plain: Tensor) -> float:
    """Compare the first batch of features with what is stored, bit by bit.

    Args:
        features: What is stored.
        fresh: The first batch of them, (N, E), from the very computation that stored them: the same images in one
            batch, under the same autocast, with weights in the same memory format. A GPU computes them once more in any
            case: it chooses kernels by the number of images, and some of them sum in no fixed order.
        plain: The features that the first three images have in a plain training step of three, (3, E).

    Returns:
        By how much the stored features of these images differ from the plain ones, relative to the largest. A device
        chooses its kernels by the number of images, by how tensors lie in memory, and by whether autograd records, and
        so rounds differently. The difference is reported, and never judged.

    Raises:
        ApplyError: If they differ: something that no digest covers has changed.
    """
    stored = features.batch(range(min(len(fresh), len(features)))).to(fresh.device)
    if not same(fresh[: len(stored)].to(stored.dtype), stored):
        raise ApplyError(
            "the features on disk are not those that the model gives now",
            notes=["freezeplan cache rm, then again; if it stays so, the frozen part is not deterministic"],
        )
    return largest_difference(fresh[: len(plain)], plain[: len(fresh)])
