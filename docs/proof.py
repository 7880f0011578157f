"""Write ``proof.md``: faults put into a training on purpose, and the message of each: ``python docs/proof.py``.

Each fault goes into the same short training of several architectures. The page says what was said, word for word, on
the first of them, and on how many the right cause was named. Nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.optim import lr_scheduler

from freezeplan import AppliedPlan, apply_plan
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model

HERE = Path(__file__).parent
NOTE = "<!-- written by `python docs/proof.py`; a test compares -->\n"
MODELS = ("test_resnet", "test_efficientnet", "test_vit")
WITH_NORM = ("test_resnet", "test_efficientnet", "mobilenetv3_small_050")
"""Those for faults of batch norm, which a ViT has not."""
WITH_BLOCKS = ("test_efficientnet", "test_vit", "mobilenetv3_small_050")
"""Those with a part of which the plan freezes some and trains some."""
RULES = [{"role": "head", "lr_mult": 1}, {"stage": -1, "lr_mult": 0.1}, {"match": ".*", "frozen": True}]
PLAN = {"version": 1, "name": "last_stage", "rules": RULES}
PHASES = [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "all"}]


class Run:
    """A training of two epochs of two steps, with every check that there is."""

    def __init__(self, name: str, *, scheduler: str = "torch", phases: bool = False, guard: bool = True):
        torch.manual_seed(0)
        self.model = create_model(name, num_classes=3)
        self.size = 160 if name == "test_vit" else 64
        plan = {**PLAN, "rules": [{"match": ".*", "lr_mult": 1}], "phases": PHASES} if phases else PLAN
        self.live: AppliedPlan = apply_plan(self.model, plan, lr=0.1, scheduler=scheduler, guard=guard)
        self.optimizer = torch.optim.SGD(self.live, momentum=0.9, weight_decay=0.05)
        self.keep: list[object] = []
        """What other code holds on to."""

    def batch(self) -> None:
        """One step of a loop of anybody's."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        self.model(torch.randn(4, 3, self.size, self.size)).square().mean().backward()
        self.optimizer.step()

    def said_at_once(self, fault: Callable[[Run], None]) -> str:
        """Put the fault in ahead of the first step of a loop that calls nothing of the plan; return what was said."""
        fault(self)
        try:
            self.batch()
        except ApplyError as error:
            return str(error)
        return ""

    def said(self, fault: Callable[[Run], None], *, late: bool) -> str:
        """Train, put the fault in after the first epoch or after the last, and return all that was said."""
        self.live.seal(copy=True)
        try:
            self.live.check(self.optimizer)
            for epoch in range(2):
                self.live.step(epoch=epoch)
                self.batch()
                self.batch()
                if epoch == 0 and not late:
                    fault(self)
        except ApplyError as error:
            return str(error)
        if late:
            fault(self)
        found = self.live.verify()
        return "" if found else str(found)

    @property
    def frozen(self) -> nn.Parameter:
        """The first weight of a convolution or a projection that the plan freezes."""
        name = next(row.name for row in self.live.resolution.frozen if len(row.shape) > 1 and min(row.shape) > 1)
        return self.model.get_parameter(name)

    @property
    def norm(self) -> nn.Module:
        """A batch norm that the plan freezes."""
        return next(part for part in self.model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))


def nothing(run: Run) -> None:
    """The clean run."""


def stale_gradient(run: Run) -> None:
    other = torch.optim.SGD([run.frozen], lr=0.1)
    run.frozen.grad = torch.randn_like(run.frozen)
    other.step()


def in_an_optimizer(run: Run) -> None:
    run.optimizer.add_param_group({"params": [("other", run.frozen)]})
    for state in (torch.randn_like(run.frozen), torch.zeros_like(run.frozen)):
        run.frozen.grad = state
        run.optimizer.step()
    run.frozen.grad = None


def weight_decay(run: Run) -> None:
    other = torch.optim.SGD([run.frozen], lr=0.1, weight_decay=0.05)
    run.frozen.grad = torch.zeros_like(run.frozen)
    other.step()


def decay_under_adam(run: Run) -> None:
    other = torch.optim.Adam([run.frozen], lr=0.001, weight_decay=0.05)
    run.frozen.grad = torch.zeros_like(run.frozen)
    other.step()


def live_statistics(run: Run) -> None:
    run.norm.training = True
    run.norm(torch.randn(4, run.norm.num_features, 2, 2))
    run.norm.training = False


def average(run: Run) -> None:
    ema = ModelEmaV2(run.model, decay=0.99)
    for _ in range(50):
        ema.update(run.model)
    run.model.load_state_dict(ema.module.state_dict())


def swap(run: Run) -> None:
    run.frozen.data = run.frozen.data + 0.05 * torch.randn_like(run.frozen)


def to_empty(run: Run) -> None:
    torch.use_deterministic_algorithms(True)  # what is empty is NaN then, not whatever the memory held
    run.model.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)


def load(run: Run) -> None:
    torch.manual_seed(1)
    run.model.load_state_dict(create_model(run.live.resolution.model, num_classes=3).state_dict())


