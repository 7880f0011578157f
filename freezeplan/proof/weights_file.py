"""A file of weights -> its tensors by name. Nothing in it is executed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from freezeplan.errors import WeightsError, printable

_OWN = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which checkpoints hold the model's own tensors."""
_AVERAGES = ("state_dict_ema", "model_ema")
"""Keys under which they hold averages of them."""


def read_state(path: Path, *, averages: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a checkpoint with ``weights_only=True``.

    A checkpoint may hold them itself or under ``state_dict``, ``model``, ``model_state_dict`` or ``module``. Many hold
    an average of the weights beside them (EMA), ``state_dict_ema`` or ``model_ema``: what was trained is the one, what
    is best to start from the other.

    Args:
        path: A file; ``.safetensors`` in the name says which of the two it is.
        averages: Take the averages where a checkpoint has some, as timm does. Otherwise they are passed by.

    Returns:
        Name -> tensor on the CPU, names as they are in the file.

    Raises:
        WeightsError: If there is no such file, it cannot be read so, asks for code, holds no tensors, or one that it
            only claims to hold.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "last.pth.tar")
        ...     torch.save({"state_dict": {"a": torch.ones(1)}, "state_dict_ema": {"a": torch.zeros(1)}}, path)
        ...     read_state(path)["a"], read_state(path, averages=True)["a"]
        (tensor([1.]), tensor([0.]))
    """
    where = str(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise WeightsError(found, where=where, notes=["expected a safetensors file or a checkpoint"])
    content = _load(path)
    keys = (*_AVERAGES, *_OWN) if averages else _OWN
    for _ in range(3):  # a file may hold itself
        held = content if isinstance(content, Mapping) else {}
        content = next((held[key] for key in keys if isinstance(held.get(key), Mapping)), content)
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): tensor for name, tensor in tensors if isinstance(tensor, Tensor)}
    if not state:
        raise WeightsError("holds no tensors", where=where)
    size = path.stat().st_size
    for name, tensor in state.items():
        if not name.isprintable():
            raise WeightsError(f"holds a tensor whose name cannot be printed, {name[:60]!r}", where=where)
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > size:  # one value can claim to be a million
            kind = f"{tensor.numel():,} values of {str(tensor.dtype).removeprefix('torch.')}"
            raise WeightsError(f"holds {name!r}, {kind} that are not written out in its {size:,} bytes", where=where)
    return state


def _load(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        message, notes = f"cannot be read ({error.strerror})", []
    except SafetensorError as error:
        message = f"cannot be read as safetensors ({printable(str(error))})"
        notes = ["it is damaged, or something else"]
    except Exception as error:  # what a damaged file makes a reader raise is not documented
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            message = f"asks for {printable(asked[1])}; a checkpoint holds tensors, and nothing in a file is executed"
            notes = ["save the model's state_dict, best as a safetensors file, and give that"]
        else:  # torch's own words end in advice to trust the file
            message = "cannot be read as a checkpoint"
            notes = ["it is damaged, or no file that torch.save wrote; a safetensors file is called .safetensors"]
    raise WeightsError(message, where=str(path), notes=notes) from None
