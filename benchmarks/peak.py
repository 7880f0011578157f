"""How near to the processor's limit do VGG16's convolutions run? Against matrix products of 4096 x 4096, in turns.

``python benchmarks/peak.py``. The peak is the best of all products of the run. ``compiled`` is torch.compile with
inductor's freezing, which bakes the weights in: for features that are computed once, and checked here against the plain
pass. bf16 prints the error that it costs, relative to the largest feature.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch._inductor.config
from timing import alternate, show

from freezeplan.cache.calls import tensors
from freezeplan.model.describer import create_model

FLOPS = 30_693_949_440
"""Of one image of 224 pixels through the convolutions; a multiplication and an addition are two."""


def main() -> None:
    """Time every way in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    features = create_model("vgg16").features.eval().requires_grad_(False)
    images = torch.randn(given.batch_size, 3, 224, 224)
    expected = features(images)
    last = images.contiguous(memory_format=torch.channels_last)
    features_last = create_model("vgg16").features.eval().requires_grad_(False)
    features_last.load_state_dict(features.state_dict())
    features_last.to(memory_format=torch.channels_last)
    left, right = torch.randn(4096, 4096), torch.randn(4096, 4096)

    def half() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return features_last(last)

    features_half = create_model("vgg16").features.eval().requires_grad_(False)
    features_half.load_state_dict(features.state_dict())
    features_half.to(torch.bfloat16, memory_format=torch.channels_last)
    last_half = last.to(torch.bfloat16)

    ways = {
        "matrix product": lambda: left @ right,
        "plain": lambda: features(images),
        "channels-last": lambda: features_last(last),
        "bf16 autocast, channels-last": half,
        "bf16 weights, channels-last": lambda: features_half(last_half),
    }
    if not given.no_compile:
        torch._inductor.config.freezing = True
        compiled = torch.compile(features_last)
        ways["compiled"] = lambda: compiled(last)
    with torch.no_grad():
        seconds = alternate(ways, given.rounds)
        errors = {
            way: float((tensors(run())[0].float() - expected).abs().max() / expected.abs().max())
            for way, run in ways.items()
            if way != "matrix product"
        }
    title = f"VGG16's convolutions, batch {given.batch_size}, {torch.get_num_threads()} threads"
    show(title, seconds, "plain", given.json)
    peak = 2 * 4096**3 / min(seconds["matrix product"])
    print(f"{'':32}{'GFLOP/s':>9}{'of the peak':>13}{'error':>10}")
    for way, error in errors.items():
        speed = FLOPS * given.batch_size / min(seconds[way])
        print(f"{way:32}{speed / 1e9:9.0f}{speed / peak:13.0%}{error:10.1e}")


if __name__ == "__main__":
    main()