def half(run: Run) -> None:
    run.frozen.data.copy_(run.frozen.data.bfloat16())


def write_buffer(run: Run) -> None:
    run.norm.running_mean.zero_().add_(0.5)


def assign(run: Run) -> None:
    other = copy.deepcopy(run.model.state_dict())
    name = next(name for name, parameter in run.model.named_parameters() if parameter is run.frozen)
    other[name].mul_(-1)
    run.model.load_state_dict(other, assign=True)


def thaw(run: Run) -> None:
    run.frozen.requires_grad_(True)


def thaw_and_train(run: Run) -> None:
    thaw(run)
    run.frozen.grad = torch.randn_like(run.frozen)
    torch.optim.SGD([run.frozen], lr=0.1).step()


def stop(run: Run) -> None:
    run.model.get_classifier().weight.requires_grad_(False)


def leave_a_gradient(run: Run) -> None:
    run.frozen.grad = torch.zeros_like(run.frozen)


def train_by_hand(run: Run) -> None:
    next(iter(run.model.children())).training = True


def sync_batchnorm(run: Run) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(run.model)


def assign_same(run: Run) -> None:
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)


def new_classifier(run: Run) -> None:
    run.model.reset_classifier(3)


def another_classifier(run: Run) -> None:
    run.model.reset_classifier(7)


def add(run: Run) -> None:
    run.model.adapter = nn.Linear(2, 2)


def lose(run: Run) -> None:
    run.model.reset_classifier(0)


def all_parameters(run: Run) -> None:
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.live.check(run.optimizer)


def all_parameters_unchecked(run: Run) -> None:
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)


def one_cycle(run: Run) -> None:
    run.keep.append(lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.1, total_steps=10))


def cosine_floor(run: Run) -> None:
    scheduler = lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=1, eta_min=0.01)
    run.optimizer.step()
    scheduler.step()
    run.keep.append(scheduler)


def cyclic(run: Run) -> None:
    run.keep.append(lr_scheduler.CyclicLR(run.optimizer, base_lr=0.01, max_lr=0.1))


def scale_unread(run: Run) -> None:
    run.keep.append(lr_scheduler.StepLR(run.optimizer, 1))


def twice(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] *= group["lr_mult"]
        group.pop("initial_lr", None)
    run.keep.append(CosineLRScheduler(run.optimizer, t_initial=10))


