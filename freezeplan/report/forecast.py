"""What training under a plan will cost: memory and arithmetic, found by passes without numbers.

The model is made and run under torch's fake tensors, which have shapes and a device and no memory, so a forecast for
the largest model takes seconds and a few megabytes. Nothing is estimated from layer types: autograd says what it keeps
for the backward pass, and the operators say what they multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from freezeplan.api import apply_plan
from freezeplan.cache.calls import tensors, undisturbed
from freezeplan.cache.prefix import Prefix
from freezeplan.errors import FreezePlanError, ModelError
from freezeplan.plan.load import PlanLike, load_plan


@dataclass(frozen=True)
class Cost:
    """What one step costs."""

    trained: int
    """Trained parameters."""
    tensors: int
    """In how many tensors."""
    gradient_bytes: int
    activation_bytes: int
    """What autograd keeps between the passes for a batch: distinct memory, without parameters and buffers."""
    forward_flops: int
    """For an image; a multiplication and an addition are two."""
    backward_flops: int
    """For an image."""

    @property
    def flops(self) -> int:
        """Forward and backward, for an image."""
        return self.forward_flops + self.backward_flops

    def optimizer_bytes(self, name: str) -> int:
        """Return the bytes of an optimizer's state after its first step, in float32.

        Args:
            name: ``sgd`` (without momentum), ``sgd-momentum``, ``rmsprop`` (without momentum), ``adamw``.

        Examples:
            >>> Cost(10, 2, 40, 0, 0, 0).optimizer_bytes("adamw")
            88
        """
        moments, steps = {"sgd": (0, 0), "sgd-momentum": (1, 0), "rmsprop": (1, 1), "adamw": (2, 1)}[name]
        return moments * self.gradient_bytes + steps * 4 * self.tensors


_MOST_BYTES = 2**63 - 1
"""Of one tensor, as torch counts."""

OPTIMIZERS = ("sgd", "sgd-momentum", "rmsprop", "adamw")


@dataclass(frozen=True)
class Forecast:
    """What training under a plan will cost, beside training everything."""

    model: str
    plan: str
    phase: str
    """That it holds in, the first one; empty without phases."""
    phases: int
    """How many the plan has; 0 without."""
    parameters: int
    image_size: int
    batch_size: int
    cost: Cost
    full: Cost
    """Of training every parameter of the model."""
    prefix: Prefix

    @property
    def ratio(self) -> float:
        """Arithmetic of a step relative to training everything."""
        return self.cost.flops / self.full.flops

    @property
    def cached_ratio(self) -> float | None:
        """The same on kept features; None where nothing can be kept."""
        if not self.prefix.stored:
            return None
        return (self.cost.flops - self.prefix.flops) / self.full.flops

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        costs = {
            name: {
                "trained": cost.trained,
                "gradient_bytes": cost.gradient_bytes,
                "optimizer_bytes": {each: cost.optimizer_bytes(each) for each in OPTIMIZERS},
                "activation_bytes": cost.activation_bytes,
                "forward_flops": cost.forward_flops,
                "backward_flops": cost.backward_flops,
            }
            for name, cost in (("plan", self.cost), ("full", self.full))
        }
        return {
            "model": self.model,
            "plan": self.plan,
            "phase": self.phase,
            "phases": self.phases,
            "parameters": self.parameters,
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "costs": costs,
            "cache_bytes": self.prefix.bytes,
            "prefix_flops": self.prefix.flops,
            "behind_flops": self.prefix.behind_flops,
            "advice": self.prefix.advice if self.prefix.stored else "",
            "obstacle": self.prefix.obstacle,
            "ratio": self.ratio,
            "cached_ratio": self.cached_ratio,
        }


def forecast(create: Callable[[], nn.Module], plan: PlanLike, *, image_size: int, batch_size: int) -> Forecast:
    """Say what training a model under a plan will cost.

    Args:
        create: Makes the model, best on the meta device, where it takes no memory.
        plan: A Plan, a dict, a path or a preset's name; of a plan with phases, the first one counts.
        image_size: Side of the square images, in pixels.
        batch_size: Images a step.

    Raises:
        PlanError: If the plan does not fit the model.
        ModelError: If the model cannot be run without numbers, or not on images of this size or so many.

    Examples:
        >>> from freezeplan.model import create_model
        >>> found = forecast(lambda: create_model("resnet18", meta=True), "linear_probe", image_size=224, batch_size=8)
        >>> found.cost.trained, found.cost.gradient_bytes, found.prefix.bytes
        (513000, 2052000, 2048)
        >>> round(found.ratio, 2), round(found.full.backward_flops / found.full.forward_flops, 2)
        (0.34, 1.93)
    """
    loaded = load_plan(plan)
    model = create()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_memory(model)
        channels = int(getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0])
        if 4 * max(batch_size, 3) * channels * image_size**2 > _MOST_BYTES:
            raise _too_large(batch_size, image_size)
        images = torch.zeros(batch_size, channels, image_size, image_size)
        sample = torch.zeros(3, channels, image_size, image_size)
        try:
            live = apply_plan(model, loaded, lr=1.0, scheduler="any")
            found, cost = live.prefix(sample), _cost(model, images)
            resolution = live.resolution
            live.undo()
            model.requires_grad_(True).train()
            full = _cost(model, images)
        except FreezePlanError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            if "overflow" in str(error).lower():  # of what the model makes of the images
                raise _too_large(batch_size, image_size) from error
            raise ModelError(
                f"cannot run the model on images of {image_size} pixels without numbers: {error}",
                notes=["--image-size, or a model whose code does not read values"],
            ) from error
    return Forecast(
        model=resolution.model,
        plan=loaded.title,
        phase=resolution.phase,
        phases=len(loaded.phases),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size=image_size,
        batch_size=batch_size,
        cost=cost,
        full=full,
        prefix=found,
    )


def _too_large(batch_size: int, image_size: int) -> ModelError:
    return ModelError(
        f"{batch_size:,} images of {image_size:,} pixels have more numbers than torch can count",
        notes=["give a smaller --batch-size or --image-size"],
    )


def _without_memory(model: nn.Module) -> None:
    """Give every parameter and buffer a stand-in on the CPU that has a shape and nothing else."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stand_in = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), stand_in)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device="cpu"))


