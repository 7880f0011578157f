"""Where a plan was written: a place inside it -> ``file:line:column``. Plain data; imports nothing of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Loc = tuple[str | int, ...]
"""A place inside a plan, as pydantic writes it: ``("rules", 0, "match")``."""


def loc_text(loc: Sequence[str | int]) -> str:
    """Write a place inside a plan as a reader would.

    Examples:
        >>> loc_text(("rules", 1, "match", 0))
        'rules[1].match[0]'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


@dataclass(frozen=True)
class Source:
    """A plan's file and the positions of its parts.

    Two sources always compare equal, as plans compare by what they say.

    Examples:
        >>> source = Source("plan.yaml", {("rules", 0): (3, 5)})
        >>> source.where(("rules", 0, "lr_mult"))
        'plan.yaml:3:5'
        >>> Source("plan.toml").where(("rules", 0))
        'plan.toml'
        >>> Source().where(("rules", 0))
        ''
    """

    file: str = field(default="", compare=False)
    """The file as the user named it, or a preset's name; empty for a plan built in Python."""
    positions: Mapping[Loc, tuple[int, int]] = field(default_factory=dict, compare=False)
    """(line, column), both from 1, of the parts that have one."""

    def where(self, loc: Loc) -> str:
        """Return ``file:line:column`` of ``loc`` or of the nearest part above it that has a position."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.positions:
                line, column = self.positions[loc[:end]]
                return f"{self.file}:{line}:{column}"
        return self.file

    def moved(self, places: Mapping[Loc, Loc]) -> Source:
        """Return the source of a plan that is put together from parts of this one: new place -> old place of a part."""
        positions = {
            (*new, *loc[len(old) :]): position
            for new, old in places.items()
            for loc, position in self.positions.items()
            if loc[: len(old)] == old
        }
        return Source(
            self.file, {**{loc: p for loc, p in self.positions.items() if loc[:1] != ("rules",)}, **positions}
        )

    def line(self, loc: Loc) -> str:
        """Return ``, line N`` for a sentence about ``loc``, or nothing where no line is known."""
        position = self.positions.get(loc)
        return f", line {position[0]}" if position else ""