def both(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["lr_scale"] = group["lr_mult"]


def baked_and_attached(run: Run) -> None:
    run.live.attach(run.optimizer)
    for group in run.optimizer.param_groups:
        group["lr"] *= group["lr_mult"]


def fully_sharded(run: Run) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    fully_shard(run.model)


def mixed_unit(run: Run) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    run.model.blocks = FullyShardedDataParallel(
        run.model.blocks,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
    )


def reentrant(run: Run) -> None:
    run.model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(True)


def nothing_to_train(run: Run) -> None:
    run.live.check(run.optimizer, torch.optim.SGD([nn.Parameter(torch.zeros(1), requires_grad=False)]))


def two_processes(run: Run) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


@dataclass(frozen=True)
class Fault:
    """One fault: what is done, and the words that have to be in what is said."""

    title: str
    inject: Callable[[Run], None]
    cause: str
    late: bool = False
    """Whether it comes after the last epoch, for ``verify``; otherwise between two epochs, for the guards."""
    first: bool = False
    """Whether it comes ahead of the first step, in a loop that calls neither ``check`` nor ``step``."""
    scheduler: str = "torch"
    phases: bool = False
    models: tuple[str, ...] = MODELS
    """The models that it can be put into."""


FAULTS = (
    Fault(
        "a stale gradient, used by an optimizer outside the plan",
        stale_gradient,
        "a gradient was left on it",
        late=True,
    ),
    Fault("a frozen tensor in the optimizer", in_an_optimizer, "an optimizer holds it (SGD, group", late=True),
    Fault("weight decay on a gradient of zeros", weight_decay, "weight decay on a zero gradient", late=True),
    Fault(
        "weight decay on a gradient of zeros, under Adam",
        decay_under_adam,
        "weight decay on a zero gradient: each of its values moved towards zero",
        late=True,
    ),
    Fault(
        "batch norm put in train, and back", live_statistics, "live BatchNorm statistics", late=True, models=WITH_NORM
    ),
    Fault("an average of weights (EMA) put back", average, "an average of weights (EMA)", late=True),
    Fault("other values swapped in through `.data`", swap, "its data was exchanged", late=True),
    Fault("a flag flipped back, and a step", thaw_and_train, "requires_grad was set back to True", late=True),
    Fault("`to_empty` on the same device", to_empty, "its data was exchanged: to_empty emptied it", late=True),
    Fault("other weights loaded", load, "load_state_dict wrote it", late=True),
    Fault("a trip through bfloat16", half, "rounded to half precision", late=True),
    Fault("a buffer written", write_buffer, "a buffer was written by other code", late=True, models=WITH_NORM),
    Fault("other weights loaded with `assign=True`", assign, "was replaced after the plan was applied", late=True),
    Fault("`requires_grad` set to True", thaw, "set to requires_grad=True by other code"),
    Fault("`requires_grad` of a trained tensor set to False", stop, "set to requires_grad=False by other code"),
    Fault("a gradient of zeros left on a frozen tensor", leave_a_gradient, "left with a gradient by other code"),
    Fault("`.training` set by hand", train_by_hand, "put in train by hand"),
    Fault("`convert_sync_batchnorm` after applying", sync_batchnorm, "no longer held in eval", models=WITH_NORM),
    Fault("the same weights loaded with `assign=True`", assign_same, "replaced after the optimizer was made"),
    Fault("`fully_shard` after the optimizer", fully_sharded, "replaced after the optimizer was made"),
    Fault(
        "a `FullyShardedDataParallel` unit with mixed flags",
        mixed_unit,
        "is of frozen and trained parameters",
        models=WITH_BLOCKS,
    ),
    Fault("a new classifier of the same size", new_classifier, "replaced after the optimizer was made"),
    Fault("a new classifier of another size", another_classifier, "of another shape than when the plan was applied"),
    Fault("no classifier any more", lose, "no longer in the model"),
    Fault("a module added", add, "added to the model after the plan was applied"),
    Fault("an optimizer of `model.parameters()`", all_parameters, "in an optimizer"),
    Fault("`OneCycleLR` with one `max_lr`", one_cycle, "OneCycleLR flattened the rates"),
    Fault("an optimizer of `model.parameters()`, unchecked", all_parameters_unchecked, "in an optimizer", first=True),
    Fault("`OneCycleLR` with one `max_lr`, unchecked", one_cycle, "OneCycleLR flattened the rates", first=True),
    Fault("`CyclicLR` with one `max_lr`", cyclic, "CyclicLR flattened the rates"),
    Fault("`CosineAnnealingLR` with `eta_min`", cosine_floor, "CosineAnnealingLR flattened the rates"),
    Fault(
        "`lr_scale` under a scheduler of torch", scale_unread, "StepLR does not read it", first=True, scheduler="timm"
    ),
    Fault("`lr_scale` beside rates that are multiplied", both, "would multiply a second time"),
    Fault(
        "multiplied rates under a scheduler of timm",
        twice,
        "the plan's multipliers act twice",
        first=True,
        scheduler="timm",
    ),
    Fault("multiplied rates and `attach`", baked_and_attached, "the plan's multipliers act twice", scheduler="any"),
    Fault("reentrant checkpointing after the frozen layers", reentrant, "checkpoints with use_reentrant=True"),
    Fault("an optimizer with nothing to train", nothing_to_train, "No inf checks were recorded"),
    Fault("a new phase in two processes", two_processes, "would not be synchronised", phases=True),
)


def said(fault: Fault, model: str) -> str:
    """Return all that is said of a fault on a model; what it changed outside the model is put back."""
    run = Run(model, scheduler=fault.scheduler, phases=fault.phases, guard=not fault.late)
    if fault.scheduler == "any":
        run.live.attach(run.optimizer)
    try:
        return run.said_at_once(fault.inject) if fault.first else run.said(fault.inject, late=fault.late)
    finally:
        timm.layers.set_reentrant_ckpt(False)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def page() -> str:
    """Return ``proof.md``."""
    clean = {model: said(Fault("none", nothing, ""), model) for model in (*MODELS, WITH_NORM[-1])}
    rows = []
    for fault in FAULTS:
        answers = [said(fault, model) for model in fault.models]
        named = sum(fault.cause in answer for answer in answers)
        line = next((line for line in answers[0].splitlines() if fault.cause in line), "nothing")
        by = "`verify()`" if fault.late else "`optimizer.step()`" if fault.first else "`step()`"
        rows.append(f"| {fault.title} | {by} | {line.strip().replace('|', '/')} | {named} of {len(answers)} |")
    quiet = sum(not answer for answer in clean.values())
    return "\n".join(
        [
            "# Faults and their messages\n",
            NOTE,
            f"Each of {len(FAULTS)} faults is put into a short training of "
            f"{', '.join(f'`{name}`' for name in MODELS)}. `{WITH_NORM[-1]}` replaces a model that lacks what a fault "
            "needs: batch norm, or a block with both frozen and trained layers. The training calls `seal`, checks its "
            "optimizer, and calls `applied.step(epoch=e)` before each epoch.\n",
            "| found by | the fault happens |",
            "| --- | --- |",
            "| `step()` | between two epochs; the next `applied.step` reports it |",
            "| `verify()` | after the last epoch, with `guard=False`; `verify` compares with `seal(copy=True)` |",
            "| `optimizer.step()` | before the first step, in a loop that calls nothing of the plan |",
            "",
            "The third column is the exact line that names the cause, on the first model. The last column counts the "
            "models on which this cause was named.\n",
            f"Without a fault, the same training says nothing on {quiet} of {len(clean)} models.\n",
            "| fault | found by | message | named on |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Write the page under a temporary name, then rename it."""
    torch.set_num_threads(1)
    temporary = HERE / ".proof.md"
    temporary.write_text(page(), encoding="utf-8")
    temporary.replace(HERE / "proof.md")


if __name__ == "__main__":
    main()
