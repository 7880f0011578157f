"""Plans in two processes (gloo, on CPU): the same weights as in one, the same report and the same proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from freezeplan import apply_plan, load_delta, resolve_plan
from freezeplan.applied_plan import AppliedPlan
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch is built without gloo"),
]

RULES = [
    {"match": r"patch_embed|blocks\.[01]", "frozen": True},
    {"role": "bias", "lr_mult": 2},
    {"match": ".*", "lr_mult": 1},
]
PLAN = {"version": 1, "rules": RULES}
PHASES = [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "rest"}]
PHASED = {"version": 1, "phases": PHASES, "rules": RULES}
EPOCHS = 3


def build(seed: int = 0) -> nn.Module:
    """Layer norm instead of batch norm: the statistics of a batch are another in each process."""
    torch.manual_seed(seed)
    return create_model("test_vit", num_classes=3)


def batches(rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of two batches of eight images."""
    random = torch.Generator().manual_seed(1)
    for _ in range(2):
        images, labels = torch.randn(8, 3, 160, 160, generator=random), torch.randint(3, (8,), generator=random)
        yield images[rank::world], labels[rank::world]


def fit(
    model: nn.Module, live: AppliedPlan, rank: int, world: int, wrap: Callable[[], nn.Module], **promise: bool
) -> None:
    """An ordinary loop; ``wrap`` is called again where a phase begins."""
    optimizer = torch.optim.SGD(live, momentum=0.9, weight_decay=0.01)
    live.check(optimizer)
    wrapped = wrap()
    for epoch in range(EPOCHS):
        if live.step(epoch=epoch, **promise):
            wrapped = wrap()
        wrapped.train()
        for images, labels in batches(rank, world):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(images), labels).backward()
            optimizer.step()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def report(live: AppliedPlan) -> list[tuple[Any, ...]]:
    return [(row.name, row.shape, row.frozen, row.lr_mult, row.mode, row.rule) for row in live.resolution.rows]


def alone(plan: dict[str, Any]) -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
    """What one process makes of it."""
    model = build()
    live = apply_plan(model, plan, lr=0.02)
    fit(model, live, 0, 1, lambda: model)
    return gathered(model), report(live)


# What runs in each process; all of it returns plain data.


def rewrapped(rank: int, folder: Path) -> dict[str, Any]:
    model = build()
    live = apply_plan(model, PHASED, lr=0.02)
    live.seal()
    fit(model, live, rank, 2, lambda: DistributedDataParallel(model), rewrap=True)
    return {"weights": gathered(model), "verified": str(live.verify()), "report": report(live)}


def wrapped_once(rank: int, folder: Path) -> dict[str, Any]:
    wrapped = DistributedDataParallel(build(), find_unused_parameters=True)
    live = apply_plan(wrapped, PHASED, lr=0.02)
    live.seal()
    fit(wrapped.module, live, rank, 2, lambda: wrapped, find_unused=True)
    return {"weights": gathered(wrapped.module), "verified": str(live.verify()), "report": report(live)}


def without_a_promise(rank: int, folder: Path) -> dict[str, Any]:
    model = build()
    live = apply_plan(model, PHASED, lr=0.02)
    before = [p.requires_grad for p in model.parameters()]
    try:
        fit(model, live, rank, 2, lambda: DistributedDataParallel(model))
    except ApplyError as error:
        return {"error": str(error), "same": before == [p.requires_grad for p in model.parameters()]}
    return {"error": "", "same": False}


