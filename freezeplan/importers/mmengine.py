"""An OpenMMLab config -> a plan: what it freezes, and the factors of its ``paramwise_cfg``. Nothing is executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError, did_you_mean
from freezeplan.importers import paramwise
from freezeplan.importers.frozen_keys import frozen_rules
from freezeplan.importers.imported import Imported, refused
from freezeplan.importers.layer_decay import MMPRETRAIN, READS, LayerDecay
from freezeplan.importers.origin import CONFIG, check_origin
from freezeplan.importers.python_config import SECTIONS, Unread, read_python
from freezeplan.model.description import Description
from freezeplan.plan.load import read_data
from freezeplan.plan.location import Loc, Source
from freezeplan.plan.schema import Rule

_DEFAULT = ("", "DefaultOptimWrapperConstructor", "DefaultOptimizerConstructor")
_EXACT = "freezeplan import mmengine {} --model MODEL writes rules with the exact factors of each tensor of a model"


def read(path: Path, model: Description | None = None) -> Imported:
    """Return the plan that freezes what a config freezes and gives each tensor the factors that its constructor gives.

    A key of ``custom_keys`` is any part of a name; of several that fit the longest counts, then the first by alphabet.
    What has a key is left alone by ``norm_decay_mult`` and its like. A factor of 0 for the rate becomes
    ``frozen: true``. Weights that are tied are one tensor in a plan, whatever ``bypass_duplicate`` says.

    Constructors with layer-wise decay become timm's ``layer_decay``, and the notes say what is different. With a model
    the rules give each of its tensors exactly what the constructor gives it.

    Args:
        path: A YAML, JSON or TOML file, or a Python config: a whole one, or the ``paramwise_cfg`` alone.
        model: The model that the plan is for.

    Raises:
        PlanError: If the file is another tool's or a plan, says nothing of these things, inherits from others, does not
            write them out as literals, or has a key that a plan cannot say, with what to write instead.

    Note:
        As ``mmengine.optim.DefaultOptimWrapperConstructor.add_params``, mmengine 0.10; the others in ``layer_decay``.
    """
    data, source = read_python(path) if path.suffix.lower() == ".py" else read_data(path)
    check_origin(data, path, CONFIG)
    if not isinstance(data, dict):
        raise PlanError("a config is a mapping", where=source.where(()))
    _check_whole(data, source, path)
    config, at, constructor = _paramwise(data, source, path)
    frozen, notes = frozen_rules({} if at == () else data, source)
    if config is None and not frozen and not notes:
        raise PlanError("there is no paramwise_cfg in this file, and nothing that freezes", where=source.where(()))
    config = _literal(config or {}, at, source, path)
    if constructor in _DEFAULT:
        for key in config:
            _check_default(key, source.where((*at, key)))
        layers = None
    else:
        layers = _layers(constructor, config, source, at)
        for key in config:
            if key not in (*READS[constructor], "bypass_duplicate"):
                place = source.where((*at, key))
                notes.append(f"{place}: {constructor} does not read {key}, so it is left out")
        config = {key: value for key, value in config.items() if key in READS[constructor]}
    found = paramwise.read(config, source, at, top_has_dot=constructor in _DEFAULT)
    if layers is not None:
        for key, factors in found.custom.items():
            if "lr_mult" in factors:
                place = source.where((*at, "custom_keys", key, "lr_mult"))
                notes.append(f"{place}: {constructor} sets rates by layers alone, so lr_mult of {key!r} is left out")
    if model is not None:
        return Imported.of(path, notes, weight_decay="all", rules=[*frozen, *_exact(model, frozen, found, layers)])
    found.check_sayable(source, at, path)
    with refused(source.where((*at, "custom_keys"))):
        rules = [*frozen, *found.rules(rates=layers is None)]
    if layers is None:
        return Imported.of(path, notes, weight_decay="all", rules=rules)
    rules.append(Rule(match=".*", lr_mult=1.0))
    decay = "all" if constructor == MMPRETRAIN else "timm"
    notes += _differences(layers, path)
    return Imported.of(path, notes, layer_decay=layers.rate, weight_decay=decay, rules=rules)


def _check_whole(data: Mapping[str, Any], source: Source, path: Path) -> None:
    """A config that inherits says only a part of what it does."""
    if "_base_" in data:
        raise PlanError(
            "this config inherits from others, and what they freeze is not in it",
            where=source.where(("_base_",)),
            notes=_resolved(path),
        )
    for key in SECTIONS[1:]:
        if isinstance(data.get(key), Unread):
            raise _not_literal(data[key], source, path)


def _resolved(path: Path) -> list[str]:
    command = f"from mmengine import Config; Config.fromfile('{path}').dump('resolved.py')"
    return ["write the whole config with mmengine, and import that:", f'python -c "{command}"']


def _not_literal(found: Unread, source: Source, path: Path) -> PlanError:
    line, column = found.position
    return PlanError(
        f"{found.text} is not a literal; the file is read, not executed",
        where=f"{source.file}:{line}:{column}",
        notes=["write its value out; or", *_resolved(path)],
    )


def _literal(value: Any, at: Loc, source: Source, path: Path) -> Any:
    """The value, in which nothing may be unknown."""
    if isinstance(value, Unread):
        raise _not_literal(value, source, path)
    if isinstance(value, dict):
        return {key: _literal(item, (*at, key), source, path) for key, item in value.items()}
    return value


def _paramwise(data: dict[str, Any], source: Source, path: Path) -> tuple[Any, Loc, str]:
    """The ``paramwise_cfg``, its place and the constructor beside it; None where there is none."""
    if any(key in (*paramwise.KNOWN, *paramwise.NEED_A_MODEL, *paramwise.UNSAYABLE) for key in data):
        return data, (), ""
    found = list(_holders(data, ()))
    if not found:
        return None, ("paramwise_cfg",), ""
    if len(found) > 1:
        raise PlanError(
            f"a second optimizer with settings of its own, beside the one at {source.where(found[0][1])}",
            where=source.where(found[1][1]),
            notes=["a plan is for one optimizer; import each from a file of its own"],
        )
    holder, at = found[0]
    if "paramwise_options" in holder:
        raise PlanError(
            "paramwise_options is the name of paramwise_cfg before mmcv 1.0; newer versions do not read it",
            where=source.where((*at, "paramwise_options")),
            notes=["rename it to paramwise_cfg"],
        )
    constructor = holder.get("constructor", "")
    where = source.where((*at, "constructor"))
    if isinstance(constructor, Unread):
        raise _not_literal(constructor, source, path)
    constructor = str(constructor).rpartition(".")[2]
    if constructor not in (*_DEFAULT, *READS):
        known = (*_DEFAULT[1:], *READS)
        notes = did_you_mean(constructor, known) or (f"known here: {', '.join(known)}",)
        raise PlanError(f"constructor {constructor} has no counterpart in a plan", where=where, notes=notes)
    config = holder.get("paramwise_cfg") or {}
    if not isinstance(config, (dict, Unread)):
        raise PlanError("paramwise_cfg is a dict", where=source.where((*at, "paramwise_cfg")))
    return config, (*at, "paramwise_cfg"), constructor


def _holders(data: Any, loc: Loc) -> Iterator[tuple[dict[str, Any], Loc]]:
    """The dicts that hold the settings of an optimizer."""
    if isinstance(data, dict):
        if any(key in data for key in ("paramwise_cfg", "paramwise_options", "constructor")):
            yield data, loc
            return
        for key, value in data.items():
            yield from _holders(value, (*loc, key))


def _check_default(key: Any, where: str) -> None:
    if key in paramwise.KNOWN or key in paramwise.NEED_A_MODEL:
        return
    layered = [name for name, keys in READS.items() if key in keys]
    if layered:
        notes: tuple[str, ...] = (f"it is read by constructor={' or '.join(map(repr, layered))} alone",)
    elif key in paramwise.UNSAYABLE:
        notes = (paramwise.UNSAYABLE[key],)
    else:
        known = (*paramwise.KNOWN, *paramwise.NEED_A_MODEL)
        notes = did_you_mean(str(key), known) or (f"known here: {', '.join(known)}",)
    raise PlanError(f"{key} has no counterpart in a plan", where=where, notes=notes)


def _layers(constructor: str, config: Mapping[str, Any], source: Source, at: Loc) -> LayerDecay:
    first, *others = READS[constructor]
    rate, where = config.get(first), source.where((*at, first))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        found = f"found {rate!r}" if first in config else "it is not given"
        raise PlanError(f"{constructor} takes {first}, a number in (0, 1]; {found}", where=where)
    number = None
    if "num_layers" in others:
        number = config.get("num_layers")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            found = f"found {number!r}" if number is not None else "it is not given"
            place = source.where((*at, "num_layers"))
            raise PlanError(f"{constructor} takes num_layers, an integer of 1 or more; {found}", where=place)
    kind = config.get("decay_type", "layer_wise") if "decay_type" in others else "layer_wise"
    if kind not in ("layer_wise", "layer_wise_vit", "stage_wise"):
        place = source.where((*at, "decay_type"))
        raise PlanError(f"decay_type is layer_wise, layer_wise_vit or stage_wise, found {kind!r}", where=place)
    return LayerDecay(constructor, float(rate), number, str(kind))


def _differences(layers: LayerDecay, path: Path) -> list[str]:
    """What timm's ``layer_decay`` does otherwise than the constructor."""
    if layers.decay_type == "stage_wise":
        lines = ["stage_wise: there a stage has one rate; layer_decay gives each block its own"]
    else:
        lines = [
            "there the backbone's last norm has the rate of the head, and ConvNeXt's blocks share rates (one in each "
            "stage, in the third one for three blocks); layer_decay gives each block its own, and the last norm that "
            "of the last block"
        ]
    if layers.constructor != MMPRETRAIN:
        extra = "cls_token" if layers.constructor == "LayerDecayOptimWrapperConstructor" else "pos_embed, cls_token"
        lines.append(
            f"weight decay: there {extra} and what else timm's no_weight_decay() lists have it, if they have two "
            "dimensions or more; in the plan they have none"
        )
    return [*lines, _EXACT.format(path)]


def _exact(model: Description, frozen: list[Rule], found: paramwise.Paramwise, layers: LayerDecay | None) -> list[Rule]:
    from freezeplan.importers.exact_rules import exact_rules
    from freezeplan.resolve.select import select

    gone = {name for rule in frozen if rule.frozen for name in select(rule, model).tensors}
    if layers is None:
        rates, decays = found.rates(model), found.decays(model)
    elif layers.constructor == MMPRETRAIN:
        rates, decays = layers.factors(model), found.decays(model)
    else:
        rates, decays = layers.factors(model), {}
        for tensor in model.tensors:
            plain = len(tensor.shape) != 1 and not tensor.name.endswith(".bias")
            if layers.constructor == "LayerDecayOptimWrapperConstructor":
                plain = plain and "pos_embed" not in tensor.name
            decays[tensor.name] = float(plain)
    return exact_rules(
        model,
        {name: rate for name, rate in rates.items() if name not in gone},
        {name: decay for name, decay in decays.items() if name not in gone and rates[name]},
    )
