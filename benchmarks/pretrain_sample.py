"""The convolutions that come with the sample, trained again: a slim VGG16 on 48 shapes that are not the sample's.

``python benchmarks/pretrain_sample.py --out FILE`` takes about ten minutes on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from freezeplan.atomic import whole_file
from freezeplan.errors import ModelError
from freezeplan.voc_vgg16.model import VGGFlat
from freezeplan.voc_vgg16.sample import Outline, draw_many, source_shapes, weights_path

RECIPE = 1
"""Version of the source task and its training; a change of either makes the shipped weights another file."""


def pretrain(
    path: Path, *, seed: int = 0, train: int = 19_200, test: int = 2_400, epochs: int = 12, batch_size: int = 64
) -> float:
    """Train the slim VGG16 with batch norm on the source task, fold the batch norm away, write the convolutions.

    Uses one thread, since the number of threads changes the last digits and with them everything. Torch's random state
    and number of threads are afterwards as they were.

    Args:
        path: The safetensors file; replaced when the training is done, not before.
        seed: Decides images, initial weights and order.
        train: Number of source images to train on.
        test: Number of source images to measure the error on.
        epochs: Passes over the training images.
        batch_size: Images in one step of AdamW.

    Returns:
        The error on the test images, 0 to 1.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     error = pretrain(Path(folder, "weights.safetensors"), train=32, test=48, epochs=1, batch_size=16)
        ...     0 <= error <= 1, Path(folder, "weights.safetensors").stat().st_size < 2_000_000
        (True, True)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            features, error = _trained(seed, train, test, epochs, batch_size)
    finally:
        torch.set_num_threads(threads)
    plain = fold_batch_norm(features).state_dict()
    weights = {f"features.{name}": tensor.contiguous() for name, tensor in plain.items()}
    facts = {"recipe": RECIPE, "seed": seed, "images": train, "epochs": epochs, "source_error": round(error, 4)}
    metadata = {"format": "pt", **{name: str(value) for name, value in facts.items()}}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(weights, metadata))
    return error


def _trained(seed: int, train: int, test: int, epochs: int, batch_size: int) -> tuple[nn.Sequential, float]:
    shapes = source_shapes()
    images, labels = _tensors(shapes, train, seed=seed, stream=2)
    test_images, test_labels = _tensors(shapes, test, seed=seed, stream=3)
    model: VGGFlat = timm.create_model("vgg16_slim_fc256", num_classes=len(shapes), norm_layer=nn.BatchNorm2d)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    steps = train // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(train)[: steps * batch_size].view(steps, batch_size):
            loss = F.cross_entropy(model(_normalised(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        answers = [model(_normalised(batch)).argmax(1) for batch in test_images.chunk(-(-test // batch_size))]
    return model.features, (torch.cat(answers) != test_labels).float().mean().item()


def _tensors(shapes: Mapping[str, Outline], count: int, *, seed: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawings = draw_many(shapes, count, seed=seed, stream=stream)
    number = {name: k for k, name in enumerate(shapes)}
    images = torch.from_numpy(np.stack([drawing.pixels for drawing in drawings])).permute(0, 3, 1, 2)
    return images, torch.tensor([number[drawing.objects[0][0]] for drawing in drawings])


def _normalised(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - 0.5) / 0.25


def fold_batch_norm(features: nn.Sequential) -> nn.Sequential:
    """Return convolutions that compute in eval mode what ``features`` computes, without its batch norms.

    Each batch norm follows its convolution and is multiplied into a copy of it; ``features`` is left as it is.

    Raises:
        ModelError: A batch norm does not follow a convolution.

    Examples:
        >>> plain = fold_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
        >>> [type(layer).__name__ for layer in plain]
        ['Conv2d', 'ReLU']
    """
    layers: list[nn.Module] = []
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            if not layers or not isinstance(layers[-1], nn.Conv2d):
                raise ModelError("a batch norm follows no convolution and cannot be folded into one")
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def main(
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = weights_path(),  # noqa: B008
    seed: Annotated[int, typer.Option(help="Decides images, initial weights and order.")] = 0,
) -> None:
    """Train the convolutions of the drawn sample again (minutes on one core)."""
    typer.echo(f"{out}: source error {pretrain(out, seed=seed):.1%}")


if __name__ == "__main__":
    typer.run(main)
