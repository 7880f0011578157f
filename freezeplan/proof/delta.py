"""Delta files: what a training changed, the plan that it followed, and the content hash of what it started from.

A safetensors file with the trained tensors and the buffers that moved. What did not change is in it as digests, so that
a delta goes onto the base that it was made on, and onto no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from freezeplan.apply import freeze
from freezeplan.apply.frozen import frozen_values
from freezeplan.atomic import whole_file
from freezeplan.errors import OutputError, WeightsError, printable
from freezeplan.model import describer, names
from freezeplan.model.digest import digest
from freezeplan.model.sharded import put, whole, writes
from freezeplan.plan.load import load_plan
from freezeplan.plan.schema import Plan
from freezeplan.proof import causes
from freezeplan.resolve.resolution import Resolution

_FORMAT = "freezeplan-delta-1"
_KEYS = ("plan", "phase", "model", "timm", "base", "held")
_NOTES = ("expected a file that applied.save_delta(path) wrote",)


@dataclass(frozen=True)
class Delta:
    """What a delta file holds.

    Examples:
        >>> import tempfile
        >>> from freezeplan import apply_plan
        >>> from freezeplan.model import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     apply_plan(model, "linear_probe").save_delta(f"{folder}/probe.safetensors")
        ...     delta = read(f"{folder}/probe.safetensors")
        >>> delta.plan.name, delta.model, sorted(delta.tensors), delta.bytes
        ('linear_probe', 'test_resnet', ['fc.bias', 'fc.weight'], 1164)
    """

    plan: Plan
    phase: str
    """The phase that the training was in; empty for a plan without phases."""
    model: str
    """Timm's name of the architecture, or the class."""
    timm: str
    """The version of timm that made the model; empty for a model that is not timm's."""
    base: str
    """Content hash (sha256) of all that did not change: of names and ``held``."""
    held: Mapping[str, str]
    """Name of each tensor or buffer that did not change -> its digest (``model.digest``)."""
    tensors: Mapping[str, Tensor]
    """Name -> trained tensor or moved buffer; the parts of a parametrized one are ``NAME[0]``, ``NAME[1]``."""

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes, without the header."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def save(model: nn.Module, resolution: Resolution, phase: str, path: str | Path) -> None:
    """Write what a plan lets move, beside digests of what it holds still. ``AppliedPlan.save_delta`` calls it.

    Args:
        model: The model, without wrappers.
        resolution: What the plan means for it.
        phase: Name of the phase that it is in.
        path: Where the file goes; it is written under another name and renamed.

    Raises:
        OutputError: If it cannot be written.
    """
    live = tensors_of(model)
    anew = {row.name for row in resolution.rows if row.reinit}
    anew |= {buffer.name for buffer in resolution.buffers if buffer.reinit}
    still = {key for key, _ in _numbered(pair for pair in frozen_values(model, resolution) if pair[0] not in anew)}
    held = {key: digest([tensor]) for key, tensor in live.items() if key in still}
    header = {
        "format": _FORMAT,
        "plan": json.dumps(resolution.plan.model_dump(mode="json", exclude_defaults=True)),
        "phase": phase,
        "model": resolution.subject,
        "timm": describer.version() if resolution.timm_parts else describer.timm_version(model),
        "base": _content_hash(held),
        "held": json.dumps(held),
    }
    moved = {key: whole(tensor).cpu().clone().contiguous() for key, tensor in live.items() if key not in still}
    if writes(live.values()):
        write(moved, header, Path(path))


