"""What a plan may say and probably does not mean: sentences that fail nothing. Pure, no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from freezeplan.model.description import Description
from freezeplan.plan.fields import Mode
from freezeplan.plan.schema import Plan
from freezeplan.resolve.select import escaped, match_tensors, match_types

_TINY = 0.01
_CONTAINERS = frozenset({"Sequential", "ModuleList", "ModuleDict"})


def find_hints(
    plan: Plan, model: Description, lr_mult: Mapping[str, float], frozen: Collection[str], modes: Mapping[str, Mode]
) -> tuple[str, ...]:
    """Return one sentence for each thing that is allowed and probably not meant.

    Args:
        plan: The plan.
        model: The model that it was resolved on.
        lr_mult: Trained tensor -> its multiplier.
        frozen: The frozen tensors.
        modes: Module -> its mode while the model trains.

    Examples:
        >>> from freezeplan.model.description import Tensor
        >>> toy = Description("toy", (Tensor("fc.weight", (1,), "fc"),), ())
        >>> plan = Plan(version=1, rules=[{"match": "fc", "lr_mult": 0.0001}])
        >>> find_hints(plan, toy, {"fc.weight": 0.0001}, (), {})[0]
        'every lr_mult is below 0.01: it multiplies lr; for a rate of 1e-4 at lr 5e-4 write 0.2'
    """
    return (
        *_tiny(lr_mult),
        *_bare_dots(plan, model),
        *_containers(plan, model),
        *_head_alone(plan, model, frozen),
        *_head_outside(plan, model, lr_mult),
        *_own_classifiers(model, lr_mult),
        *_unread(model, lr_mult),
        *_stem_left_out(plan, model, lr_mult),
        *_dropout_off(model, lr_mult, modes),
    )


def _tiny(lr_mult: Mapping[str, float]) -> Iterator[str]:
    if lr_mult and max(lr_mult.values()) < _TINY:
        yield f"every lr_mult is below {_TINY}: it multiplies lr; for a rate of 1e-4 at lr 5e-4 write 0.2"


def _bare_dots(plan: Plan, model: Description) -> Iterator[str]:
    for index, rule in enumerate(plan.rules):
        for pattern in rule.match or ():
            strict = escaped(pattern)
            if pattern.endswith(".") and strict.endswith(r"\."):
                strict = strict.removesuffix(r"\.")  # meant as a prefix; a module's name takes all below
            if strict == pattern:
                continue
            loose, exact = match_tensors([pattern], model), match_tensors([strict], model)
            if loose != exact:
                extra = next(tensor.name for tensor in model.tensors if tensor.name in loose - exact)
                yield (
                    f"rule {index + 1}{plan.source.line(('rules', index))}: "
                    f"a bare '.' matches any character: '{pattern}' "
                    f"selects {len(loose)} tensors, '{extra}' among them; '{strict}' selects {len(exact)}"
                )


def _containers(plan: Plan, model: Description) -> Iterator[str]:
    for index, rule in enumerate(plan.rules):
        if not rule.type:
            continue
        found = match_types(rule.type, model)
        holders = [m for m in model.modules if m.name in found and m.types[0] in _CONTAINERS]
        if holders:
            tensors = frozenset().union(*(model.below[module.name] for module in holders))
            where = repr(holders[0].name) + (f" and {len(holders) - 1} others" if holders[1:] else "")
            yield (
                f"rule {index + 1}{plan.source.line(('rules', index))}: {holders[0].types[0]} is a container; the rule "
                f"takes all {len(tensors)} tensors below {where}, whatever the class of what owns them"
            )


def _head_alone(plan: Plan, model: Description, frozen: Collection[str]) -> Iterator[str]:
    if not any(rule.role and "head" in rule.role for rule in plan.rules):
        return
    head = model.roles["head"]
    beside = model.beside_head.intersection(frozen)
    left = [tensor for tensor in model.tensors if tensor.name in beside and len(tensor.shape) > 1]
    if left:
        holders = {above for name in head for above in model.tensor_paths[name]}
        places = (tensor.name if tensor.module in holders else tensor.module for tensor in left)
        named = dict.fromkeys(re.sub(r"(?<=pre_logits)[.].*", "", place) for place in places)
        match = ", ".join(named) if len(named) == 1 else f"[{', '.join(named)}]"
        yield (
            "role: head is the classifier alone; layers between the last stage and it stay frozen, such as "
            f"{left[0].name!r}: to train them too, add {{match: {match}, lr_mult: 1}}"
        )


def _head_outside(plan: Plan, model: Description, trained: Collection[str]) -> Iterator[str]:
    """Where ``role: head`` trains more outside of timm's parts than classifiers of their own would be."""
    if not model.parts or not any(rule.role and "head" in rule.role for rule in plan.rules):
        return
    inside = frozenset().union(*(part.tensors for part in model.parts))
    head = model.roles["head"].intersection(trained) - inside
    left = [tensor for tensor in model.tensors if tensor.name in head]
    if sum(tensor.elements for tensor in left) <= sum(part.usual for part in model.parts):
        return
    sizes: dict[str, int] = {}
    for tensor in left:
        top = tensor.name.partition(".")[0]
        sizes[top] = sizes.get(top, 0) + tensor.elements
    largest = sorted(sizes, key=lambda top: -sizes[top])
    shown = ", ".join(f"{top} ({sizes[top]:,})" for top in largest[:5]) + (", ..." if largest[5:] else "")
    yield (
        f"role: head is all that is in no timm model, {len(left)} tensors, and is trained: {shown}; to freeze some of "
        f"it, put {{match: {largest[0]}, frozen: true}} above"
    )


