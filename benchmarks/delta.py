"""A delta file against a whole checkpoint: bytes, and the time to write and to load them.

``python benchmarks/delta.py --model vgg16``. A linear probe with 20 classes. Loading a delta includes the comparison of
the base with its digests; loading a checkpoint compares nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timing import alternate, show

from freezeplan import apply_plan, load_delta
from freezeplan.model.describer import create_model


def main() -> None:
    """Time writing and loading in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = create_model(given.model, num_classes=20)
    live = apply_plan(model, "linear_probe")
    with tempfile.TemporaryDirectory() as folder:
        delta, whole, pickled = (Path(folder, name) for name in ("delta.safetensors", "whole.safetensors", "whole.pt"))
        writing = {
            "whole, torch.save": lambda: torch.save(model.state_dict(), pickled),
            "whole, safetensors": lambda: save_file(model.state_dict(), whole),
            "delta": lambda: live.save_delta(delta),
        }
        show(f"Writing: {given.model}", alternate(writing, given.rounds), "whole, torch.save", given.json)
        live.undo()
        loading = {
            "whole, torch.load": lambda: model.load_state_dict(torch.load(pickled, weights_only=True)),
            "whole, safetensors": lambda: model.load_state_dict(load_file(whole)),
            "delta": lambda: load_delta(model, delta),
        }
        show(f"Loading: {given.model}", alternate(loading, given.rounds), "whole, torch.load", given.json)
        sizes = {path.name: path.stat().st_size for path in (pickled, whole, delta)}
    for name, size in sizes.items():
        print(f"{name:32}{size:>14,} bytes{sizes['whole.pt'] / size:>12,.1f}x smaller")


if __name__ == "__main__":
    main()
