"""The commands, one file a noun. Imports everything; nothing imports it. Begin with ``main.py``."""

from freezeplan.cli.main import app, main

__all__ = ["app", "main"]
