"""One family of errors. They keep facts as attributes and build the sentence from them.

Nothing here imports anything of the package. Every error is a list of problems, so that a plan with ten mistakes is
reported once with ten lines and not ten times with one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what, and what to do about it.

    Examples:
        >>> print(Problem("unknown key 'lr_mul'", where="plan.yaml:4:5", notes=("did you mean 'lr_mult'?",)))
        plan.yaml:4:5: unknown key 'lr_mul'
          did you mean 'lr_mult'?
    """

    message: str
    """What was found and what was expected, one sentence."""
    where: str = ""
    """``file:line:column`` or another place a reader can go to; empty when there is none."""
    notes: tuple[str, ...] = ()
    """Nearest names, what exists, the edit or the command that helps; one line each."""

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


class FreezePlanError(ValueError):
    """Something that the user gave is wrong; the base of every error that freezeplan raises on purpose.

    Examples:
        >>> error = FreezePlanError("no such folder 'VOC'", notes=["give --data PATH"])
        >>> error.problems
        (Problem(message="no such folder 'VOC'", where='', notes=('give --data PATH',)),)
    """

    problems: tuple[Problem, ...]

    def __init__(self, problem: str | Problem | Iterable[Problem], *, where: str = "", notes: Sequence[str] = ()):
        if isinstance(problem, str):
            problem = Problem(problem, where, tuple(notes))
        self.problems = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[FreezePlanError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class PlanError(FreezePlanError):
    """A plan cannot be read, is not valid, or does not fit the model."""


class ModelError(FreezePlanError):
    """A model is unknown, cannot be built, or lacks what a plan asks of it."""


class ApplyError(FreezePlanError):
    """A plan fits the model but cannot be applied in the way that was asked for."""


class DataError(FreezePlanError):
    """A data set is missing, damaged or incomplete."""


class WeightsError(FreezePlanError):
    """Weights are missing, damaged or belong to another architecture."""


class OutputError(FreezePlanError):
    """Results cannot be written where they were asked for."""


class MissingExtraError(FreezePlanError, ImportError):
    """A package of an optional extra is not installed, or too old.

    Examples:
        >>> print(MissingExtraError("torchmetrics", "run"))
        this needs torchmetrics, which is not installed
          pip install 'freezeplan[run]'
        >>> print(MissingExtraError("lightning", "lightning", lacks="cannot import name 'pytorch'"))
        this needs a newer lightning, the installed one is too old: cannot import name 'pytorch'
          pip install 'freezeplan[lightning]'
    """

    def __init__(self, package: str, extra: str, *, lacks: str = ""):
        self.package, self.extra, self.lacks = package, extra, lacks
        too_old = f"this needs a newer {package}, the installed one is too old: {lacks}"
        FreezePlanError.__init__(
            self,
            too_old if lacks else f"this needs {package}, which is not installed",
            notes=[f"pip install 'freezeplan[{extra}]'"],
        )

    @classmethod
    def of(cls, error: ImportError, extra: str) -> MissingExtraError:
        """Say what an import lacked that only an extra needs."""
        package, _, inside = (error.name or extra).partition(".")
        there = inside or not isinstance(error, ModuleNotFoundError)
        return cls(package, extra, lacks=str(error).partition(" (")[0] if there else "")

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), lacks=self.lacks), (self.package, self.extra)


class FreezePlanWarning(UserWarning):
    """Something is allowed and probably not meant."""


def printable(text: str) -> str:
    r"""Return a text with what a terminal would obey, and every other character that shows nothing, written out.

    Examples:
        >>> print(printable("a" + chr(27) + "[2J b"))
        a\x1b[2J b
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def nearest(word: str, names: Iterable[str], *, limit: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return at most ``limit`` of ``names`` that look like ``word``, best first, shorter names before longer ones.

    Examples:
        >>> nearest("featuers", ["features", "features.0", "head"])
        ['features']
        >>> nearest("classifier", ["features", "pre_logits", "head"])
        []
    """
    unique = sorted(set(names), key=lambda name: (name.count("."), name))
    close = difflib.get_close_matches(word, unique, n=limit * 4, cutoff=cutoff)
    return [name for name in close if not any(name.startswith(f"{other}.") for other in close)][:limit]


def did_you_mean(word: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return a one-line note that offers the nearest names, or nothing when none is near.

    Examples:
        >>> did_you_mean("frozn", ["frozen", "lr_mult"])
        ("did you mean 'frozen'?",)
    """
    close = nearest(word, names)
    return (f"did you mean {', '.join(map(repr, close))}?",) if close else ()
