"""One model of every architecture module of timm: what is frozen stands still on every way through it.

``zoo.json`` names the models, the input size and, reviewed by hand, the tensors of each classifier with ten classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, ZOO
from packaging.version import Version
from torch import nn

from freezeplan import apply_plan, resolve_plan
from freezeplan.apply import freeze
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe

QUICK = {"resnet", "levit", "efficientnet", "vision_transformer", "convnext"}
LAZY = {"convit": "rel_indices"}
"""Buffers that a model derives from its input size at the first forward pass; no statistics."""

torch.set_num_threads(1)


CASES = [pytest.param(f, e, id=f, marks=() if f in QUICK else pytest.mark.slow) for f, e in ZOO.items()]
ENCODERS = ("deepseek_vit_412m_enc", "gemma4_vit_167m_enc", "mobilenetv5_300m_enc", "qwen3_vit_88m_enc")


def build(entry: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(entry["model"], num_classes=10, **entry["arguments"])


def total(output: Any) -> torch.Tensor:
    """The sum of every floating tensor in an output, however it is nested."""
    if isinstance(output, torch.Tensor):
        return output.float().sum() if output.is_floating_point() else torch.zeros(())
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return sum((total(part) for part in parts), torch.zeros(()))


def ways(model: nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The ways through a timm model, those that it has."""

    def parts(x: torch.Tensor) -> torch.Tensor:
        features = model.forward_features(x)
        return total(model.forward_head(features if not isinstance(features, dict) else features["x_norm"]))

    def intermediates(x: torch.Tensor) -> torch.Tensor:
        return total(model.forward_intermediates(x))

    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"forward": lambda x: total(model(x))}
    if hasattr(model, "forward_head"):
        found["forward_features + forward_head"] = parts
    if hasattr(model, "forward_intermediates"):
        found["forward_intermediates"] = intermediates
    return found


def can_checkpoint(model: nn.Module) -> bool:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):
        return False
    return True


