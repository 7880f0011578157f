r"""A selector -> the names that it selects. Pure, no torch.

One sentence: a pattern must match the *whole* dotted name of a parameter, or of a module above it. ``features`` is the
module and all below it; ``features.1`` is not ``features.10``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from freezeplan.errors import nearest
from freezeplan.model.description import Description, Module, Tensor
from freezeplan.plan.regex import Pattern, SlowPatternError
from freezeplan.plan.schema import Rule

_LOOKAROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
_BARE_DOT = re.compile(r"(?<!\\)\.(?![*+?{])")
_CHARACTER_CLASS = re.compile(r"(\\.|\[(?:\\.|[^\]\\])*\])")


@dataclass(frozen=True)
class Selection:
    """What a rule selects, in the model's order."""

    tensors: tuple[str, ...]
    modules: tuple[str, ...] = ()
    """Modules that own no tensor, for a rule with ``mode`` alone; others have nothing to say to them."""


def select(rule: Rule, model: Description) -> Selection:
    """Return the names that all selectors of a rule hold for.

    Args:
        rule: The rule; a role in ``model.unknown`` selects nothing.
        model: The model.

    Returns:
        Tensors (by their first name; a tied weight is selected when any of its names is) and modules that own none.

    Examples:
        >>> from freezeplan.model.description import Module, Tensor
        >>> toy = Description("toy", (Tensor("a.1.weight", (1,), "a.1"), Tensor("a.10.weight", (1,), "a.10")), ())
        >>> select(Rule(match="a.1", frozen=True), toy).tensors
        ('a.1.weight',)
    """
    tensors = {tensor.name for tensor in model.tensors}
    if rule.match:
        tensors &= match_tensors(rule.match, model)
    if rule.type:
        tensors &= {name for module in match_types(rule.type, model) for name in model.below[module]}
    if rule.role:
        tensors &= _with_role(rule.role, model)
    if rule.stage:
        wanted = {
            last: set().union(*(stage_numbers(text, last) for text in rule.stage))
            for last in set(model.last_stages.values())
        }
        tensors &= {name for name, stage in model.stages.items() if stage in wanted[model.last_stages[name]]}
    chosen = tuple(tensor.name for tensor in model.tensors if tensor.name in tensors)
    return Selection(chosen, _modules(rule, model, tensors) if rule.settings == ("mode",) else ())


def _modules(rule: Rule, model: Description, tensors: set[str]) -> tuple[str, ...]:
    modules = {module.name for module in model.modules if not model.own.get(module.name)}
    if rule.match:
        modules &= match_modules(rule.match, model)
    if rule.type:
        of_type = match_types(rule.type, model)
        modules &= {m.name for m in model.modules if m.name and not of_type.isdisjoint(model.module_paths[m.name])}
    if rule.role:
        modules &= _with_role(rule.role, model)
    if rule.stage:
        modules = {name for name in modules if (below := model.below[name]) and below <= tensors}
    return tuple(module.name for module in model.modules if module.name in modules)


def _with_role(roles: Iterable[str], model: Description) -> frozenset[str]:
    return frozenset().union(*(model.roles[role] for role in roles if role not in model.unknown))


def match_tensors(patterns: Iterable[str], model: Description) -> set[str]:
    """Return the tensors of which any pattern matches a name, or the name of a module above it."""
    return _matching(patterns, model.tensors, lambda: model.tensor_paths)


def match_modules(patterns: Iterable[str], model: Description) -> set[str]:
    """Return the modules, root excluded, of which any pattern matches a name or the name of a module above it."""
    return _matching(patterns, [module for module in model.modules if module.name], lambda: model.module_paths)


def match_types(patterns: Iterable[str], model: Description) -> set[str]:
    """Return the modules, root excluded, of which any pattern matches the whole name of the class or of a base."""
    regexes = [Pattern(pattern) for pattern in patterns]
    return {
        module.name
        for module in model.modules
        if module.name and any(regex.fullmatch(name) for regex in regexes for name in module.types)
    }


