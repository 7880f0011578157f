"""Where features are kept while a model is trained on them: on the device, in the host's memory, or on disk alone."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from freezeplan.errors import FreezePlanWarning

FeatureDtype = Literal["float32", "float16", "bfloat16"]
Keep = Literal["auto", "device", "host", "disk"]
SHARE = 0.5
"""Of the memory that is free, what features may take at most."""


def choose(keep: Keep, device: torch.device, wanted: int) -> Literal["device", "host", "disk"]:
    """Say where features of so many bytes are kept for a model on a device.

    Args:
        keep: ``device``, ``host`` or ``disk``: there, or at the next of these where they fit; ``auto``: ``device`` on
            a CUDA device, else ``disk``, whose files the system itself keeps in memory while there is room.
        device: Where the model is.
        wanted: Bytes of all features.

    Warns:
        FreezePlanWarning: If they do not fit where they should be.

    Examples:
        >>> choose("auto", torch.device("cpu"), 1), choose("device", torch.device("cpu"), 1)
        ('disk', 'device')
    """
    if keep == "auto":
        keep = "device" if device.type == "cuda" else "disk"
    places: dict[Literal["device", "host"], torch.device] = {"device": device, "host": torch.device("cpu")}
    full = []
    for place, where in places.items():
        if keep == "disk" or (keep, place) == ("host", "device"):
            continue
        free = free_memory(where)
        if wanted <= SHARE * free:
            found: Literal["device", "host", "disk"] = place
            break
        full.append(f"{where} has {free:,} free")
    else:
        found = "disk"
    if full:
        warnings.warn(
            f"{wanted:,} bytes of features are more than half of what is free ({'; '.join(dict.fromkeys(full))}): they "
            f"are kept {'in host memory' if found == 'host' else 'on disk alone'}\n"
            "  dtype='bfloat16' takes half the room",
            FreezePlanWarning,
            stacklevel=5,
        )
    return found


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, what torch holds there in reserve included.

    On the CPU: what the system says is available, or half of all memory where it does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 2**31


def allocate(place: Literal["device", "host"], device: torch.device, rows: int, columns: int, dtype: str) -> Tensor:
    """Return room for features, (rows, columns): on the device, or in host memory that it copies from by itself."""
    number = getattr(torch, dtype)
    if place == "device":
        return torch.empty(rows, columns, dtype=number, device=device)
    return torch.empty(rows, columns, dtype=number, pin_memory=device.type == "cuda")


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Copy a batch to a device; to a GPU without waiting for it."""
    if device.type != "cuda" or batch.device.type != "cpu":
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)


def now_on(device: torch.device) -> torch.cuda.Event | None:
    """Return when what a GPU was told so far will be done; None for other devices, which are done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def without_waiting(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory, whose values are there once a GPU has done what it was told so far."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_host(tensor: Tensor, ready: torch.cuda.Event | None = None) -> Tensor:
    """Return a tensor in host memory, and wait for it; not for what else a GPU was told meanwhile.

    Args:
        tensor: On any device; one that is in host memory is returned itself.
        ready: When its values are there; None: now, as far as the calling thread knows.
    """
    if tensor.device.type != "cuda":
        if ready is not None:
            ready.synchronize()
        return tensor.cpu()
    ready = ready or torch.cuda.current_stream(tensor.device).record_event()
    beside = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(beside):
        beside.wait_event(ready)
        found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        found.copy_(tensor, non_blocking=True)
    beside.synchronize()
    return found