def violations(entry: dict[str, Any], family: str = "") -> list[str]:
    """Train a frozen model as carelessly as a loop can, on every way through it, and return what did not stand still.

    The optimizer was made before the plan, holds everything and has stepped once, so every parameter has a gradient and
    a momentum; gradients are zeroed and not dropped; every step calls ``model.train()``.
    """
    model = build(entry)
    x = torch.randn(2, 3, entry["size"], entry["size"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    total(model.train()(x)).backward()
    optimizer.step()

    applied = apply_plan(model, "linear_probe", lr=1e-3, guard=False)
    trained = {row.name for row in applied.resolution.trained}
    start = {name: tensor.clone() for name, tensor in still(model, trained, family)}
    live: list[str] = []
    for name, module in frozen_parts(model, trained):
        module.register_forward_pre_hook(
            lambda module, _, name=name: live.append(f"{name} ran in train") if module.training else None
        )
    moved: list[str] = []

    def step(way: str, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        optimizer.zero_grad(set_to_none=False)
        model.train()
        loss = forward(x)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        after = dict(still(model, trained, family))
        moved.extend(f"{name} moved in {way}" for name, value in start.items() if not torch.equal(value, after[name]))

    for way, forward in ways(model).items():
        step(way, forward)
    if can_checkpoint(model):
        step("gradient checkpointing", ways(model)["forward"])
    return sorted(set(moved + live))


def still(model: nn.Module, trained: set[str], family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every frozen parameter, and every buffer of a module without a trained parameter of its own."""
    yield from ((name, p.detach()) for name, p in model.named_parameters() if name not in trained)
    owners = {name.rpartition(".")[0] for name in trained}
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[0] not in owners and not name.endswith(LAZY.get(family, "\n")):
            yield name, buffer


def frozen_parts(model: nn.Module, trained: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Norms and dropouts that are frozen: nothing is trained below the nearest module upwards that has parameters."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        holder = name
        while holder and not any(True for _ in modules[holder].parameters()):
            holder = holder.rpartition(".")[0]
        frozen = holder and not any(tensor.startswith(f"{holder}.") for tensor in trained)
        if frozen and ("Norm" in type(module).__name__ or "Drop" in type(module).__name__):
            yield name, module


def test_the_list_covers_every_architecture_module_of_timm() -> None:
    """A new architecture module of timm is missed here first."""
    if Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("zoo.json lists the models of timm 1.0.31")
    modules = {timm.models._registry._model_to_module[name] for name in timm.list_models()}

    assert sorted(modules - {"model"}) == sorted(ZOO)


@pytest.mark.parametrize(("family", "entry"), CASES)
def test_what_is_frozen_stands_still_on_every_way_through_the_model(family: str, entry: dict[str, Any]) -> None:
    """Parameters and buffers are bit-identical, and every frozen norm and dropout ran in eval."""
    assert violations(entry, family) == []


@pytest.mark.parametrize(("family", "entry"), CASES)
def test_undo_gives_back_flags_modes_and_every_instance_attribute(family: str, entry: dict[str, Any]) -> None:
    """After undo() a model that was partly frozen before is as it was."""
    model = build(entry)
    next(model.parameters()).requires_grad_(False)
    next(model.children()).eval()

    def state() -> object:
        return (
            [(name, p.requires_grad) for name, p in model.named_parameters()],
            [(name, m.training, sorted(vars(m)), type(m)) for name, m in model.named_modules()],
        )

    before = state()
    applied = apply_plan(model, "linear_probe")

    assert state() != before
    applied.undo()
    assert state() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_probe_leaves_exactly_the_classifier_trainable(family: str) -> None:
    """On every architecture: the classifier, whole, and nothing else."""
    entry = ZOO[family]
    resolution = resolve_plan("linear_probe", create_model(entry["model"], num_classes=10, meta=True))

    assert sorted(row.name for row in resolution.trained) == sorted(entry["head"])


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if timm.is_model(name)])
def test_an_encoder_without_a_classifier_gets_a_named_error(encoder: str) -> None:
    """A plan that needs the classifier says so where there is none."""
    model = create_model(encoder, meta=True)

    with pytest.raises(PlanError) as error:
        resolve_plan("linear_probe", model)
    assert str(error.value) == (
        f"linear_probe.yaml:8:12: role head is not known: {encoder} is an encoder without a classifier; "
        "select with match instead"
    )


POSITIONS = {
    "vit_base_patch16_224": {"pos_embed"},
    "crossvit_tiny_240": {"pos_embed_0", "pos_embed_1"},
    "tnt_s_legacy_patch16_224": {"patch_pos", "pixel_pos"},
    "gemma4_vit_167m": {"position_embedding_table"},
    "swin_tiny_patch4_window7_224": {"relative_position_bias_table"},
    "mvitv2_tiny": {"rel_pos_h", "rel_pos_w"},
    "levit_128s": {"attention_biases"},
    "vit_base_patch16_rope_mixed_224": {"freqs"},
    "botnet26t_256": {"height_rel", "width_rel"},
    "swinv2_tiny_window16_256": {"cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"},
    "swinv2_cr_tiny_224": {f"meta_mlp.fc{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")},
    "vit_srelpos_small_patch16_224": {f"mlp.fc{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")},
    "twins_svt_small": {"proj.0.weight", "proj.0.bias"},
    "davit_tiny": {f"cpe{number}.proj.{kind}" for number in (1, 2) for kind in ("weight", "bias")},
    "edgenext_xx_small": {"token_projection.weight", "token_projection.bias"},
    "coat_lite_tiny": {
        *(f"cpe{number}.proj.{kind}" for number in range(1, 5) for kind in ("weight", "bias")),
        *(f"conv_list.{number}.{kind}" for number in range(3) for kind in ("weight", "bias")),
    },
    "resnet50": set(),
}
"""Model -> the ends of the names of what tells it positions apart."""


@pytest.mark.parametrize("name", [name for name in POSITIONS if timm.is_model(name)])
def test_what_tells_positions_apart_has_the_role_pos_embed(name: str) -> None:
    """Absolute and relative, tensors and what makes them; no attention that is only called so (coat's)."""
    found = describe(create_model(name, meta=True)).roles["pos_embed"]
    ends = POSITIONS[name]

    assert {end for end in ends if any(tensor.endswith(end) for tensor in found)} == ends
    assert [tensor for tensor in found if not tensor.endswith((*ends, "\n"))] == []


PROTECTIONS = {
    "requires_grad": ("set_flags", lambda live, resolution: None),
    "gradients cleared": (
        "set_flags",
        lambda live, resolution: [
            p.requires_grad_(name in {row.name for row in resolution.trained})
            for name, found in live.parameters.items()
            for p in found
        ],
    ),
    "modes": ("hold_in_eval", lambda live, resolution: None),
    "modes that outlive train()": (
        "hold_in_eval",
        lambda live, resolution: [m.eval() for n, m in live.inner.items() if resolution.modes[n] == "eval"],
    ),
}


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_each_protection_taken_out_is_noticed(protection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above is no empty one: without any single protection something moves."""
    assert violations(ZOO["resnet"]) == []

    monkeypatch.setattr(freeze, *PROTECTIONS[protection])

    assert violations(ZOO["resnet"]) != []
