"""A model as data: canonical names, shapes, classes, roles, stages; and what timm knows of it.

Imports ``errors`` and the roles of ``plan``. Only this package reads timm's facts. Begin with ``description.py``, which
needs no torch; ``describer.py`` writes it; ``timm_facts.py`` is what timm knows; ``names.py`` finds live tensors.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from freezeplan.model.description import Description

if TYPE_CHECKING:
    from freezeplan.model.create import create_model as create_model
    from freezeplan.model.create import model_names as model_names
    from freezeplan.model.describer import describe as describe

_HOME = {"create_model": "create", "describe": "describer", "model_names": "create"}
__all__ = ["Description", *_HOME]


def __getattr__(name: str) -> object:  # ``resolve`` needs the description alone, and no torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
