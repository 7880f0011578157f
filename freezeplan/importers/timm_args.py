"""The arguments of timm's training script -> a plan: ``--layer-decay`` and its floor."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError
from freezeplan.importers.imported import Imported
from freezeplan.importers.origin import ARGUMENTS, OPTIONS, check_origin, mostly_timms
from freezeplan.plan.load import read_data, read_text
from freezeplan.plan.location import Source

_OPTIONS = ("layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale")
_SCRIPTS = ("train.py", "distributed_train.sh")
"""What stands ahead of timm's own options; those of a launcher stand further ahead."""


def read(path: Path) -> Imported:
    """Return the plan that gives each tensor the rate that timm's training script gives it.

    Args:
        path: ``args.yaml`` as timm's ``train.py`` saves it, or a text file with a command line.

    Returns:
        A plan with ``layer_decay``, or one that trains everything at one rate, with a note that says so.

    Raises:
        PlanError: If the file is another tool's or a plan, or most of what it holds is no argument of ``train.py``; if
            an option has no number, or is ``--layer-decay-no-opt-scale``, which a plan cannot say: what it freezes
            depends on the depth of the model.
    """
    data, source = _options(path)
    if data.get("layer_decay_no_opt_scale") is not None:
        raise PlanError(
            "layer_decay_no_opt_scale has no counterpart in a plan",
            where=source.where(("layer_decay_no_opt_scale",)),
            notes=["freeze those layers by a rule ahead, such as {stage: ..2, frozen: true}"],
        )
    decay, floor = (_number(data, key, source) for key in _OPTIONS[:2])
    return Imported.of(
        path,
        () if decay is not None else [f"{path} sets no layer_decay, so everything is trained at one rate"],
        layer_decay=decay,
        layer_decay_min_scale=(floor or None) if decay is not None else None,
        rules=[{"match": ".*", "lr_mult": 1}],
    )


def _options(path: Path) -> tuple[dict[str, Any], Source]:
    if path.suffix.lower() in (".yaml", ".yml", ".json", ".toml"):
        data, source = read_data(path)
        check_origin(data, path, ARGUMENTS)
        if not isinstance(data, dict):
            raise PlanError("timm's args.yaml is a mapping of options to values", where=str(path))
        _check_timms([str(key) for key in data], path)
        return data, source
    check_origin(None, path, ARGUMENTS)
    found: dict[str, Any] = {}
    places: dict[Any, tuple[int, int]] = {}
    lines = read_text(path).splitlines()
    words = [(number, word) for number, line in enumerate(lines, 1) for word in _words(line, path, number)]
    script = next((at for at, (_, word) in enumerate(words) if word.rpartition("/")[2] in _SCRIPTS), -1)
    _check_timms([_key(word) for _, word in words[script + 1 :] if word.startswith("--")], path)
    for index, (number, word) in enumerate(words):
        option, equals, value = word.partition("=")
        key = _key(word)
        if option.startswith("--") and key in _OPTIONS:
            found[key] = value if equals else words[index + 1][1] if index + 1 < len(words) else ""
            places[(key,)] = (number, lines[number - 1].index(option) + 1)
    return found, Source(str(path), places)


def _check_timms(names: Sequence[str], path: Path) -> None:
    if not mostly_timms(names):
        known = ", ".join(name for name in names if name in OPTIONS) or "none"
        found = f"of its {len(names)} options train.py knows {known}" if names else "it holds no options"
        notes = ["expected args.yaml as train.py saves it, or a text file with its command line"]
        raise PlanError(f"expected the arguments of timm's train.py; {found}", where=str(path), notes=notes)


def _key(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _words(line: str, path: Path, number: int) -> list[str]:
    try:
        return shlex.split(line.rstrip("\\ "), comments=True)
    except ValueError as error:
        raise PlanError(f"not a command line: {error}", where=f"{path}:{number}:1") from None


def _number(data: dict[str, Any], key: str, source: Source) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not (0 < number <= 1 or (number == 0 and key != "layer_decay")):
        raise PlanError(f"{key} is a number in (0, 1], found {value!r}", where=source.where((key,)))
    return number
