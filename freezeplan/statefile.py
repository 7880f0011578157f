"""A file of weights -> its tensors by name. Nothing in it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from freezeplan.errors import WeightsError

_INSIDE = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which checkpoints hold the model's own tensors; averages of them (``state_dict_ema``) are not meant."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a checkpoint with ``weights_only=True``.

    A checkpoint may hold them itself or under ``state_dict``, ``model``, ``model_state_dict`` or ``module``.

    Args:
        path: A file; ``.safetensors`` in the name says which of the two it is.

    Returns:
        Name -> tensor on the CPU, names as they are in the file.

    Raises:
        WeightsError: If there is no such file, it cannot be read so, or holds no tensors.
    """
    if not path.is_file():
        raise WeightsError("no such file", where=str(path), notes=["expected a safetensors file or a checkpoint"])
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes a reader raise is not documented
        kind = "safetensors" if isinstance(error, SafetensorError) else "a checkpoint with weights_only=True"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"cannot be read as {kind} ({reason})", where=str(path)) from None
    while isinstance(content, Mapping) and not _tensors(content):
        inside = [content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        content = inside[0]
    found = _tensors(content) if isinstance(content, Mapping) else {}
    if not found:
        raise WeightsError("holds no tensors", where=str(path))
    return found


def _tensors(content: Mapping[object, object]) -> dict[str, Tensor]:
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