def write(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None, path: Path) -> None:
    """Write a safetensors file: whole, or not at all.

    Raises:
        OutputError: If it cannot be written. What was at ``path`` stays.
    """
    try:
        with whole_file(path) as temporary:
            save_file(dict(tensors), temporary, metadata=None if header is None else dict(header))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def read(path: str | Path) -> Delta:
    """Read a delta file. Nothing of it is executed, and every name in what is returned can be printed.

    Args:
        path: A file that ``AppliedPlan.save_delta`` wrote.

    Raises:
        WeightsError: If there is no such file, it is damaged, or it is no delta.
    """
    where = str(path)
    if not Path(path).is_file():
        raise WeightsError("is a folder" if Path(path).is_dir() else "no such file", where=where, notes=_NOTES)
    try:
        with safe_open(path, framework="pt") as file:
            header: Mapping[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except Exception as error:  # what a damaged file makes a reader raise is not documented
        raise WeightsError(f"cannot be read as safetensors ({printable(str(error))})", where=where) from None
    if header.get("format") != _FORMAT or any(key not in header for key in _KEYS):
        raise WeightsError(
            f"is no delta: its header says format {header.get('format', '')[:40]!r}", where=where, notes=_NOTES
        )
    try:
        plan, held = load_plan(_mapping(header["plan"], 2**20)), _mapping(header["held"], 2**24)
        for key in ("phase", "model", "timm"):
            _check_name(key, header[key])
        for name in (*held, *tensors):
            _check_name("the name of a tensor", name)
        odd = next((digest for digest in held.values() if not isinstance(digest, str) or len(digest) != 64), None)
        if odd is not None:
            raise ValueError(f"expected digests of 64 digits, found {repr(odd)[:60]}")
        if _content_hash(held) != header["base"]:
            raise ValueError("the content hash of the base is not that of its digests")
    except ValueError as error:
        raise WeightsError(f"its header is damaged: {error}", where=where) from None
    return Delta(plan, header["phase"], header["model"], header["timm"], header["base"], held, tensors)


def load_delta(model: nn.Module, path: str | Path) -> Delta:
    """Put what a training changed into the base that it was made on. The model is checked whole before it is changed.

    Strict by construction: every parameter and saved buffer of the model is either in the file or among its digests,
    with the same shape, dtype and values. No plan is applied.

    Args:
        model: The base, as it was before training: the same architecture and weights; what was trained may have any
            values. Changed in place.
        path: A file that ``AppliedPlan.save_delta`` wrote.

    Returns:
        What the file holds: the plan, the phase, the model's name and timm's version.

    Raises:
        WeightsError: If the file is missing, damaged or no delta, or belongs to another base: the first tensor that
            differs is named, in the model's order.

    Examples:
        >>> import tempfile
        >>> from freezeplan import apply_plan
        >>> from freezeplan.model import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     apply_plan(model, "linear_probe").save_delta(f"{folder}/probe.safetensors")
        ...     load_delta(model, f"{folder}/probe.safetensors").plan.name
        'linear_probe'
    """
    delta = read(path)
    inner = names.unwrap(model)
    live = tensors_of(inner)
    check(delta, live, where=str(path), model=describer.title(inner))
    with torch.no_grad():
        for key, value in delta.tensors.items():
            put(live[key], value)
    for module in inner.modules():
        freeze.empty_cache(module)
    return delta


def apply_to_state(delta: Delta, state: Mapping[str, Tensor], *, where: str, base: str) -> dict[str, Tensor]:
    """Return a base's tensors with a delta in their place, without building the model.

    Args:
        delta: What a file holds.
        state: Name -> tensor of the base; wrappers' names do not count. What was trained may be in it or not.
        where: The delta's file, for the error.
        base: The base's file, for the error.

    Raises:
        WeightsError: If it is the delta of another base: the first tensor that differs is named.
    """
    whole = state.keys() >= delta.held.keys()  # a name such as ``stages.0.module.weight`` may be the model's own
    known = {name: [tensor] for name, tensor in state.items()} if whole else names.grouped(nn.Module(), state)
    live = {key: tensor for key, tensor in _numbered(known.items()) if key not in delta.tensors}
    check(delta, {**live, **delta.tensors}, where=where, model=base)
    return {**live, **delta.tensors}


def check(delta: Delta, base: Mapping[str, Tensor], *, where: str, model: str) -> None:
    """Refuse a base that is not the one that a delta was made on.

    Args:
        delta: What a file holds.
        base: Every parameter and saved buffer, in the model's order.
        where: The delta's file, for the error.
        model: What the base is called, for the error.

    Raises:
        WeightsError: Naming the first tensor that is not in both, or differs in values, shape or dtype.
    """
    for name in [*base, *(name for name in (*delta.held, *delta.tensors) if name not in base)]:
        reason = ""
        if name not in base:
            reason = f"{model} has no such tensor"
        elif name in delta.tensors:
            expected, found = delta.tensors[name], base[name]
            if (expected.shape, expected.dtype) != (found.shape, found.dtype):
                reason = f"the delta has {_kind(expected)}, {model} has {_kind(found)}"
        elif name not in delta.held:
            reason = "the delta does not know it"
        elif digest([base[name]]) != delta.held[name]:
            reason = f"its values are others than those that the delta was made on (here {_kind(base[name])})"
        if reason:
            made = f"it was made on {delta.model}" + (f" of timm {delta.timm}" if delta.timm else "")
            raise WeightsError(
                "is the delta of another base",
                where=where,
                notes=[f"the first tensor that differs is {name}: {reason}", made],
            )


@dataclass(frozen=True)
class Difference:
    """One difference of two delta files."""

    name: str
    """A tensor, or ``plan``, ``phase``, ``model``, ``timm``, ``base``."""
    text: str
    max_abs: float | None = None
    """Largest absolute difference of a tensor that both hold in one shape; None otherwise."""


def compare(first: Delta, second: Delta) -> tuple[Difference, ...]:
    """Return in what two deltas differ; nothing if they hold the same.

    Examples:
        >>> from dataclasses import replace
        >>> one = Delta(load_plan("full"), "", "toy", "", "", {}, {"weight": torch.zeros(2)})
        >>> compare(one, one)
        ()
        >>> compare(one, replace(one, tensors={"weight": torch.tensor([0.0, 0.5])}))
        (Difference(name='weight', text='differs by up to 0.5', max_abs=0.5),)
    """
    found = []
    if first.plan != second.plan:
        found.append(Difference("plan", f"{first.plan.title} -> {second.plan.title}"))
    for key in ("phase", "model", "timm"):
        before, after = getattr(first, key), getattr(second, key)
        if before != after:
            found.append(Difference(key, f"{before or 'none'} -> {after or 'none'}"))
    if first.base != second.base:
        both = [name for name in first.held if name in second.held]
        moved = [name for name in both if first.held[name] != second.held[name]]
        text = f"the first tensor that differs is {moved[0]}" if moved else "other tensors are frozen"
        found.append(Difference("base", text))
    for name in [*first.tensors, *(name for name in second.tensors if name not in first.tensors)]:
        one, two = first.tensors.get(name), second.tensors.get(name)
        if one is None or two is None:
            found.append(Difference(name, "only in the second" if one is None else "only in the first"))
        elif (one.shape, one.dtype) != (two.shape, two.dtype):
            found.append(Difference(name, f"{_kind(one)} -> {_kind(two)}"))
        elif digest([one]) != digest([two]):
            amount = causes.largest_change([one], [two])
            found.append(Difference(name, f"differs by up to {amount:.3g}", amount))
    return tuple(found)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by one name: of several the first, of a parametrized one ``NAME[0]``."""
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in _numbered([*names.parameters(model).items(), *names.buffers(model).items()]):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            flat[key] = tensor
    return flat


def _numbered(named: Iterable[tuple[str, Sequence[Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    for name, found in named:
        if len(found) == 1:
            yield name, found[0]
        else:
            yield from ((f"{name}[{index}]", tensor) for index, tensor in enumerate(found))


def _content_hash(held: Mapping[str, str]) -> str:
    lines = "".join(f"{name}\n{held[name]}\n" for name in sorted(held))
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_name(what: str, text: str) -> None:
    if len(text) > 1000 or not text.isprintable():
        raise ValueError(f"{what} is at most 1,000 printable characters, found {repr(text)[:60]}")


def _mapping(text: str, most: int) -> dict[str, Any]:
    if len(text) > most:
        raise ValueError(f"{len(text):,} characters, expected at most {most:,}")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return found


def _kind(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