def wrapped_while_frozen(rank: int, folder: Path) -> dict[str, Any]:
    """The wrapper looks once at what requires a gradient: what was frozen then gets none that is synchronised."""
    model = build()
    model.patch_embed.requires_grad_(False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    head = apply_plan(wrapped, "linear_probe")  # trains nothing of it
    head.undo()
    before = [p.requires_grad for p in model.parameters()]
    found = {"error": "", "same": False}
    try:
        apply_plan(wrapped, "full")
    except ApplyError as error:
        found = {"error": str(error), "same": before == [p.requires_grad for p in model.parameters()]}
    ignored = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    apply_plan(DistributedDataParallel(model), "full")
    return found


def shard(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    model = shard(build())
    live = apply_plan(model, PLAN, lr=0.02)
    live.seal(copy=True)
    fit(model, live, rank, 2, lambda: model)
    held = str(live.verify())
    live.save_delta(folder / "delta.safetensors")
    weights = gathered(model)
    frozen = dict(model.named_parameters())["blocks.1.attn.qkv.weight"]
    with torch.no_grad():
        if rank == 0:  # one process alone, as a wrong collective does
            frozen.to_local().add_(0.5)
    moved = live.verify()
    live.undo()
    flags = all(p.requires_grad for p in model.parameters())
    found = {"weights": weights, "verified": held, "report": report(live), "flags": flags}
    return {**found, "moved": [(m.name, m.max_abs) for m in moved.moved]}


def sharded_later(rank: int, folder: Path) -> dict[str, Any]:
    """The plan is applied and sealed first, and the weights of a file come last."""
    model = build()
    live = apply_plan(model, PLAN, lr=0.02)
    live.seal()
    shard(model)
    fit(model, live, rank, 2, lambda: model)
    found = {"weights": gathered(model), "verified": str(live.verify()), "report": report(live)}
    live.undo()
    other = shard(build())
    load_delta(other, folder / "delta.safetensors")
    return {**found, "loaded": gathered(other)}


def sharded_phases(rank: int, folder: Path) -> dict[str, Any]:
    """No promise is needed: what has a gradient is synchronised."""
    model = shard(build())
    live = apply_plan(model, PHASED, lr=0.02)
    live.seal()
    fit(model, live, rank, 2, lambda: model)
    return {"weights": gathered(model), "verified": str(live.verify()), "report": report(live)}


def reinitialised(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(5)
    model = shard(build())
    torch.manual_seed(7)
    plan = {"version": 1, "rules": [{"role": "head", "lr_mult": 1, "reinit": True}, {"match": ".*", "frozen": True}]}
    apply_plan(model, plan)
    return {"weights": gathered(model)}


def _work(rank: int, what: Callable[[int, Path], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder / f'{what.__name__}.store'}"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    try:
        torch.save(what(rank, folder), folder / f"{what.__name__}-{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def twice(what: Callable[[int, Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run something in two processes and return what each found."""
    multiprocessing.spawn(_work, (what, folder), nprocs=2)
    return [torch.load(folder / f"{what.__name__}-{rank}.pt", weights_only=False) for rank in range(2)]


def check_same(found: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    weights, said = alone(plan)
    base = gathered(build())
    frozen = {row.name for row in resolve_plan(plan, build()).always_frozen}
    for one in found:
        assert one["report"] == said
        assert one["verified"] == f"held: {len(frozen)} frozen tensors and buffers are bit-identical"
        for name, tensor in weights.items():
            torch.testing.assert_close(one["weights"][name], tensor, atol=1e-5, rtol=1e-5, msg=name)
            assert torch.equal(one["weights"][name], base[name]) == (name in frozen), name


@pytest.mark.parametrize("way", [rewrapped, wrapped_once])
def test_data_parallel_is_the_same_as_one_process(way: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With phases, wrapped anew for each or once before the plan."""
    check_same(twice(way, tmp_path), PHASED)


def test_a_phase_does_not_begin_without_a_promise(tmp_path: Path) -> None:
    """Where DistributedDataParallel would not synchronise what is thawed; nothing has changed then."""
    for found in twice(without_a_promise, tmp_path):
        assert found["error"].splitlines()[0] == (
            "phase 'rest' would begin in 2 processes: gradients of what it thaws would not be synchronised, "
            "without an error"
        )
        assert found["same"]


def test_a_plan_does_not_train_what_the_wrapper_would_not_synchronise(tmp_path: Path) -> None:
    for found in twice(wrapped_while_frozen, tmp_path):
        assert found["error"] == (
            "gradients of 2 tensors that the plan trains would not be synchronised between 2 processes, without an "
            "error; the first is 'patch_embed.proj.bias'\n"
            "  they did not require a gradient when the model was wrapped in DistributedDataParallel\n"
            "  apply the plan first, and wrap the model then"
        )
        assert found["same"]


def test_fully_sharded_is_the_same_as_one_process(tmp_path: Path) -> None:
    """The plan applied to shards, or sharded under the plan; proof, delta and undo on shards."""
    found = twice(sharded, tmp_path)
    check_same(found, PLAN)
    for one in found:
        assert one["flags"]
        assert one["moved"] == [("blocks.1.attn.qkv.weight", pytest.approx(0.5))]
    bare = build()
    load_delta(bare, tmp_path / "delta.safetensors")
    for name, tensor in gathered(bare).items():
        assert torch.equal(tensor, found[0]["weights"][name]), name

    later = twice(sharded_later, tmp_path)
    check_same(later, PLAN)
    check_same(twice(sharded_phases, tmp_path), PHASED)
    for one in later:
        assert all(torch.equal(one["loaded"][name], tensor) for name, tensor in found[0]["weights"].items())


def test_reinit_on_shards_gives_the_values_of_one_process(tmp_path: Path) -> None:
    model = build()
    torch.manual_seed(7)
    plan = {"version": 1, "rules": [{"role": "head", "lr_mult": 1, "reinit": True}, {"match": ".*", "frozen": True}]}
    apply_plan(model, plan)
    for found in twice(reinitialised, tmp_path):
        for name, tensor in gathered(model).items():
            assert torch.equal(found["weights"][name], tensor), name
