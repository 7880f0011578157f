"""What a shell may complete: plans, arms, timm's models, parameters, keys of kept features. Never an error.

Nothing here imports torch or timm, whose import takes seconds, but to list what was never listed before.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from freezeplan.cache import store
from freezeplan.plan import catalogue

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_ARMS = "voc_vgg16/"


def plans(incomplete: str) -> list[str]:
    """Return presets, plan files and folders that begin like this.

    Examples:
        >>> plans("voc_vgg16/f")
        ['voc_vgg16/frozen_convs']
    """
    return _beginning(incomplete, lambda: _plan_names(incomplete))


def arms(incomplete: str) -> list[str]:
    """Return the experiment's own arms that begin like this.

    Examples:
        >>> arms("s")
        ['same_lr', 'scratch']
    """
    shipped = catalogue.shipped
    return _beginning(incomplete, lambda: [n.removeprefix(_ARMS) for n in shipped() if n.startswith(_ARMS)])


def models(incomplete: str) -> list[str]:
    """Return timm's models whose names begin like this.

    The first time for a version of timm they are written to the user's cache folder; later timm is not imported.

    Examples:
        >>> models("vgg16_b")
        ['vgg16_bn']
    """
    return _beginning(incomplete, _model_names)


def parameters(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the parameters, of the model on the command line, that begin like this."""
    return _beginning(incomplete, lambda: _parameter_names(**context.params))


def keys(context: typer.Context, incomplete: str) -> list[str]:
    """Return the keys of kept features that begin like this."""
    directory = context.params.get("directory") or store.default_directory()
    return _beginning(incomplete, lambda: [entry.key for entry in store.entries(directory)])


def _beginning(incomplete: str, words: Callable[[], Iterable[str]]) -> list[str]:
    """Keep the words that begin like this; none, and nothing on the terminal, where there are none to be had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [word for word in words() if word.startswith(incomplete)]
        except Exception:  # what a half typed line names may be anything
            return []


def _plan_names(incomplete: str) -> list[str]:
    above = Path(f"{incomplete}*").parent  # of what stands behind the last slash
    entries = above.iterdir() if above.is_dir() else ()
    files = (f"{entry}/" if entry.is_dir() else str(entry) for entry in entries)
    named = [name for name in files if name.endswith((*_SUFFIXES, "/")) and not name.startswith(".")]
    return [*catalogue.shipped(), *catalogue.added(), *sorted(named)]


def _model_names() -> list[str]:
    file = store.default_directory() / f"models-of-timm-{metadata.version('timm')}.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    from freezeplan.model.describer import model_names

    found = model_names()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    with suppress(OSError):  # a folder that cannot be written: it takes seconds again
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("\n".join(found) + "\n", encoding="utf-8")
        temporary.replace(file)
    return found


def _parameter_names(model: str, num_classes: int | None, model_arg: list[Any] | None, **_: object) -> Iterable[str]:
    from freezeplan.model.describer import describe
    from freezeplan.model.source import load_model

    described = describe(load_model(model, dict(model_arg or ()), num_classes=num_classes, meta=True))
    return [tensor.name for tensor in described.tensors]
