"""mmengine's ``paramwise_cfg`` -> a plan. A Python config is read as text and never executed."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError
from freezeplan.load import read_data, read_text
from freezeplan.plan import Plan, Rule
from freezeplan.source import Loc, Source

_NORMS = ["_BatchNorm", "_InstanceNorm", "GroupNorm", "LayerNorm"]
_UNSAYABLE = {
    "dwconv_decay_mult": "a plan does not select depthwise convolutions; name them: {match: '.*conv_dw', wd_mult: 0}",
    "flat_decay_mult": "a plan does not select by dimensions; weight_decay: timm exempts biases and 1-d tensors",
    "dcn_offset_lr_mult": "name the offsets: {match: '.*conv_offset', lr_mult: 0.1}",
}
_KNOWN = ("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "bypass_duplicate")
_BIAS = r"(?:.*\.)?bias"


def read(path: Path) -> Plan:
    """Return the plan that gives each tensor the factors that ``DefaultOptimWrapperConstructor`` gives it.

    A key of ``custom_keys`` is any part of a name; of several that fit the longest counts, then the first by alphabet.
    What has a key is left alone by ``norm_decay_mult`` and its like. A factor of 0 for the rate becomes
    ``frozen: true``. Weights that are tied are one tensor in a plan, whatever ``bypass_duplicate`` says.

    Args:
        path: A YAML, JSON or TOML file, or a Python config, with the dict itself or with a ``paramwise_cfg`` in it.

    Raises:
        PlanError: If there is none, it is not written out as literals, or it has a key that a plan cannot say, with
            what to write instead.

    Note:
        As ``mmengine.optim.DefaultOptimWrapperConstructor.add_params``, mmengine 0.10.
    """
    config, source, at = _config(path)
    for key in config:
        if key in _UNSAYABLE or key not in _KNOWN:
            hint = _UNSAYABLE.get(key, f"known here: {', '.join(_KNOWN)}")
            raise PlanError(f"{key} has no counterpart in a plan", where=source.where((*at, key)), notes=[hint])
    rules = list(_custom(config.get("custom_keys", {}), source, (*at, "custom_keys")))
    numbers = {key: _number(config[key], source.where((*at, key))) for key in _KNOWN[1:4] if key in config}
    if "norm_decay_mult" in numbers:
        rules.append(Rule(type=_NORMS, wd_mult=numbers["norm_decay_mult"], optional=True))
    if "bias_decay_mult" in numbers:
        rules.append(Rule(match=_BIAS, wd_mult=numbers["bias_decay_mult"], optional=True))
    if "bias_lr_mult" in numbers:
        rules.append(Rule(type=_NORMS, lr_mult=1.0, optional=True))
        rules.append(Rule(match=_BIAS, **_rate(numbers["bias_lr_mult"]), optional=True))
    rules.append(Rule(match=".*", lr_mult=1.0))
    return Plan(version=1, name=path.stem, weight_decay="all", rules=rules)


def _custom(keys: Any, source: Source, at: Loc) -> list[Rule]:
    if not isinstance(keys, dict):
        raise PlanError("custom_keys is a dict of parts of names", where=source.where(at))
    rules = []
    for key in sorted(sorted(keys), key=len, reverse=True):
        settings, where = keys[key], source.where((*at, key))
        if not isinstance(settings, dict) or set(settings) - {"lr_mult", "decay_mult"}:
            raise PlanError(f"{key!r} has lr_mult and decay_mult and nothing else that a plan can say", where=where)
        if not key or key.startswith("."):
            raise PlanError(f"{key!r} means another thing at the top of the model than below", where=where)
        factors = {name: _number(value, where) for name, value in settings.items()}
        escaped = re.sub(r"(\W)", r"\\\1", key)
        rules.append(
            Rule(match=f".*{escaped}.*", wd_mult=factors.get("decay_mult", 1.0), **_rate(factors.get("lr_mult", 1.0)))
        )
    return rules


def _rate(factor: float) -> dict[str, Any]:
    return {"lr_mult": factor} if factor else {"frozen": True}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise PlanError(f"a factor is a number of 0 or more, found {value!r}", where=where)
    return float(value)


def _config(path: Path) -> tuple[dict[str, Any], Source, Loc]:
    """The dict, its source and where it stands in it."""
    if path.suffix.lower() == ".py":
        return _from_python(path)
    data, source = read_data(path)
    at: Loc = ()
    while isinstance(data, dict):
        inner = next((key for key in ("paramwise_cfg", "optim_wrapper") if key in data), None)
        if inner is None and (at or any(key in (*_KNOWN, *_UNSAYABLE) for key in data)):
            return data, source, at
        if inner is None:
            break
        data, at = data[inner], (*at, inner)
    raise PlanError("there is no paramwise_cfg in this file", where=source.where(at))


def _from_python(path: Path) -> tuple[dict[str, Any], Source, Loc]:
    text = read_text(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PlanError(f"not Python: {error}", where=str(path)) from None
    for node in ast.walk(tree):
        pairs: list[tuple[Any, ast.expr]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
        for name, value in pairs:
            if name == "paramwise_cfg":
                places: dict[Loc, tuple[int, int]] = {}
                found = _literal(value, path, (), places)
                if isinstance(found, dict):
                    return found, Source(str(path), places), ()
    raise PlanError("there is no paramwise_cfg = dict(...) in this file", where=str(path))


def _literal(node: ast.expr, path: Path, loc: Loc, places: dict[Loc, tuple[int, int]]) -> Any:
    """The value of a literal or of ``dict(...)`` with literals; nothing is executed."""
    places[loc] = (node.lineno, node.col_offset + 1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        pairs = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if len(pairs) == len(node.keywords):
            return {key: _literal(value, path, (*loc, key), places) for key, value in pairs.items()}
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        return {
            key: _literal(value, path, (*loc, str(key)), places) for key, value in zip(keys, node.values, strict=True)
        }
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise PlanError(
            f"{ast.unparse(node)} is not a literal; the file is read, not executed",
            where=f"{path}:{node.lineno}:{node.col_offset + 1}",
            notes=["write its value out"],
        ) from None
