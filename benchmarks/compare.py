"""Plans compared by one command, beside one command for each plan: what they share is read, decoded and run once.

``python benchmarks/compare.py flowers5_voc.tar --weights tf_efficientnet_lite0.safetensors``

Eight presets at one rate with one seed. Each command is a process of its own with an empty cache of features, and its
whole time counts. The second ratio is that of the presets that freeze all but the last stage: both in one command,
beside the slower of them alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from timing import machine

PRESETS = (
    "linear_probe", "surgical_last", "frozen_stages_3", "frozen_stages_2", "frozen_stages_1", "lp_ft", "head_then_all",
    "full",
)  # fmt: skip
LAST_STAGE = ("linear_probe", "surgical_last")


def seconds(plans: Sequence[str], given: argparse.Namespace) -> float:
    """Return the seconds of one ``freezeplan compare``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "freezeplan", "compare", *plans, "--model", given.model, "--data", str(given.data),
            "--image-size", str(given.image_size), "--epochs", str(given.epochs), "--lr", "0.001",
            "--out", f"{folder}/out", "--cache-dir", f"{folder}/cache",
            *(["--weights", given.weights] if given.weights else []),
        ]  # fmt: skip
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> None:
    """Run every plan alone, then all of them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what freezeplan compare takes")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", help="a file of weights; timm's pretrained ones if not given")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    alone = {}
    for plan in PRESETS:
        alone[plan] = seconds([plan], given)
        print(f"{plan:20}{alone[plan]:8.1f} s", flush=True)
    together, last = seconds(PRESETS, given), seconds(LAST_STAGE, given)
    slower = max(alone[plan] for plan in LAST_STAGE)
    print(f"{'all, one by one':20}{sum(alone.values()):8.1f} s")
    print(f"{'all in one command':20}{together:8.1f} s{together / sum(alone.values()):8.2f} of it")
    print(f"{' and '.join(LAST_STAGE)}: {last:.1f} s, {last / slower:.2f} of the slower one alone")
    if given.json is not None:
        found = {"alone": alone, "together": together, "last_stage": last, **machine()}
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
