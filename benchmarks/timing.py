"""Ways of doing a thing, timed in turns: what else the machine does hits all of them alike. The result is ratios."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch


def alternate(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run every way once, untimed, then all of them in turns; return the seconds of each round."""
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: Mapping[str, list[float]], base: str, out: Path | None = None) -> dict[str, float]:
    """Print how many times faster than ``base`` each way is, and write it as JSON; return the median ratios.

    Args:
        title: What was timed.
        seconds: Way to its rounds.
        base: The way that counts as 1.
        out: A file that gets one more line of JSON.
    """
    print(title)
    print(f"{'':32}{'fastest':>11}{'median ratio':>14}{'min':>10}{'max':>10}")
    medians = {}
    for way, own in seconds.items():
        ratios = [b / o for b, o in zip(seconds[base], own, strict=True)]
        medians[way] = statistics.median(ratios)
        shown = [
            f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x" for ratio in (medians[way], min(ratios), max(ratios))
        ]
        print(f"{way:32}{min(own) * 1000:9.2f}ms{shown[0]:>14}{shown[1]:>10}{shown[2]:>10}")
    print()
    if out is not None:
        record = {"title": title, "base": base, "seconds": dict(seconds), "median_ratio": medians, **machine()}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return medians


def machine() -> dict[str, str | int]:
    """Return what the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
