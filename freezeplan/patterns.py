"""A pattern of a plan, held against names: Python's regular expressions, bounded in time.

A pattern with several repetitions, or one of a group, can take longer than the age of the universe on a hundred
characters. Such patterns are matched by the package ``regex``, which means the same by them and can be stopped on every
thread and platform. No torch.
"""

from __future__ import annotations

import re
import time

import regex

from freezeplan.errors import PlanError

SECONDS = 0.5
"""That all names together may take for one pattern; a usual one takes some milliseconds for the largest model."""
_QUIET = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]")
_REPEATS = re.compile(r"[*+?{]")
_GROUP_REPEATS = re.compile(r"\)[*+{]")


class SlowPatternError(PlanError):
    """A pattern takes too long."""


class Pattern:
    """A regular expression that gives up after a while.

    Args:
        text: A valid regular expression of Python's ``re``.

    Examples:
        >>> Pattern(r"blocks[.][0-3]").fullmatch("blocks.2"), Pattern("a|b").fullmatch("ab")
        (True, False)
        >>> Pattern("(a|a)+b").fullmatch("a" * 60)
        Traceback (most recent call last):
            ...
        freezeplan.patterns.SlowPatternError: pattern '(a|a)+b' takes more than 0.5 seconds
          repetitions inside repetitions, or of alternatives that begin alike, try every way to split a name
    """

    def __init__(self, text: str):
        self._text = text
        bare = _QUIET.sub("", text)
        self._risky = len(_REPEATS.findall(bare)) > 1 or _GROUP_REPEATS.search(bare) is not None
        self._plain = re.compile(text)
        self._bounded = regex.compile(text) if self._risky else None
        self._left = SECONDS

    def fullmatch(self, name: str) -> bool:
        """Return whether the pattern matches a whole name.

        Raises:
            SlowPatternError: If that, and what was asked before, takes more than ``SECONDS``.
        """
        return self._matches("fullmatch", name)

    def search(self, name: str) -> bool:
        """Return whether the pattern matches a part of a name.

        Raises:
            SlowPatternError: If that, and what was asked before, takes more than ``SECONDS``.
        """
        return self._matches("search", name)

    def _matches(self, way: str, name: str) -> bool:
        if self._bounded is None:
            return getattr(self._plain, way)(name) is not None
        begun = time.perf_counter()
        try:
            found = getattr(self._bounded, way)(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise SlowPatternError(
                f"pattern {self._text!r} takes more than {SECONDS:g} seconds",
                notes=[
                    "repetitions inside repetitions, or of alternatives that begin alike, try every way to split a name"
                ],
            ) from None
        self._left -= time.perf_counter() - begun
        return found
