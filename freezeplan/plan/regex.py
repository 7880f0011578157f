"""A pattern of a plan, held against names: Python's regular expressions, bounded in time.

A pattern with several repetitions, with one of a group, or with alternatives in several groups, can take longer than
the age of the universe on a hundred characters. Such patterns are matched by the package ``regex``, which means the
same by them and can be stopped on every thread and platform. No torch.
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
_HIDES = re.compile(r"\(\?[#\w-]")
"""Comments and flags: behind them a bracket may open nothing."""
_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d*),?(\d*)\}|.", re.DOTALL)
LONGEST, LARGEST = 10_000, 100_000
"""Characters of a pattern, and of it written out with every counted repetition as copies."""


class SlowPatternError(PlanError):
    """A pattern takes too long."""


def objection(text: str) -> str:
    """Return why a text is no pattern that can be held against names; empty if it is one.

    A count such as ``{4294967294}`` costs nothing in ``re``, and gigabytes in an engine that copies what it repeats.

    Examples:
        >>> objection(r"blocks[.][0-3]"), objection("(a")
        ('', 'is not a regular expression: missing ), unterminated subpattern at character 1')
        >>> objection("((a{99}){99}){99}")
        'has counted repetitions that make more than 100,000 characters'
    """
    if len(text) > LONGEST:
        return f"has {len(text):,} characters, and a pattern has at most {LONGEST:,}"
    try:
        re.compile(text)
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + 1}"
        return f"is not a regular expression: {error.msg}{place}"
    except OverflowError:
        return "repeats more often than can be counted"
    except RecursionError:
        return "is nested too deeply"
    return f"has counted repetitions that make more than {LARGEST:,} characters" if _written_out(text) > LARGEST else ""


def _written_out(text: str) -> int:
    """Characters of a pattern in which ``a{3}`` is written ``aaa``, or a little more."""
    open_, last = [0], 0  # the length of each group that is open, and of what a count would repeat
    for part in _PARTS.finditer(text):
        least, most = part.groups(default="")
        if least or most:
            copies = max(int(least or 0), int(most or 0))
            open_[-1] += last * max(copies - 1, 0)
            last *= copies
        elif part.group() == "(":
            open_.append(0)
        elif part.group() == ")" and len(open_) > 1:
            last = open_.pop() + 1
            open_[-1] += last
        elif part.group() not in ("*", "+", "?"):
            last = 1
            open_[-1] += 1
    return sum(open_)


class Pattern:
    """A regular expression that gives up after a while.

    Args:
        text: A regular expression to which there is no :func:`objection`.

    Examples:
        >>> Pattern(r"blocks[.][0-3]").fullmatch("blocks.2"), Pattern("a|b").fullmatch("ab")
        (True, False)
        >>> Pattern("(a|a)+b").fullmatch("a" * 60)
        Traceback (most recent call last):
            ...
        freezeplan.plan.regex.SlowPatternError: pattern '(a|a)+b' takes more than 0.5 seconds
          repetitions inside repetitions, or of alternatives that begin alike, try every way to split a name
    """

    def __init__(self, text: str):
        self._text = text
        bare = _QUIET.sub("", text)
        self._risky = (
            len(_REPEATS.findall(bare)) > 1
            or _GROUP_REPEATS.search(bare) is not None
            or _HIDES.search(text) is not None
            or ("|" in bare and bare.count("(") > 1)
        )
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
