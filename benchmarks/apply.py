"""What ``apply_plan`` costs beside creating the model: one model of every architecture module of timm, and ViT-B.

``python benchmarks/apply.py``. Both are timed in turns for each model; ``--models`` names some instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import timm
from timing import machine

from freezeplan import FreezePlanError, apply_plan, resolve_plan
from freezeplan.zoo import create_model


def smallest() -> dict[str, str]:
    """Return each architecture module of timm with its model that is named first."""
    found: dict[str, str] = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        if module not in found or len(name) < len(found[module]):
            found[module] = name
    return found


def fits(name: str) -> bool:
    """Return whether a model has a classifier to train alone."""
    try:
        resolve_plan("linear_probe", create_model(name, meta=True))
    except FreezePlanError:
        return False
    return True


def main() -> None:
    """Print a line a model, the slowest share last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for name in given.models or [*smallest().values(), "vit_base_patch16_224"]:
        create, apply = [], []
        plan = "linear_probe" if fits(name) else "full"
        for _ in range(given.rounds):
            start = time.perf_counter()
            model = timm.create_model(name)
            made = time.perf_counter()
            apply_plan(model, plan)
            create.append(made - start)
            apply.append(time.perf_counter() - made)
            del model
            gc.collect()  # a plan and its model refer to each other
        rows.append((statistics.median(apply) / statistics.median(create), name, min(create), min(apply)))
        print(f"{name:40}{min(create) * 1000:10.1f}ms{min(apply) * 1000:8.2f}ms{rows[-1][0]:9.2%}", flush=True)
    over = [row for row in rows if row[3] > max(0.02 * row[2], 0.005)]
    print(f"{len(rows)} models; over the larger of 2 % and 5 ms: {', '.join(row[1] for row in over) or 'none'}")
    if given.json is not None:
        with given.json.open("a", encoding="utf-8") as file:
            for share, name, create_s, apply_s in rows:
                record = {"model": name, "create_s": create_s, "apply_s": apply_s, "share": share, **machine()}
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
