"""The plan language as data: pydantic models, frozen, unknown keys forbidden. Nothing here imports torch.

A plan says what a rule *selects* (``match``, ``role``) and what it *sets* (a rate, ``wd_mult``, ``mode``, ``reinit``).
Whether a rule fits a model is not decided here but in ``freezeplan.resolve``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from freezeplan.plan.fields import (
    SELECTORS,
    SETTINGS,
    Frozen,
    LayerDecay,
    Mode,
    Multiplier,
    Pattern,
    Role,
    check_lines,
    check_printable,
    check_stage,
    check_version,
    patterns,
    roles,
    stages,
)
from freezeplan.plan.location import Loc, Source


def _check_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if not rules:
        raise PydanticCustomError("no_rules", "a plan has at least one rule, found an empty list")
    return rules


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Rate(_Data):
    """What happens to a parameter that no rule gives a rate: exactly one of ``frozen: true`` and ``lr_mult``.

    Examples:
        >>> Rate(lr_mult=0.1)
        Rate(frozen=None, lr_mult=0.1)
    """

    frozen: Frozen | None = None
    """True: no gradient, in no optimizer group, batch-norm statistics are not updated, dropout is off."""
    lr_mult: Multiplier | None = None
    """Multiplies the base learning rate; greater than 0, dimensionless."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Rate:
        if (self.frozen is None) == (self.lr_mult is None):
            raise PydanticCustomError("default_rate", "default is exactly {frozen: true} or {lr_mult: x}")
        return self


