"""Real models of other packages in two processes (gloo, on CPU), wrapped as a whole and part by part."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from freezeplan import apply_plan, load_delta
from freezeplan.errors import ApplyError

REFUSED = """gradients of 64 tensors that the plan trains would not be synchronised between 2 processes, without an \
error; the first is 'base_model.model.blocks.1.norm1.weight'
  they did not require a gradient when the model was wrapped in DistributedDataParallel
  apply the plan first, and wrap the model then"""
HOSTS: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "examples/hosts.py"))["HOSTS"]
PLAN = {
    "version": 1,
    "layer_decay": 0.8,
    "rules": [
        {"stage": "..1", "frozen": True},
        {"role": "norm", "mode": "eval", "optional": True},  # the statistics of a batch are another in each process
        {"match": ".*", "lr_mult": 1},
    ],
}
UNET = "segmentation_models_pytorch Unet, tu-resnet18"
WAYS = [
    (UNET, ()),
    (UNET, ("encoder.model", "decoder", "segmentation_head")),
    ("open_clip CLIP", ()),
    ("transformers UperNet on TimmBackbone", ()),
    ("PEFT LoRA on a ViT", ()),
    ("Lightning module with two heads", ()),
    ("Lightning module with two heads", ("backbone", "kind", "quality")),
    ("two towers", ("photo", "sketch", "join")),
]
"""Models, and the modules that are wrapped; none: the model is wrapped as a whole."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the packages' own
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch is built without gloo"),
]


def built(name: str) -> nn.Module:
    """The model, with the same random weights each time."""
    torch.manual_seed(0)
    model: nn.Module = HOSTS[name].build().double()
    return model


def trained(name: str, parts: tuple[str, ...], rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    """Train a model for two steps, a share of each batch in each process, and say what came of it.

    In double precision, so that the order of sums is far below what a gradient that was not shared would do.
    """
    host, model = HOSTS[name], built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = model
    if world > 1:
        for part in parts:
            model.set_submodule(part, DistributedDataParallel(model.get_submodule(part), find_unused_parameters=True))
        if not parts:
            whole = DistributedDataParallel(model, find_unused_parameters=True)
    refused = ""
    try:
        applied = apply_plan(whole, PLAN, lr=1e-2)
    except ApplyError as error:  # PEFT leaves the model frozen, and so it was wrapped
        refused = str(error)
        applied = apply_plan(model, PLAN, lr=1e-2)
        whole = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(applied, momentum=0.9)
    applied.seal()
    whole.train()
    random = torch.Generator().manual_seed(1)
    for _ in range(2):
        images = torch.rand(4, 3, host.size, host.size, generator=random).double()[rank::world]
        optimizer.zero_grad()
        found = whole(images) if host.call is None else host.call(whole, images)
        floats = [leaf for leaf in tree_flatten(found)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.stack([leaf.square().mean() for leaf in floats]).sum().backward()
        optimizer.step()
    applied.check(optimizer)
    if folder is not None and rank == 0:
        applied.save_delta(folder / "delta.safetensors")
    rows = [(row.name, row.frozen, row.lr_mult, row.mode) for row in applied.resolution.rows]
    state = {re.sub(r"(^|\.)module\.", r"\1", key): value.clone() for key, value in whole.state_dict().items()}
    return {"refused": refused, "rows": rows, "verified": str(applied.verify()), "state": state}


def work(rank: int, folder: Path) -> None:
    """What each of the two processes runs: all models, one after the other."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    try:
        for at, (name, parts) in enumerate(WAYS):
            (folder / str(at)).mkdir(exist_ok=True)
            torch.save(trained(name, parts, rank, 2, folder / str(at)), folder / str(at) / f"{rank}.pt")
            distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of all models."""
    for package in ("segmentation_models_pytorch", "open_clip", "transformers", "peft", "lightning"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("at", range(len(WAYS)), ids=[f"{name}: {' '.join(parts) or 'whole'}" for name, parts in WAYS])
def test_two_processes_do_what_one_does(at: int, folder: Path) -> None:
    name, parts = WAYS[at]
    alone = trained(name, parts, 0, 1)
    frozen = {row[0] for row in alone["rows"] if row[1]}
    plain = built(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    assert frozen
    assert [key for key in before if not torch.equal(alone["state"][key], before[key])]

    both = [torch.load(folder / str(at) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for found in both:
        assert found["refused"] == (REFUSED if name.startswith("PEFT") else "")
        assert found["rows"] == alone["rows"]
        assert found["verified"] == alone["verified"]
        assert found["state"].keys() == alone["state"].keys() == before.keys()
        for key, value in alone["state"].items():
            torch.testing.assert_close(found["state"][key], value, atol=1e-10, rtol=1e-10, msg=key)
            assert key not in frozen or torch.equal(found["state"][key], before[key]), key
    load_delta(plain, folder / str(at) / "delta.safetensors")
    assert [key for key, value in plain.state_dict().items() if not torch.equal(value, both[0]["state"][key])] == []
