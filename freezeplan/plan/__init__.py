"""The plan language: a file, a dict or a preset becomes a checked ``Plan``.

Imports only ``errors``, and no torch: plans are data. Begin with ``schema.py``, the pydantic models; then ``load.py``,
which reads a file and gives every mistake its line and column; ``dump.py`` writes a plan back.
"""

from freezeplan.plan.dump import dump
from freezeplan.plan.fields import ROLES, SELECTORS, Mode
from freezeplan.plan.load import PlanLike, load_plan, load_presets, read_data, read_text
from freezeplan.plan.schema import Phase, Plan, Plateau, Rate, Rule

__all__ = [
    "ROLES", "SELECTORS", "Mode", "Phase", "Plan", "PlanLike", "Plateau", "Rate", "Rule", "dump", "load_plan",
    "load_presets", "read_data", "read_text",
]  # fmt: skip