class Rule(_Data):
    """One rule: at least one selector and at least one setting. All selectors given must hold.

    Examples:
        >>> Rule(match="features", lr_mult=0.2).match
        ('features',)
        >>> Rule(role="norm", mode="eval").settings
        ('mode',)
    """

    match: Annotated[tuple[Pattern, ...], *patterns] | None = None
    """Regular expression that must match the whole dotted name of a parameter, or of a module above it (then everything
    below that module is selected). With a lookaround it is held against the parameter's full name only. A list means
    any of them."""
    type: Annotated[tuple[Pattern, ...], *patterns] | None = None
    """Regular expression that must match the whole class name of a module, its own or a base's; it takes that module
    and all below. A list means any of them."""
    role: Annotated[tuple[Role, ...], *roles] | None = None
    """What timm knows of the architecture: ``head`` (the classifier; in a model that contains timm models all that is
    in none of them too), ``stem`` (stage 0), ``body`` (all but the head), ``norm`` (normalisation layers), ``bias``,
    ``pos_embed`` (position embeddings and the position biases of attention, absolute and relative: learned tensors, and
    the convolutions and small networks that make them), ``no_weight_decay`` (what timm's method of that name lists). A
    list means any of them."""
    stage: Annotated[tuple[Annotated[str, BeforeValidator(check_stage)], ...], *stages] | None = None
    """Depth: 0 is the stem, stages count from 1, -1 is the last one, in each timm model by itself; an integer or a
    range with both ends included: ``2``, ``1..3``, ``..2``, ``3..``. A list means any of them."""
    frozen: Frozen | None = None
    """True: no gradient, in no optimizer group, batch-norm statistics are not updated, dropout is off. Not together
    with lr_mult."""
    lr_mult: Multiplier | None = None
    """Multiplies the base learning rate; greater than 0, dimensionless. To freeze, say ``frozen: true``."""
    wd_mult: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = None
    """Multiplies the weight decay that the parameter would get (0 for biases, 1-d tensors and timm's no_weight_decay);
    0 or greater, dimensionless."""
    layer_decay: LayerDecay | None = None
    """The plan's ``layer_decay``, for what is selected; in (0, 1]. For two backbones that need different ones."""
    mode: Mode | None = None
    """``eval`` or ``train``, of the modules that own what is selected. A rule with ``mode`` alone also reaches modules
    without parameters, such as dropout."""
    reinit: Annotated[bool, Field(strict=True)] | None = None
    """True: the values that a freshly created model of the same architecture has. False: keep the values, and settle it
    for later rules."""
    optional: Annotated[bool, Field(strict=True)] = False
    """True: matching nothing is a line of the report and no error; for presets that fit many architectures."""

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if self.frozen and self.lr_mult is not None:
            raise PydanticCustomError("two_rates", "a rule has frozen or lr_mult, not both")
        if not any(getattr(self, key) is not None for key in SELECTORS):
            raise PydanticCustomError(
                "no_selector", "a rule selects with match, type, role or stage; this one has none"
            )
        if not self.settings:
            raise PydanticCustomError(
                "no_setting", "a rule sets something: frozen, lr_mult, wd_mult, layer_decay, mode or reinit"
            )
        return self

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that this rule gives, some of ``SETTINGS``, in that order."""
        given = ["rate"] if self.frozen or self.lr_mult is not None else []
        return (*given, *(key for key in SETTINGS[1:] if getattr(self, key) is not None))

    @property
    def text(self) -> str:
        """The selectors as a reader would write them, such as ``match: features`` or ``role: norm, match: layer1``."""
        given = ((key, getattr(self, key)) for key in SELECTORS)
        return ", ".join(
            f"{key}: {v[0] if len(v) == 1 else '[' + ', '.join(v) + ']'}" for key, v in given if v is not None
        )


class Plateau(_Data):
    """A phase ends when a metric has stopped getting better.

    Examples:
        >>> Plateau(metric="val_loss", patience=2).goal
        'min'
    """

    metric: Annotated[str, Field(strict=True, min_length=1), AfterValidator(check_printable)]
    """Name under which ``applied.step(metrics={...})`` gets it."""
    patience: Annotated[int, Field(strict=True, ge=1)]
    """Epochs without a new best value after which the phase ends."""
    goal: Literal["min", "max"] = "min"
    """Whether small values are good (a loss) or large ones (an accuracy)."""


def _until_kind(value: object) -> str | None:
    if isinstance(value, (dict, Plateau)):
        return "plateau"
    if isinstance(value, str):
        return "percent"
    return "epochs" if isinstance(value, int) and not isinstance(value, bool) else None


Until = Annotated[
    Annotated[int, Field(strict=True, ge=1), Tag("epochs")]
    | Annotated[str, Field(strict=True, pattern=r"^(?:[1-9]|[1-9]\d)(?:\.\d+)?%$"), Tag("percent")]
    | Annotated[Plateau, Tag("plateau")],
    Discriminator(
        _until_kind,
        custom_error_type="bad_until",
        custom_error_message="until is an epoch (3), a percentage ('25%') or a plateau {metric: val_loss, patience: 2}",
    ),
]


class Phase(_Data):
    """A part of the training with rules of its own, which stand before the plan's.

    Examples:
        >>> Phase(name="head", until=2, rules=[Rule(role="head", lr_mult=1), Rule(match=".*", frozen=True)]).until
        2
    """

    name: Annotated[str, Field(strict=True, min_length=1), AfterValidator(check_printable)]
    """What the phase is called in reports; no two alike."""
    until: Until | None = None
    """Where it ends: before this epoch, counted from 0 since the start of training; after this percentage of the
    epochs; or at a plateau. The last phase has none."""
    rules: tuple[Rule, ...] = ()
    """Rules that hold in this phase, ahead of the plan's."""


