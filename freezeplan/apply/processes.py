"""Several processes: gradients that DistributedDataParallel would not synchronise, without an error of its own."""

from __future__ import annotations

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from freezeplan.errors import ApplyError
from freezeplan.model import names
from freezeplan.model.sharded import is_sharded
from freezeplan.resolve.resolution import Resolution


def check_phase(model: nn.Module, phase: str, *, promised: bool) -> None:
    """Refuse a new phase whose gradients would not be synchronised.

    Args:
        model: The model, without wrappers.
        phase: Name of the phase that would begin.
        promised: Whether the caller wraps the model anew, or wrapped it so that unused parameters are found.

    Raises:
        ApplyError: If nothing was promised; ``fully_shard`` synchronises whatever has a gradient and needs no promise.
    """
    count = _count()
    if count == 1 or promised or all(map(is_sharded, model.parameters())):
        return
    raise ApplyError(
        f"phase {phase!r} would begin in {count} processes: gradients of what it thaws would not be synchronised, "
        "without an error",
        notes=[
            "either: if applied.step(epoch=e, rewrap=True): model = DistributedDataParallel(module)",
            "or: wrap once with find_unused_parameters=True, and applied.step(epoch=e, find_unused=True)",
        ],
    )


def check_wrapped(model: nn.Module, live: names.Live, resolution: Resolution) -> None:
    """Refuse a plan that trains what did not require a gradient when it was wrapped in DistributedDataParallel.

    Args:
        model: The model with its wrappers.
        live: The model as it was looked up.
        resolution: What the plan means for it.

    Raises:
        ApplyError: If a tensor that any phase trains is in no gradient bucket of the wrapper around it.
    """
    if _count() == 1:
        return
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    lost: dict[int, int] = {}
    for wrapper in wrappers:
        count = wrapper.process_group.size()
        if count > 1:
            lost |= {id(parameter): count for parameter in _left_out(wrapper)}
    found = [
        (name, lost[id(parameter)])
        for group in (resolution.groups if lost else ())
        for name in group.tensors
        for parameter in live.parameters[name]
        if id(parameter) in lost
    ]
    if found:
        name, count = found[0]
        raise ApplyError(
            f"gradients of {len(found)} tensors that the plan trains would not be synchronised between {count} "
            f"processes, without an error; the first is {name!r}",
            notes=[
                "they did not require a gradient when the model was wrapped in DistributedDataParallel",
                "apply the plan first, and wrap the model then",
            ],
        )


def _count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _left_out(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters in no bucket of a wrapper, without those that it was told to ignore."""
    known = {
        name: parameter
        for name, parameter in wrapper.module.named_parameters()
        if name not in wrapper.parameters_to_ignore
    }
    if wrapper._get_ddp_logging_data()["num_parameter_tensors"] == len(known):  # type: ignore[no-untyped-call]
        return []
    held = {id(one) for bucket in wrapper.reducer._get_zeros_like_grad_buckets() for one in bucket.parameters()}
    return [parameter for parameter in known.values() if id(parameter) not in held]
