"""All that decides a training besides data, model, weights, plans and seeds. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["rmsprop-tf1", "rmsprop", "adamw", "sgd"]
Amp = Literal["bf16", "fp16"]
Flatten = Literal["chw", "hwc"]
Augment = Literal["none", "flip", "crop-flip"]
Normalise = Literal["weights", "imagenet", "half", "bgr-mean"]
LabelRule = Literal["largest", "first"]
Resize = Literal["squash", "center-crop"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Settings:
    """All that decides a run besides data, model, weights, arms and seeds."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step, at most: an epoch is cut into parts as equal as they can be, so that none is of one image."""
    image_size: int
    """Side of the square images in pixels."""
    lr: float = 5e-4
    """Base learning rate, constant after the warm-up; the lecture's."""
    optimizer: OptimizerName = "rmsprop-tf1"
    clip: float | None = None
    """Largest L2 norm of all gradients together; None: no clipping."""
    warmup: int = 0
    """Steps over which the rate grows linearly from nothing."""
    label: LabelRule = "largest"
    augment: Augment = "none"
    """How training images differ from epoch to epoch; validation images never do."""
    normalise: Normalise = "weights"
    flatten: Flatten = "chw"
    """Order in which VGG16's pool5 is flattened."""
    resize: Resize = "squash"
    device: str = "cpu"
    threads: int = 1
    """Threads inside torch; their number changes the last digits of a result on the CPU."""
    workers: int = 1
    """Threads that decode images, once, before training."""
    skip_bad: bool = False
    """Leave out images that do not decode."""
    cache: bool = True
    """Run what is frozen ahead of everything trained once an image, and keep its features on disk."""
    cache_dir: str | None = None
    """Folder of features; None: the user's cache folder."""
    cache_limit: int | None = None
    """Bytes that it may hold at most; None: what the disk has."""
    channels_last: bool = True
    """Keep numbers of images and convolutions channel by channel of a pixel, which convolutions run faster on."""
    compile: bool = False
    """Run the model, or what is left of it to run on features, and the optimizer's step through ``torch.compile``."""
    amp: Amp | None = None
    """Numbers of matrix products and convolutions under autocast, of fp16 with a scaled loss; None: float32."""
    cuda_graph: bool = False
    """On a CUDA device, launch a step behind cached features as one CUDA graph, after a comparison with plain steps."""