class Plan(_Data):
    """A plan: rules in order of precedence. For each setting, the first matching rule that sets it wins.

    Plans compare by what they say, not by the file they were written in.

    Examples:
        >>> plan = Plan(version=1, rules=[Rule(role="head", lr_mult=1), Rule(match=".*", frozen=True)])
        >>> plan.model_dump(mode="json", exclude_defaults=True)["rules"]
        [{'role': 'head', 'lr_mult': 1.0}, {'match': '.*', 'frozen': True}]
    """

    version: Annotated[Literal[1], BeforeValidator(check_version)]
    """Version of the plan language, always 1; readable through all of freezeplan 1.x."""
    name: Annotated[str, Field(strict=True), AfterValidator(check_printable)] | None = None
    """What the plan is called in reports."""
    description: Annotated[str, Field(strict=True), AfterValidator(check_lines)] | None = None
    """What it is for, and the source of the method."""
    rules: Annotated[tuple[Rule, ...], AfterValidator(_check_rules)]
    """The rules, first match first."""
    default: Rate | None = None
    """The rate of what no rule gives one; without it such a parameter is an error."""
    layer_decay: LayerDecay | None = None
    """Multiplies every lr_mult by this to the power of the layers behind it, as timm's ``--layer-decay``; in (0, 1]. A
    timm model inside of another module counts its own layers, and what is in none stands behind the last of them."""
    layer_decay_min_scale: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    """The smallest factor that layer_decay gives, as timm's; in [0, 1], 0 if absent."""
    weight_decay: Literal["timm", "all"] = "timm"
    """``timm``: biases, tensors of at most one dimension and timm's ``no_weight_decay()`` get none. ``all``: all do."""
    overlap: Literal["first", "error"] = "first"
    """``first``: the first matching rule wins. ``error``: two rules that set one thing on one tensor are an error."""

    phases: tuple[Phase, ...] = ()
    """Parts of the training, in order; without any the rules hold throughout."""

    _source: Source = PrivateAttr(default_factory=Source)

    @model_validator(mode="after")
    def _min_scale_needs_decay(self) -> Plan:
        if self.layer_decay_min_scale is not None and not self.decays:
            raise PydanticCustomError("min_scale_alone", "layer_decay_min_scale needs layer_decay")
        return self

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> Plan:
        names = [phase.name for phase in self.phases]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PydanticCustomError("phase_twice", "two phases are called {name}", {"name": repr(twice)})
        for phase in self.phases[:-1]:
            if phase.until is None:
                raise PydanticCustomError(
                    "phase_endless", "phase {name} says no until, and only the last may", {"name": repr(phase.name)}
                )
        if self.phases and self.phases[-1].until is not None:
            raise PydanticCustomError(
                "last_phase_ends",
                "the last phase, {name}, has no until: it goes on to the end",
                {"name": repr(names[-1])},
            )
        for kind in (int, str):
            ends = [float(str(p.until).rstrip("%")) for p in self.phases if isinstance(p.until, kind)]
            if ends != sorted(set(ends)):
                raise PydanticCustomError("phase_order", "phases end one after the other; until must grow")
        return self

    @property
    def source(self) -> Source:
        """Where the plan was written: turns a place inside the plan into ``file:line:column``."""
        return self._source

    @property
    def title(self) -> str:
        """The plan's name, or its file's, or ``plan``."""
        return self.name or self._source.file or "plan"

    @property
    def parts(self) -> tuple[Plan, ...]:
        """The plan of each phase, without phases: its rules, then the plan's. A plan without phases is its only part.

        Examples:
            >>> phases = [{"name": "head", "until": 1, "rules": [{"match": ".*", "frozen": True}]}, {"name": "all"}]
            >>> plan = Plan(version=1, phases=phases, rules=[Rule(match=".*", lr_mult=1)])
            >>> [len(part.rules) for part in plan.parts]
            [2, 1]
        """
        return tuple(self._part(index) for index in range(len(self.phases))) or (self,)

    @property
    def placed(self) -> tuple[tuple[Loc, Rule], ...]:
        """Every rule with its place in the plan, those of the phases first."""
        phased = [
            (("phases", p, "rules", r), rule)
            for p, phase in enumerate(self.phases)
            for r, rule in enumerate(phase.rules)
        ]
        return (*phased, *((("rules", index), rule) for index, rule in enumerate(self.rules)))

    @property
    def asks(self) -> frozenset[str]:
        """What the plan asks of a model beyond names and classes: roles, ``stage``, ``layer_decay``.

        Examples:
            >>> sorted(Plan(version=1, rules=[Rule(role="head", lr_mult=1), Rule(stage="..2", frozen=True)]).asks)
            ['head', 'stage']
        """
        rules = [rule for _, rule in self.placed]
        found = {str(role) for rule in rules for role in rule.role or ()}
        found |= {"stage"} if any(rule.stage for rule in rules) else set()
        return frozenset(found | ({"layer_decay"} if self.decays else set()))

    @property
    def decays(self) -> bool:
        """Whether the plan or a rule of it has a ``layer_decay``."""
        return self.layer_decay is not None or any(rule.layer_decay is not None for _, rule in self.placed)

    def _part(self, index: int) -> Plan:
        own = self.phases[index].rules
        places: dict[Loc, Loc] = {("rules", i): ("phases", index, "rules", i) for i in range(len(own))}
        places |= {("rules", len(own) + i): ("rules", i) for i in range(len(self.rules))}
        part = self.model_copy(update={"rules": own + self.rules, "phases": ()})
        return part.from_source(self._source.moved(places))

    def from_source(self, source: Source) -> Plan:
        """Return the same plan with the place where it was written."""
        plan = self.model_copy()
        plan._source = source
        return plan
