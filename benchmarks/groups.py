"""An optimizer's step: the plan's merged groups against one group a parameter, as layer decay is often written.

``python benchmarks/groups.py --model vit_base_patch16_224``. The same rates on both sides (preset ``llrd``, 0.75), for
AdamW and SGD, each for-loop, foreach and fused, and RMSprop (``--model vgg16``), which has no fused step: for-loop,
foreach and compiled by ``torch.compile``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import alternate, show

from freezeplan import apply_plan
from freezeplan.model.describer import create_model

KINDS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}, "compiled": {}}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}, ("for-loop", "foreach", "fused")),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, ("for-loop", "foreach", "fused")),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-10}, ("for-loop", "foreach", "compiled")),
}


def make_step(name: str, optimizer: str, kind: str, *, merged: bool) -> Callable[[], object]:
    """Return the step of an optimizer that has gradients."""
    model = create_model(name, num_classes=10)
    groups = apply_plan(model, "llrd", lr=1e-5, weight_decay=0.05).param_groups
    if not merged:
        keys = ("lr", "weight_decay")
        groups = [
            {"params": [parameter], **{key: group[key] for key in keys}}
            for group in groups
            for parameter in group["params"]
        ]
    maker, more, _ = OPTIMIZERS[optimizer]
    made = maker(groups, **more, **KINDS[kind])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return torch.compile(made.step) if kind == "compiled" else made.step


def main() -> None:
    """Time both sides in turns, an optimizer after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for optimizer in OPTIMIZERS:
        ways = {
            f"{kind}, {'merged' if merged else 'one a parameter'}": make_step(
                given.model, optimizer, kind, merged=merged
            )
            for kind in OPTIMIZERS[optimizer][2]
            for merged in (False, True)
            if merged or kind != "compiled"  # a program of its own for each group
        }
        title = f"{optimizer}'s step: {given.model}, llrd, {torch.get_num_threads()} threads"
        show(title, alternate(ways, given.rounds), "for-loop, one a parameter", given.json)


if __name__ == "__main__":
    main()
