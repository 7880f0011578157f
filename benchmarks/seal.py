"""What proving a freeze costs: seal and verify, and their sha256 beside the other digests of Python's ``hashlib``.

``python benchmarks/seal.py --model vgg16 --plan linear_probe``. Each way reads every value that the plan holds still.
``copying`` reads and writes them and computes nothing: no digest can cost less than half of it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from timing import alternate, show
from torch import Tensor

from freezeplan import apply_plan
from freezeplan.apply.frozen import frozen_values
from freezeplan.model.describer import create_model

DIGESTS = ("sha256", "sha512", "sha3_256", "blake2b", "blake2s")
"""Those that nobody can find two models for; md5 and sha1 are broken."""


def main() -> None:
    """Time all ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--plan", default="linear_probe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = create_model(given.model, num_classes=20)
    live = apply_plan(model, given.plan, lr=1e-3)
    held = [tensor for _, tensors in frozen_values(model, live.resolution) for tensor in tensors]
    live.seal()
    ways: dict[str, Callable[[], object]] = {
        "seal": live.seal,
        "verify": live.verify,
        **{name: lambda name=name: digest(name, held) for name in DIGESTS},
        "copying": lambda: [tensor.clone() for tensor in held],
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    title = f"{given.plan} on {given.model}: {len(held)} tensors, {size / 1e6:,.1f} MB that do not change"
    show(title, alternate(ways, given.rounds), "sha256", given.json)


def digest(name: str, tensors: list[Tensor]) -> list[bytes]:
    """Return the digest of each tensor's values."""
    views = [tensor.detach().reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]
    return [hashlib.new(name, view).digest() for view in views]


if __name__ == "__main__":
    main()
