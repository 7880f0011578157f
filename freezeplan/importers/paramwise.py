"""mmengine's ``paramwise_cfg`` without layers: its factors as rules for any model, and for each tensor of one."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError, did_you_mean
from freezeplan.model.description import Description, Tensor
from freezeplan.plan.location import Loc, Source
from freezeplan.plan.schema import Rule

NORMS = ("_BatchNorm", "_InstanceNorm", "GroupNorm", "LayerNorm")
"""What mmengine takes for a norm: classes of torch, and what derives from them."""
KNOWN = ("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "bypass_duplicate")
NEED_A_MODEL = {
    "dwconv_decay_mult": "a plan does not select depthwise convolutions; name them: {match: '.*conv_dw', wd_mult: 0}",
    "flat_decay_mult": "a plan does not select by dimensions; weight_decay: timm exempts biases and 1-d tensors",
}
"""Keys that become rules where the shapes of the tensors are known -> what to write where they are not."""
UNSAYABLE = {"dcn_offset_lr_mult": "name the offsets: {match: '.*conv_offset', lr_mult: 0.1}"}
_SETTINGS = ("lr_mult", "decay_mult")
_BIAS = r"(?:.*\.)?bias"


@dataclass(frozen=True)
class Paramwise:
    """The settings, checked."""

    custom: Mapping[str, Mapping[str, float]]
    """Part of a name -> ``lr_mult``, ``decay_mult``; the one that counts first."""
    numbers: Mapping[str, float]
    """The other keys."""
    top_has_dot: bool
    """Whether a parameter of the model itself is called ``.cls_token``, as mmengine's own constructor calls it."""

    def rules(self, *, rates: bool = True) -> list[Rule]:
        """Return rules for a plan with ``weight_decay: all``; without rates none of them sets one."""
        rules = []
        for key, factors in self.custom.items():
            rate = _rate(factors.get("lr_mult", 1.0)) if rates else {}
            rules.append(Rule(match=self._patterns(key), wd_mult=factors.get("decay_mult", 1.0), **rate))
        if "norm_decay_mult" in self.numbers:
            rules.append(Rule(type=NORMS, wd_mult=self.numbers["norm_decay_mult"], optional=True))
        if "bias_decay_mult" in self.numbers:
            rules.append(Rule(match=_BIAS, wd_mult=self.numbers["bias_decay_mult"], optional=True))
        if rates and "bias_lr_mult" in self.numbers:
            rules.append(Rule(type=NORMS, lr_mult=1.0, optional=True))
            rules.append(Rule(match=_BIAS, **_rate(self.numbers["bias_lr_mult"]), optional=True))
        return [*rules, Rule(match=".*", lr_mult=1.0)] if rates else rules

    def rates(self, model: Description) -> dict[str, float]:
        """Return the factor of the rate of each tensor of a model."""
        types = {module.name: module.types for module in model.modules}
        found = {}
        for tensor in model.tensors:
            key = self._key(tensor)
            factor = 1.0 if key is None else self.custom[key].get("lr_mult", 1.0)
            if key is None and _is_bias(tensor) and not _is_norm(types[tensor.module]):
                factor = self.numbers.get("bias_lr_mult", 1.0)
            found[tensor.name] = factor
        return found

    def decays(self, model: Description) -> dict[str, float]:
        """Return the factor of the weight decay of each tensor of a model."""
        types = {module.name: module.types for module in model.modules}
        shapes = {tensor.name: tensor.shape for tensor in model.tensors}
        found = {}
        for tensor in model.tensors:
            key = self._key(tensor)
            weight = shapes.get(f"{tensor.module}.weight", ())
            depthwise = "Conv2d" in types[tensor.module] and weight[1:2] == (1,)
            applies = {
                "norm_decay_mult": _is_norm(types[tensor.module]),
                "bias_decay_mult": _is_bias(tensor),
                "dwconv_decay_mult": depthwise,
                "flat_decay_mult": len(tensor.shape) == 1,
            }
            first = next((name for name, yes in applies.items() if yes and name in self.numbers), "")
            own = self.numbers.get(first, 1.0)
            found[tensor.name] = own if key is None else self.custom[key].get("decay_mult", 1.0)
        return found

    def check_sayable(self, source: Source, at: Loc, path: Path) -> None:
        """Refuse what becomes rules for one model only.

        Raises:
            PlanError: With what to write instead.
        """
        for key, hint in NEED_A_MODEL.items():
            if key in self.numbers:
                raise PlanError(
                    f"{key} has no counterpart in a plan for any model",
                    where=source.where((*at, key)),
                    notes=[hint, f"for one model: freezeplan import mmengine {path} --model MODEL"],
                )

    def _key(self, tensor: Tensor) -> str | None:
        name = tensor.name if tensor.module or not self.top_has_dot else f".{tensor.name}"
        return next((key for key in self.custom if key in name), None)

    def _patterns(self, key: str) -> list[str]:
        """Every name that a key is a part of. A lookaround: held against the names of parameters only."""
        below = rf".*{_escaped(key)}.*"
        if key.startswith(".") and "." not in key[1:] and self.top_has_dot:
            return [below, rf"(?=){_escaped(key[1:])}[^.]*"]
        return [below]


def read(config: Mapping[str, Any], source: Source, at: Loc, *, top_has_dot: bool) -> Paramwise:
    """Return the settings of a ``paramwise_cfg``.

    Args:
        config: The dict, whose keys are known.
        source: Where its parts stand.
        at: Its place.
        top_has_dot: See ``Paramwise``.

    Raises:
        PlanError: If a value is not one that its key can have.
    """
    keys = config.get("custom_keys", {})
    where = (*at, "custom_keys")
    if not isinstance(keys, dict):
        raise PlanError("custom_keys is a dict of parts of names", where=source.where(where))
    for key in keys:
        if not isinstance(key, str):
            message = f"a key of custom_keys is a part of a name, as text; found {key!r}"
            raise PlanError(message, where=source.where((*where, key)), notes=["write it in quotes"])
    custom = {}
    for key in sorted(sorted(keys), key=len, reverse=True):
        custom[key] = _settings(key, keys[key], source, (*where, key))
    names = (*KNOWN[1:4], *NEED_A_MODEL)
    numbers = {key: _number(config[key], source.where((*at, key))) for key in names if key in config}
    return Paramwise(custom, numbers, top_has_dot)


def _settings(key: str, settings: Any, source: Source, at: Loc) -> dict[str, float]:
    if not key:
        raise PlanError("an empty key is a part of every name", where=source.where(at), notes=["take it out"])
    if not isinstance(settings, dict):
        raise PlanError(f"{key!r} has a dict with lr_mult and decay_mult", where=source.where(at))
    for name in settings:
        if name not in _SETTINGS:
            raise PlanError(
                f"{name} of {key!r} is neither lr_mult nor decay_mult; mmengine hands it to the optimizer, which does "
                "not read it",
                where=source.where((*at, name)),
                notes=did_you_mean(str(name), _SETTINGS) or ("take it out",),
            )
    return {name: _number(value, source.where((*at, name))) for name, value in settings.items()}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise PlanError(f"a factor is a number of 0 or more, found {value!r}", where=where)
    return float(value)


def _rate(factor: float) -> dict[str, Any]:
    return {"lr_mult": factor} if factor else {"frozen": True}


def _escaped(text: str) -> str:
    return re.sub(r"(\W)", r"\\\1", text)


def _is_bias(tensor: Tensor) -> bool:
    return tensor.name.rpartition(".")[2] == "bias"


def _is_norm(types: Collection[str]) -> bool:
    return not set(NORMS).isdisjoint(types)