ROOT_NOTE = "{!r} names the model itself, which is no candidate: .* takes everything"


def names_root(patterns: Iterable[str], model: Description) -> bool:
    """Whether any pattern matches the whole name of the model's own class, or of a base."""
    return any(regex.fullmatch(name) for regex in map(Pattern, patterns) for name in model.types)


def stage_numbers(text: str, last: int) -> range:
    """Return the stages that an integer or a range means in a model whose last stage is ``last``.

    Examples:
        >>> [list(stage_numbers(text, 4)) for text in ("2", "-1", "..2", "3..", "1..-2")]
        [[2], [4], [0, 1, 2], [3, 4], [1, 2, 3]]
    """

    def number(part: str, otherwise: int) -> int:
        value = int(part) if part else otherwise
        return value if value >= 0 else last + 1 + value

    first, dots, end = text.partition("..")
    low = number(first, 0)
    return range(max(low, 0), (number(end, last) if dots else low) + 1)


def _matching(
    patterns: Iterable[str], things: Sequence[Tensor | Module], paths: Callable[[], Mapping[str, tuple[str, ...]]]
) -> set[str]:
    """Find what any pattern matches; the paths of names are asked for only where a pattern needs them."""
    found: set[str] = set()
    for pattern in patterns:
        if pattern == ".*":
            return {one.name for one in things}
        regex, above = Pattern(pattern), None if _LOOKAROUND.search(pattern) else paths()
        seen: dict[str, bool] = {}

        def hit(name: str, regex: Pattern = regex, seen: dict[str, bool] = seen) -> bool:
            if name not in seen:
                seen[name] = regex.fullmatch(name)
            return seen[name]

        found |= {one.name for one in things if any(map(hit, one.names if above is None else above[one.name]))}
    return found


def escaped(pattern: str) -> str:
    r"""Return the pattern with every bare ``.`` that no quantifier follows escaped.

    Examples:
        >>> escaped("blocks.1.")
        'blocks\\.1\\.'
        >>> escaped(r"blocks\.1\..*[.]")
        'blocks\\.1\\..*[.]'
    """
    parts = _CHARACTER_CLASS.split(pattern)
    return "".join(part if index % 2 else _BARE_DOT.sub(r"\\.", part) for index, part in enumerate(parts))


def explain_miss(pattern: str, model: Description) -> tuple[str, ...]:
    """Say in a few lines why a pattern matches nothing and what is near it.

    At most three nearest names; the top level of the model when nothing is near.
    """
    regex = Pattern(pattern)
    if any(regex.fullmatch(name) for name in (model.model, *model.types)):
        return (ROOT_NOTE.format(pattern),)
    empty = [module for module in model.modules if module.name and regex.fullmatch(module.name)]
    if empty:
        return (f"{empty[0].name!r} is a module without parameters ({empty[0].types[0]})",)
    try:
        hits = [tensor.name for tensor in model.tensors if regex.search(tensor.name)]
    except SlowPatternError:  # matching whole names was quick enough
        hits = []
    if hits:
        wider = f".*{pattern}.*".replace(".*.*", ".*")
        return (
            f"a pattern must match a whole name; {hits[0]!r} only contains it",
            f"'{wider}' matches {len(match_tensors([wider], model))} tensors",
        )
    literal = re.split(r"[\[\](){}*+?|^$]", pattern.replace(r"\.", ".").replace(r"\d", ""))[0].rstrip(".")
    names = {name for path in model.tensor_paths.values() for name in path}
    depth = literal.count(".")
    close = nearest(literal, (name for name in names if name.count(".") <= depth + 1))
    if close:
        return (f"did you mean {', '.join(map(repr, close))}?",)
    top = ", ".join(f"{name} ({count})" for name, count in list(model.top.items())[:20])
    more = ", ..." if len(model.top) > 20 else ""
    return (f"top level of {model.model} (tensors): {top}{more}",)
