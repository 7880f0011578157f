"""Plans in other trainers: one module for each, which imports its trainer and is imported only where it is used.

Imports ``api`` and ``applied_plan`` alone. Begin with ``plans.py``, which they share.
"""
