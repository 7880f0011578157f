"""What a plan means for one model, as data: a decision for each tensor, and what every rule had to do with it.

Every report, error, guard and picture is computed from this, never from a second matching of names. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from freezeplan.plan.fields import Mode
from freezeplan.plan.schema import Plan


class Row(NamedTuple):
    """What happens to one tensor."""

    name: str
    shape: tuple[int, ...]
    frozen: bool
    lr_mult: float | None
    """Multiplies the base learning rate; None when frozen."""
    wd_mult: float
    """Multiplies the weight decay; 0 also where timm's rule exempts the tensor (one dimension, biases, ...)."""
    mode: Mode
    """Of the module that owns it, while the model trains."""
    reinit: bool
    rule: int | None
    """Number, from 1, of the rule that decided the rate; None for the plan's default."""
    aliases: tuple[str, ...] = ()
    layer_decay: float | None = None
    """The factor that is in ``lr_mult``, to the power of the layers behind the tensor; None without one."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class BufferRow(NamedTuple):
    """What happens to one persistent buffer."""

    name: str
    frozen: bool
    """Whether its module is in eval while the model trains, so that it keeps its values."""
    reinit: bool
    """Whether it starts anew: all parameters of its module do, or of the nearest module above that has any."""


@dataclass(frozen=True)
class Group:
    """The tensors that share all their optimizer settings, over all phases."""

    name: str
    rates: tuple[float | None, ...]
    """The multiplier of the learning rate in each phase; None where the tensors are frozen."""
    wd_mult: float
    tensors: tuple[str, ...]
    elements: int

    @property
    def lr_mult(self) -> float:
        """The multiplier in the first phase that trains the tensors."""
        return next(rate for rate in self.rates if rate is not None)

    @property
    def constant(self) -> bool:
        """Whether every phase that trains the tensors does so at the same rate."""
        return len({rate for rate in self.rates if rate is not None}) == 1


@dataclass(frozen=True)
class RuleUse:
    """What one rule matched and what it decided."""

    number: int
    """From 1, in the order of the plan."""
    text: str
    """Its selectors, such as ``match: features``."""
    where: str
    """``file:line:column``, as far as known."""
    decided: int
    """Tensors for which it won at least one of its settings."""
    modules: int
    """Modules without parameters for which it decided the mode."""
    takers: tuple[tuple[int, int], ...]
    """(number of a rule above, tensors that it decided instead), most first."""
    everything: bool
    """Whether it matches every tensor: a catch-all."""
    settings: tuple[str, ...]
    """What it sets: some of ``freezeplan.plan.SETTINGS``."""
    tensors: tuple[str, ...]
    """The tensors that it matches."""

    @property
    def matched(self) -> int:
        """Number of tensors that it matches."""
        return len(self.tensors)

    @property
    def warning(self) -> str:
        """The sentence about a weak rule; empty if it is not."""
        if not self.weak:
            return ""
        above = ", ".join(f"rule {number} ({count})" for number, count in self.takers)
        return (
            f"rule {self.number} ({self.text}) matched {self.matched} tensors and decided {self.decided}; the first "
            f"matching rule wins, so the others went to {above}: to let it decide them, move it up"
        )

    @property
    def weak(self) -> bool:
        """Whether a rule that is no catch-all decided less than half of what it matched."""
        return not self.everything and 2 * self.decided < self.matched


@dataclass(frozen=True)
class Resolution:
    """What a plan means for one model; every report, error and guard is computed from this.

    Examples:
        >>> from freezeplan.model.description import Description, Module, Tensor
        >>> from freezeplan.resolve.resolver import resolve
        >>> tensors = (Tensor("features.weight", (4, 3), "features"), Tensor("head.weight", (2, 4), "head"))
        >>> toy = Description("toy", tensors, tuple(Module(n, ("Linear",)) for n in ("", "features", "head")))
        >>> plan = Plan(version=1, rules=[{"match": "features", "frozen": True}, {"match": ".*", "lr_mult": 0.5}])
        >>> resolution = resolve(plan, toy)
        >>> [(row.name, row.frozen, row.lr_mult, row.rule) for row in resolution.rows]
        [('features.weight', True, None, 1), ('head.weight', False, 0.5, 2)]
        >>> [(group.name, group.elements) for group in resolution.groups]
        [('lr_mult=0.5', 8)]
    """

    plan: Plan
    model: str
    rows: tuple[Row, ...]
    modes: Mapping[str, Mode]
    """Module name -> its mode while the model trains; every module is listed, under each of its names."""
    uses: tuple[RuleUse, ...]
    hints: tuple[str, ...]
    """Sentences about what is allowed and probably not meant."""
    random: tuple[str, ...]
    """What stays random in train mode, such as ``head_drop: Dropout p=0.5``."""
    alive: tuple[str, ...]
    """Frozen modules that a rule keeps in train mode: their statistics move, so the freeze is given up."""
    phase: str = ""
    """Name of the phase that this holds in; empty without phases."""
    phases: tuple[Resolution, ...] = ()
    """One resolution for each phase; what is said above is of the first. Empty without phases."""
    exponents: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> the layers behind it, by which ``layer_decay`` is raised; empty where the plan has none."""
    unplaced: tuple[str, ...] = ()
    """Where the plan speaks of depth: tensors that timm's matcher leaves out, so they have the depth of their place."""
    buffers: tuple[BufferRow, ...] = ()
    timm_parts: Mapping[str, str] = field(default_factory=dict)
    """Module name -> timm's architecture, of the timm models that the model contains; empty for a timm model itself."""

    @property
    def subject(self) -> str:
        """The model and the timm models that it contains, such as ``Net (encoder: resnet18)``."""
        shown = [f"{name}: {architecture}" for name, architecture in self.timm_parts.items()]
        return self.model + (f" ({', '.join(shown[:3])}{', ...' if shown[3:] else ''})" if shown else "")

    def part_of(self, name: str) -> str:
        """Return the name of the contained timm model that a tensor is in; empty if it is in none."""
        return next((part for part in self.timm_parts if name.startswith(f"{part}.")), "")

    @property
    def frozen(self) -> tuple[Row, ...]:
        """The rows of what is frozen."""
        return tuple(row for row in self.rows if row.frozen)

    @property
    def trained(self) -> tuple[Row, ...]:
        """The rows of what is trained."""
        return tuple(row for row in self.rows if not row.frozen)

    @property
    def parts(self) -> tuple[Resolution, ...]:
        """One resolution a phase; of a plan without phases, this one."""
        return self.phases or (self,)

    @cached_property
    def distinct(self) -> tuple[Resolution, ...]:
        """The parts that decide anything else than the part behind them, for pictures and reports of few lines.

        Phases that have nothing to say to this model are not among them: those for stages that it does not have.
        """
        kept = [self.parts[-1]]
        for part in reversed(self.parts[:-1]):
            if part.modes != kept[0].modes or _decisions(part) != _decisions(kept[0]):
                kept.insert(0, part)
        return tuple(kept)

    @cached_property
    def weak(self) -> tuple[RuleUse, ...]:
        """What to warn of: weak rules of a phase, and those of the plan that are weak in every phase."""
        shared = len(self.plan.rules)
        own = [use for part in self.parts for use in part.uses[: len(part.uses) - shared] if use.weak]
        plans = zip(*(part.uses[len(part.uses) - shared :] for part in self.parts), strict=True)
        return (*own, *(max(uses, key=lambda use: use.decided) for uses in plans if all(use.weak for use in uses)))

    @cached_property
    def always_frozen(self) -> tuple[Row, ...]:
        """The rows of what is frozen in every phase."""
        return tuple(
            rows[0] for rows in zip(*(part.rows for part in self.parts), strict=True) if all(r.frozen for r in rows)
        )

    @cached_property
    def always_frozen_buffers(self) -> tuple[str, ...]:
        """The names of the buffers that are frozen in every phase."""
        phases = zip(*(part.buffers for part in self.parts), strict=True)
        return tuple(rows[0].name for rows in phases if all(row.frozen for row in rows))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The optimizer's groups: what is ever trained, merged by all settings over all phases, in the model's order.

        So every phase finds its tensors in the same groups, and none is ever added to an optimizer.
        """
        merged: dict[tuple[tuple[float | None, ...], float], list[Row]] = {}
        for rows in zip(*(part.rows for part in self.parts), strict=True):
            rates = tuple([row.lr_mult for row in rows])
            if rates.count(None) < len(rates):
                merged.setdefault((rates, rows[0].wd_mult), []).append(rows[0])
        return tuple(
            Group(_group_name(rates, wd), rates, wd, tuple(row.name for row in rows), sum(row.elements for row in rows))
            for (rates, wd), rows in merged.items()
        )


def _decisions(part: Resolution) -> list[Row]:
    """The rows without the number of the rule, which counts the phase's own rules."""
    return [row._replace(rule=None) for row in part.rows]


def _group_name(rates: tuple[float | None, ...], wd_mult: float) -> str:
    decay = {0.0: ", no decay", 1.0: ""}.get(wd_mult, f", wd_mult={wd_mult:g}")
    return f"lr_mult={in_phases(['frozen' if rate is None else f'{rate:g}' for rate in rates])}{decay}"


def in_phases(shown: Sequence[str]) -> str:
    """Write what holds in each phase, one behind the other; what holds in three or more that follow, with a count.

    Examples:
        >>> in_phases(["1", "1"]), in_phases(["frozen", "1"]), in_phases(["frozen", "frozen", "frozen", "0.5", "1"])
        ('1', 'frozen/1', '3 frozen/0.5/1')
    """
    if len(set(shown)) == 1:
        return shown[0]
    runs = ((text, len(list(run))) for text, run in itertools.groupby(shown))
    return "/".join(f"{count} {text}" if count > 2 else "/".join([text] * count) for text, count in runs)
