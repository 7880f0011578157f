"""A ``Resolution`` for people: rows, trees, explanations, differences, pictures, a forecast of costs.

Imports ``api`` and below. Begin with ``rows.py``; ``terminal.py`` alone imports rich, ``picture.py`` alone matplotlib.
"""
