"""VGG16 with the lecture's head as timm architectures: pool5 flattened, one layer of 256, one layer of classes.

Importing this module registers ``vgg16_fc256`` and ``vgg16_slim_fc256`` for ``timm.create_model``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, to_2tuple
from timm.models import VGG, build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from torch import nn

from freezeplan.errors import ModelError
from freezeplan.training.settings import Flatten

"""Order of a flattened feature map: channel by channel, or pixel by pixel as TensorFlow has it."""
HIDDEN = 256
"""Outputs of the one fully connected layer between pool5 and the classes."""

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
"""Channels of VGG16's thirteen convolutions in order; ``M`` is a 2x2 max pool (configuration D of arXiv:1409.1556)."""
VGG16_SLIM = tuple(width if isinstance(width, str) else width // 8 for width in VGG16)
"""VGG16 at one eighth of its width."""


@register_notrace_module  # fx cannot follow the check of the size
class FlatLinear(nn.Module):
    """Flatten a feature map, one linear layer ``fc``, ReLU; the answer keeps two axes of size one for timm's head.

    Examples:
        >>> FlatLinear(64, (2, 2), 256)(torch.zeros(5, 64, 2, 2)).shape
        torch.Size([5, 256, 1, 1])
    """

    def __init__(self, channels: int, size: tuple[int, int], out_features: int, order: Flatten = "chw", **factory: Any):
        super().__init__()
        self.order = order
        self.in_shape = (channels, *size)
        self.fc = nn.Linear(channels * size[0] * size[1], out_features, **factory)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(batch, channels, height, width)`` to ``(batch, out_features, 1, 1)``.

        Raises:
            ModelError: The map has another size than the one that the layer was made for.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise ModelError(
                f"the fully connected layer was made for features of {_times(self.in_shape)} and got "
                f"{_times(x.shape[1:])}",
                notes=["give img_size= to timm.create_model, or resize the images to the model's input size"],
            )
        ordered = x if self.order == "chw" else x.permute(0, 2, 3, 1)
        hidden: torch.Tensor = self.act(self.fc(ordered.flatten(1)))
        return hidden[:, :, None, None]


class VGGFlat(VGG):  # type: ignore[misc]  # timm has no types
    """timm's VGG with the lecture's classifier: ``pre_logits.fc`` on flattened pool5, ReLU, ``head.fc``.

    All weights of convolutions and linear layers start He-normal over their inputs (arXiv:1502.01852), all biases at
    zero. Everything else (``features.*``, ``forward_features``, ``forward_head``, ...) is timm's.

    Args:
        cfg: Channels of the convolutions, ``"M"`` for a max pool.
        num_classes: Outputs; 0 leaves out ``head.fc``.
        img_size: Height and width of the images in pixels, or one number for both; the model takes no other.
        global_pool: Pooling of timm's head, here over one pixel.
        drop_rate: Dropout ahead of ``head.fc``.
        flatten: Order in which the last feature map is flattened.
        device: Where the parameters live; ``None`` is torch's default device.
        dtype: Type of the parameters; ``None`` is torch's default type.
        **kwargs: Anything else that timm's VGG takes, such as ``in_chans`` and ``norm_layer``.

    Examples:
        >>> model = VGGFlat([8, "M", 16, "M"], num_classes=3, img_size=16)
        >>> model(torch.zeros(2, 3, 16, 16)).shape, model.pre_logits.fc.in_features
        (torch.Size([2, 3]), 256)
    """

    def __init__(
        self,
        cfg: Sequence[int | str],
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        flatten: Flatten = "chw",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        device = device or torch.empty(0).device  # torch 2.6 does not tell a context's device by itself
        # On the meta device timm's 120 million parameters of 4096-wide layers cost nothing before they are replaced.
        with torch.device("meta"):
            super().__init__(cfg, num_classes, drop_rate=drop_rate, **kwargs)
        self.features.to_empty(device=device).to(dtype=dtype)
        factory = {"device": device, "dtype": dtype}
        stride = 2 ** list(cfg).count("M")
        height, width = to_2tuple(img_size)
        self.pre_logits = FlatLinear(self.num_features, (height // stride, width // stride), HIDDEN, flatten, **factory)
        self.head = ClassifierHead(HIDDEN, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.head_hidden_size = HIDDEN
        self._initialize_weights()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace ``head.fc`` by a new one of ``num_classes`` outputs that starts as the first one did; 0 removes it.

        Examples:
            >>> model = VGGFlat([8, "M"], num_classes=3, img_size=8)
            >>> model.reset_classifier(5)
            >>> model.get_classifier()
            Linear(in_features=256, out_features=5, bias=True)
        """
        super().reset_classifier(num_classes, global_pool)
        self.head.apply(_initialize)

    def _initialize_weights(self) -> None:
        self.apply(_initialize)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        # torch's default shrinks the signal layer by layer: thirteen convolutions from scratch stay at chance.
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.reset_parameters()


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _cfg(size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 20,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": tuple(mean),
        "std": tuple(std),
        "first_conv": "features.0",
        "classifier": "head.fc",
    }


default_cfgs = generate_default_cfgs(
    {
        "vgg16_fc256": _cfg(224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "vgg16_slim_fc256": _cfg(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    }
)


def _create(variant: str, channels: Sequence[int | str], pretrained: bool, **kwargs: Any) -> VGGFlat:
    if img_size := kwargs.pop("img_size", None):
        # timm sizes the model and the preprocessing from one entry, so that the two cannot disagree.
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        size = (kwargs.get("in_chans", 3), *to_2tuple(img_size))
        kwargs["pretrained_cfg_overlay"] = {**overlay, "input_size": size}
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4, 5))
    model: VGGFlat = build_model_with_cfg(
        VGGFlat,
        variant,
        pretrained,
        model_cfg=channels,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def vgg16_fc256(pretrained: bool = False, **kwargs: Any) -> VGGFlat:
    """Build VGG16 with the lecture's classifier: 21,142,612 parameters with 20 classes, 224 x 224 pixels.

    Args:
        pretrained: No weights belong to this name; ``features.*`` takes those of timm's ``vgg16``.
        **kwargs: What ``VGGFlat`` takes, such as ``num_classes``, ``img_size`` (pixels) and ``device``.

    Returns:
        A model of ``(batch, 3, img_size, img_size)`` to ``(batch, num_classes)``.

    Examples:
        >>> model = vgg16_fc256(device="meta")
        >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.features.parameters())
        (21142612, 14714688)
    """
    return _create("vgg16_fc256", VGG16, pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def vgg16_slim_fc256(pretrained: bool = False, **kwargs: Any) -> VGGFlat:
    """Build the same at one eighth of the width, for the drawn sample: 64 x 64 pixels, mean 0.5, deviation 0.25.

    Args:
        pretrained: No weights belong to this name.
        **kwargs: What ``VGGFlat`` takes, such as ``num_classes``, ``img_size`` (pixels) and ``device``.

    Returns:
        A model of ``(batch, 3, img_size, img_size)`` to ``(batch, num_classes)``.

    Examples:
        >>> model = vgg16_slim_fc256(num_classes=20)
        >>> model.pretrained_cfg["architecture"], model(torch.zeros(1, 3, 64, 64)).shape
        ('vgg16_slim_fc256', torch.Size([1, 20]))
    """
    return _create("vgg16_slim_fc256", VGG16_SLIM, pretrained, **kwargs)
