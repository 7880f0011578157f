"""The lecture's own weights, ``vgg16.npy``: a pickled dict of layer to [filter, bias], read without running anything.

Its layout and its input are TensorFlow's of that time: filters as height, width, input, output; fully connected rows in
the order height, width, channel; images from 0 to 255 as blue, green, red, less a mean (Simonyan and Zisserman 2015;
the converted file of tensorflow-vgg).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from numpy.lib import format as npy_format
from torch import Tensor

from freezeplan.errors import WeightsError

CONVOLUTIONS = {
    f"conv{block}_{number}": f"features.{index}"
    for index, (block, number) in zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        ((b, n) for b, count in enumerate((2, 2, 3, 3, 3), 1) for n in range(1, count + 1)),
        strict=True,
    )
}
CONNECTED = {"fc6": "pre_logits.fc1", "fc7": "pre_logits.fc2", "fc8": "head.fc"}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Unpickler(pickle.Unpickler):
    """Knows dicts, lists, strings, numbers and arrays, and nothing that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 2's bytes are written
            return _to_bytes
        if (module, name) not in _ALLOWED:
            raise WeightsError(
                f"asks for {module}.{name}; only a dict of arrays is read, and nothing in a file is executed"
            )
        return _ALLOWED[module, name]


def _to_bytes(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding != "utf-8" else encoding)


def read_npy(path: Path) -> dict[str, Tensor]:
    """Read ``vgg16.npy`` as weights of timm's VGG16, for images that are normalised by its ``MEAN`` and ``STD``.

    Args:
        path: The file.

    Returns:
        timm's names to tensors; the layers that the file has.

    Raises:
        WeightsError: If it is no such file, asks for anything but arrays, or a layer has another shape.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "vgg16.npy")
        ...     np.save(file, {"conv1_1": [np.zeros((3, 3, 3, 64), np.float32), np.zeros(64, np.float32)]})
        ...     {name: tuple(tensor.shape) for name, tensor in read_npy(file).items()}
        {'features.0.weight': (64, 3, 3, 3), 'features.0.bias': (64,)}
    """
    try:
        with path.open("rb") as file:
            version = npy_format.read_magic(file)
            read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
            shape, _, dtype = read(file)
            if shape != () or not dtype.hasobject:
                raise WeightsError(f"an array of {dtype} and shape {shape}, expected a dict of layers")
            layers = _Unpickler(file, encoding="latin1").load()
            layers = layers.item() if isinstance(layers, np.ndarray) and layers.shape == () else layers
    except WeightsError as error:
        raise WeightsError(error.problems[0].message, where=str(path)) from None
    except Exception as error:  # what a damaged pickle makes its reader raise is not documented
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"cannot be read as weights ({reason})", where=str(path)) from error
    if not isinstance(layers, dict):
        raise WeightsError(f"holds a {type(layers).__name__}, expected a dict of layers", where=str(path))
    state: dict[str, Tensor] = {}
    for layer, name in {**CONVOLUTIONS, **CONNECTED}.items():
        if layer in layers:
            state[f"{name}.weight"], state[f"{name}.bias"] = _converted(layer, layers[layer], path)
    if not state:
        known = ", ".join(list(map(repr, layers))[:5])
        notes = [f"layers such as 'conv1_1' and 'fc6' are looked for; found {known}"]
        raise WeightsError("holds no layer of VGG16", where=str(path), notes=notes)
    return state


def _converted(layer: str, values: Any, path: Path) -> tuple[Tensor, Tensor]:
    axes, channels = (4, " of 3 input channels" if layer == "conv1_1" else "") if layer in CONVOLUTIONS else (2, "")
    arrays = isinstance(values, list | tuple) and all(isinstance(v, np.ndarray) and v.dtype.kind == "f" for v in values)
    good = arrays and len(values) == 2 and values[0].ndim == axes and values[1].shape == values[0].shape[-1:]
    if not good or (channels and values[0].shape[2] != 3):
        parts = values[:3] if isinstance(values, list | tuple) else [values]
        shown = ", ".join(str(v.shape) if isinstance(v, np.ndarray) else type(v).__name__ for v in parts) or "nothing"
        message = f"layer {layer!r} holds {shown}, expected a filter of {axes} axes{channels} and a bias"
        raise WeightsError(message, where=str(path))
    weight, bias = (torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for value in values)
    if layer == "fc6":
        if weight.shape[0] % 49:
            raise WeightsError(f"layer 'fc6' has {len(weight)} rows, expected 7 x 7 x channels", where=str(path))
        weight = weight.reshape(7, 7, -1, weight.shape[1])
    elif layer == "fc7":
        weight = weight[None, None]
    if layer == "fc8":
        return weight.T.contiguous(), bias
    if layer == "conv1_1":
        weight = weight.flip(2)  # blue, green, red
    return weight.permute(3, 2, 0, 1).contiguous(), bias
