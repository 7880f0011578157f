"""How long until ``freezeplan --help`` answers, beside importing timm: processes started in turns.

``python benchmarks/help.py``
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from timing import alternate, show

WAYS = {
    "import timm": [sys.executable, "-c", "import timm"],
    "freezeplan --help": [sys.executable, "-m", "freezeplan", "--help"],
    "freezeplan presets": [sys.executable, "-m", "freezeplan", "presets"],
    "freezeplan check PLAN": [sys.executable, "-m", "freezeplan", "check", "linear_probe"],
}


def started(command: list[str]) -> Callable[[], object]:
    """Return a call that runs a command to its end."""
    return lambda: subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    """Start all of them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    seconds = alternate({way: started(command) for way, command in WAYS.items()}, given.rounds)
    show("Until a command answers", seconds, "import timm", given.json)


if __name__ == "__main__":
    main()
