"""A model named on the command line -> the model: timm's by its name, or what a function of one's own returns."""

from __future__ import annotations

import importlib
import operator
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freezeplan.errors import FreezePlanWarning, ModelError
from freezeplan.model.create import timm_model
from freezeplan.model.meta import meta_device

_FUNCTION = re.compile(r"[\w.]+:[\w.]+")


def load_model(
    name: str, arguments: Mapping[str, Any] | None = None, *, num_classes: int | None = None, meta: bool = False
) -> nn.Module:
    """Return the model that a name stands for. Nothing is downloaded unless the arguments ask for it.

    A module is looked for in the working directory first, as ``python script.py`` looks beside the script. A function
    that reads the values of tensors cannot run on the meta device; it is run on the CPU then, with a warning.

    Args:
        name: A timm model name, or ``package.module:function``; ``module:Class.build`` works too.
        arguments: Passed on to timm or to the function, whatever their names are.
        num_classes: Number of classes, one more argument; None leaves the model's own.
        meta: Create it on the meta device: names and shapes without memory or time.

    Raises:
        ModelError: If there is no such model or function, its module raises while it is imported, the model cannot be
            built from these arguments, or what is returned is no module.

    Warns:
        FreezePlanWarning: If a model was asked for on the meta device and was built on the CPU.

    Examples:
        >>> load_model("torch.nn:Linear", {"in_features": 2, "out_features": 3}, meta=True).weight.shape
        torch.Size([3, 2])
        >>> load_model("test_vit", num_classes=3, meta=True).head.weight.shape
        torch.Size([3, 64])
    """
    keywords = dict(arguments or {})
    if num_classes is not None:
        if "num_classes" in keywords:
            raise ModelError("num_classes is given twice: as an option and among the model's arguments")
        keywords["num_classes"] = num_classes
    if not is_function(name):
        return timm_model(name, keywords, meta=meta)
    with _working_directory_first():
        function = _imported(name)
        try:
            return _built(name, function, keywords, meta=meta)
        except ModelError as error:
            if not meta or "meta" not in str(error.__cause__).lower():
                raise
            reason = str(error.__cause__).partition("\n")[0]
        model = _built(name, function, keywords, meta=False)
    warnings.warn(
        f"{name} reads the values of tensors, which the meta device does not have ({reason}); "
        "it was built on the CPU, with all its memory",
        FreezePlanWarning,
        stacklevel=2,
    )
    return model


def is_function(name: str) -> bool:
    """Whether a model's name is that of a function, and not one of timm's.

    Examples:
        >>> is_function("mymodels:two_towers"), is_function("resnet18"), is_function("hf-hub:timm/resnet18.a1_in1k")
        (True, False, False)
    """
    return _FUNCTION.fullmatch(name) is not None


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Let modules be imported as in a script of the working directory; installed commands do not look there."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()  # a module that was written a moment ago is found too
    try:
        yield
    finally:
        sys.path[:] = before


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    notes = ["expected package.module:function"]
    if module.endswith(".py"):
        notes = [f"a module is named without .py: {module.removesuffix('.py')}:{function}"]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ModelError(f"cannot import {name!r}: {error}", notes=notes) from None
        raise _raised(f"cannot import {name!r}", error) from error
    except (Exception, SystemExit) as error:  # a module of one's own may do anything while it is imported
        raise _raised(f"cannot import {name!r}", error) from error
    try:
        builder = operator.attrgetter(function)(found)
    except AttributeError as error:
        raise ModelError(f"cannot import {name!r}: {error}", notes=notes) from None
    if not callable(builder):
        raise ModelError(
            f"{name} is of type {type(builder).__name__}, expected a function that returns a torch.nn.Module"
        )
    return builder  # type: ignore[no-any-return]


def _built(name: str, function: Callable[..., Any], arguments: Mapping[str, Any], *, meta: bool) -> nn.Module:
    try:
        with meta_device() if meta else torch.device("cpu"):
            model = function(**arguments)
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise _raised(f"{name} cannot be built with {given or 'no arguments'}", error) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _raised(what: str, error: BaseException) -> ModelError:
    """Say what a module or a function of one's own raised, and the last line outside installed packages."""
    elsewhere = (__file__, "<frozen ", "site-packages", "dist-packages")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in elsewhere)]
    notes = [f"raised at {os.path.relpath(own[-1].filename)}:{own[-1].lineno}"] if own else []
    if isinstance(error, SyntaxError) and error.filename:
        notes = [f"at {os.path.relpath(error.filename)}:{error.lineno}"]
    return ModelError(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", notes=notes)