def _own_classifiers(model: Description, trained: Collection[str]) -> Iterator[str]:
    """Classifiers that a contained timm model brought along, where the model has layers behind it."""
    for part in model.parts:
        own = sorted(part.classifier.intersection(trained))
        if own and part.name and len(model.tensors) > sum(len(found.tensors) for found in model.parts):
            yield (
                f"{own[0]!r} belongs to {part.name}'s own classifier ({part.architecture}) and is trained; if nothing "
                "reads it, it gets no gradient: create that model with num_classes=0"
            )


def _unread(model: Description, trained: Collection[str]) -> Iterator[str]:
    left = sorted(model.unread.intersection(trained))
    if left:
        yield (
            f"{len(left)} tensors such as {left[0]!r} are trained, and nothing reads them: PEFT trains the copy in "
            "modules_to_save; put {match: '.*original_module', frozen: true} above"
        )


def _stem_left_out(plan: Plan, model: Description, trained: Collection[str]) -> Iterator[str]:
    """Where a plan freezes the first stages by number and trains the stem ahead of them."""
    if not any(rule.stage and rule.frozen for rule in plan.rules):
        return
    for part in model.parts:
        places = {name: stage for name, stage in model.stages.items() if stage < 2 and name in part.tensors}
        stem = [name for name, stage in places.items() if stage == 0]
        first = [name for name, stage in places.items() if stage == 1]
        if stem and first and not any(name in trained for name in first) and all(name in trained for name in stem):
            named = f" of {part.name}" if part.name else ""
            yield (
                f"stage 1{named} is frozen and the stem ahead of it is trained, such as {stem[0]!r}: to freeze both, "
                "write the stages as ..1 and not as 1"
            )


def _dropout_off(model: Description, trained: Collection[str], modes: Mapping[str, Mode]) -> Iterator[str]:
    """Dropout that follows a module which is in eval for what it owns itself, and which holds trained layers."""
    for module in model.modules:
        if not module.random or not module.name or modes[module.name] == "train" or model.below[module.name]:
            continue
        above = module.name.rpartition(".")[0]
        own = model.own.get(above, ())
        frozen = not any(name in trained for name in own)
        if own and frozen and modes[above] == "eval" and any(name in trained for name in model.below[above]):
            yield (
                f"{module.name} ({module.random}) is off: it follows {above or model.model}, which is in eval, as "
                f"{own[0]!r} is frozen; to have it on, put {{match: {module.name}, mode: train}} above"
            )
