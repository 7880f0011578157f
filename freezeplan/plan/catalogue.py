"""Preset's name -> file: the plans that ship, and those that other packages add. Nothing here imports torch.

A package adds its plans through the entry point group ``freezeplan.presets``: the entry point's name is the namespace,
its value a package that holds ``*.yaml`` files. ``mylab = "mylab.plans"`` makes ``mylab/plans/probe.yaml`` the preset
``mylab/probe``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from importlib.resources.abc import Traversable

from freezeplan.errors import FreezePlanWarning

GROUP = "freezeplan.presets"
"""The entry point group."""


@functools.cache
def shipped() -> Mapping[str, Traversable]:
    """Return the presets that ship with the package: name -> file, in alphabetical order.

    Examples:
        >>> "voc_vgg16/frozen_convs" in shipped()
        True
    """
    return dict(sorted(_plans(resources.files("freezeplan") / "presets", "")))


def added() -> dict[str, Traversable]:
    """Return the presets that other packages add: ``NAMESPACE/name`` -> file, in alphabetical order.

    The packages are imported to find their files; nothing else of them runs.

    Warns:
        FreezePlanWarning: Naming the entry point, where its package cannot be imported, holds no plan, or a preset
            has that name already. The others are found all the same.

    Examples:
        >>> isinstance(added(), dict)
        True
    """
    found: dict[str, Traversable] = {}
    own = shipped()
    for entry in metadata.entry_points(group=GROUP):
        try:
            plans = dict(_plans(resources.files(entry.value), f"{entry.name}/"))
        except Exception as error:  # anything may go wrong in somebody else's package, and must not stop the rest
            _warn(entry, f"{type(error).__name__}: {error}")
            continue
        if not plans:
            _warn(entry, f"the package {entry.value!r} holds no .yaml file")
        for name, file in plans.items():
            if name in own or name in found:
                _warn(entry, f"there is a preset called {name!r} already")
            else:
                found[name] = file
    return dict(sorted(found.items()))


def _plans(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _plans(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield f"{prefix}{entry.name.removesuffix('.yaml')}", entry


def _warn(entry: metadata.EntryPoint, reason: str) -> None:
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
    warnings.warn(f"presets {entry.name!r}{package} are left out: {reason}", FreezePlanWarning, stacklevel=3)