def _cost(model: nn.Module, images: Tensor) -> Cost:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undisturbed(model), torch.enable_grad():
        model.train()
        kept, forward, backward = measure(model, images)
    elements = sum(parameter.numel() for parameter in trained)
    size = sum(parameter.nbytes for parameter in trained)
    return Cost(elements, len(trained), size, kept, forward // len(images), backward // len(images))


def measure(model: nn.Module, images: Tensor) -> tuple[int, int, int]:
    """Run a step and count. Gradients stay as they are.

    Args:
        model: In the mode to be measured.
        images: (N, C, H, W).

    Returns:
        Bytes that autograd keeps for the backward pass, without parameters and buffers; FLOPs of the forward pass;
        FLOPs of the backward pass.
    """
    own = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in own:
            kept[_memory(tensor)] = tensor
        return tensor

    forward = FlopCounterMode(display=False)
    with forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [tensor for tensor in tensors(model(images)) if tensor.requires_grad]
        total = torch.stack([output.sum() for output in outputs]).sum()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )
    with counter:
        torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return size, forward.get_total_flops(), counter.get_total_flops()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _convolution_backward(
    grad_shape: Any,
    image_shape: Any,
    weight_shape: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """Each gradient costs what the forward pass does; torch's own count multiplies one of them by the groups."""
    pixels = image_shape if transposed else grad_shape
    forward = 2 * pixels[0] * torch.Size(pixels[2:]).numel() * torch.Size(weight_shape).numel()
    return int(forward) * (int(mask[0]) + int(mask[1]))
