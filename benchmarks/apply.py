"""What ``apply_plan`` costs beside creating the model: one model of every architecture module of timm, and ViT-B.

``python benchmarks/apply.py``. All are timed in turns for each model; ``--models`` names some instead. ``by hand`` is
the loop that everybody writes, on a model that was created just as freshly: a flag for each parameter, and ``eval()``.
It decides nothing and checks nothing, and is what setting them costs at least.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from pathlib import Path

import timm
from timing import machine
from torch import nn

from freezeplan import FreezePlanError, apply_plan, resolve_plan
from freezeplan.model.describer import create_model


def usual() -> list[str]:
    """Return a model of each architecture module of timm, the one that the tests take, and ViT-B."""
    listed = json.loads((Path(__file__).parents[1] / "tests" / "zoo.json").read_text(encoding="utf-8"))
    return [*(entry["model"] for entry in listed.values()), "vit_base_patch16_224"]


def fits(name: str) -> bool:
    """Return whether a model has a classifier to train alone."""
    try:
        resolve_plan("linear_probe", create_model(name, meta=True))
    except FreezePlanError:
        return False
    return True


def by_hand(model: nn.Module) -> None:
    """Freeze what is not the classifier, as it is done without a plan."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head", "fc", "classifier")))
    model.eval()


def main() -> None:
    """Print a line a model, and those that are over the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{'':34}{'modules':>8}{'creating':>12}{'by hand':>10}{'apply_plan':>12}{'share':>9}")
    for name in given.models or usual():
        plan = "linear_probe" if fits(name) else "full"
        ways = {"by_hand": by_hand, "apply": functools.partial(apply_plan, plan=plan)}
        seconds: dict[str, list[float]] = {"create": [], **{way: [] for way in ways}}
        for _ in range(given.rounds):
            for way, change in ways.items():
                start = time.perf_counter()
                model = timm.create_model(name)
                made = time.perf_counter()
                change(model)
                seconds["create"].append(made - start)
                seconds[way].append(time.perf_counter() - made)
                modules = len(list(model.modules()))
                del model
                gc.collect()  # a plan and its model refer to each other
        share = statistics.median(seconds["apply"]) / statistics.median(seconds["create"])
        fastest = {f"{what}_s": min(found) for what, found in seconds.items()}
        rows.append({"model": name, "modules": modules, **fastest, "share": share})
        create, hand, apply = (1000 * value for value in fastest.values())
        print(f"{name:34}{modules:8}{create:10.1f}ms{hand:8.2f}ms{apply:10.2f}ms{share:9.2%}", flush=True)
    over = [row for row in rows if row["apply_s"] > max(0.02 * row["create_s"], 0.005)]
    print(f"{len(rows)} models; over the larger of 2 % and 5 ms: {len(over)}")
    for row in over:
        more = row["apply_s"] / row["by_hand_s"]
        print(f"  {row['model']}: {1000 * row['apply_s']:.1f} ms, {more:.1f} times what is done by hand")
    if given.json is not None:
        with given.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**row, **machine()}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
