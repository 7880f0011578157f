"""A plan and a model's description become a ``Resolution``: what happens to every tensor, and which rule decided.

Imports ``plan`` and ``model.description``; pure, no torch. Begin with ``resolution.py``, the result; ``select.py``
finds what a rule selects, ``decide.py`` lets the first matching rule decide, ``resolver.py`` puts all together.
"""

from freezeplan.resolve.resolution import Group, Resolution, Row, RuleUse
from freezeplan.resolve.resolver import resolve

__all__ = ["Group", "Resolution", "Row", "RuleUse", "resolve"]
