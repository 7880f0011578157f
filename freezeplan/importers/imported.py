"""What an importer returns: the plan, and what a reader has to know about it."""

from __future__ import annotations

from dataclasses import dataclass

from freezeplan.plan.schema import Plan


@dataclass(frozen=True)
class Imported:
    """A plan from another tool's file.

    Examples:
        >>> Imported(Plan(version=1, rules=[{"match": ".*", "lr_mult": 1}])).notes
        ()
    """

    plan: Plan
    """Does what the file does, apart from what the notes say."""
    notes: tuple[str, ...] = ()
    """Differences from the tool, and what of the file was not taken over, with its place; one sentence each."""
