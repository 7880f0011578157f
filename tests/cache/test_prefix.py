"""The frozen prefix: what can be memoised, what of it is read, and why the rest cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from freezeplan import apply_plan
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
EVERYTHING = {"match": ".*", "lr_mult": 1}


def stages(which):
    return {"version": 1, "rules": [{"stage": which, "frozen": True}, EVERYTHING]}


def found(name, plan, **arguments):
    return apply_plan(create_model(name, num_classes=5, **arguments), plan).prefix(IMAGES)


MODELS = [
    pytest.param("test_resnet", "linear_probe", {"global_pool"}, id="pooled-features"),
    pytest.param("resnet18", stages("..2"), {"layer2"}, id="two-stages"),
    pytest.param("vgg16_slim_fc256", "voc_vgg16/frozen_convs", {"features"}, id="vgg"),
    pytest.param("test_convnext", "frozen_stages_2", {"stages.1"}, id="convnext"),
    pytest.param("test_efficientnet", "linear_probe", {"global_pool"}, id="efficientnet"),
]


@pytest.mark.parametrize(("name", "plan", "read"), MODELS)
def test_what_is_read_is_where_the_frozen_part_ends(name, plan, read):
    """One output is kept; what is ahead of it is computed for nothing but that, and nothing is left over."""
    import freezeplan.voc_vgg16.model  # noqa: F401  # registers the slim VGG

    prefix = found(name, plan)

    assert {call.module for call in prefix.stored} == read
    assert not prefix.reasons
    assert 0 < prefix.flops < prefix.total_flops


def test_bytes_and_flops_are_those_of_the_layers():
    """Counted by hand on two convolutions, the second one grouped, and a classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(8 * 64 * 64, 5),
    )  # fmt: skip
    rules = [{"match": "4", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(model, {"version": 1, "rules": rules}).prefix(IMAGES)
    first, second, linear = 2 * 64 * 64 * 8 * 27, 2 * 64 * 64 * 8 * 9, 2 * 8 * 64 * 64 * 5

    assert [call.module for call in prefix.calls] == ["0", "1", "2", "3"]
    assert [call.module for call in prefix.stored] == ["3"]
    assert prefix.bytes == 8 * 64 * 64 * 4
    assert prefix.image_bytes == 3 * 64 * 64 * 4
    assert (prefix.flops, prefix.total_flops) == (first + second, first + second + linear)
    assert "advice: the features are larger than the images" in str(prefix)


def test_what_is_frozen_behind_something_trained_has_a_cost():
    """Three convolutions, the middle one trained: the last one runs each step, forward and for its input's gradient."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()),
    )  # fmt: skip
    rules = [{"match": "1", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(model, {"version": 1, "rules": rules}).prefix(IMAGES)
    first, second, third = 2 * 64 * 64 * 4 * 27, 2 * 64 * 64 * 4 * 4, 2 * 64 * 64 * 8 * 36
    counted = FlopCounterMode(display=False)
    answer = model(IMAGES)
    with counted:
        answer.sum().backward()

    assert (prefix.flops, prefix.behind_flops) == (first, third)
    assert prefix.total_flops == first + second + third
    assert counted.get_total_flops() == 2 * (second + third)  # of two images: the trained weights', the third's input
    assert str(prefix).splitlines()[-2:] == [
        f"frozen layers after a trained layer: {third:,} of {first + second + third:,} forward FLOPs, "
        "run in each step, and as many backward for the gradient of their input",
        "not cached: 2: behind what is trained",
    ]


def test_watching_changes_nothing():
    """Values, buffers, gradients, modes, hooks, random state."""
    model = create_model("test_resnet", num_classes=3)
    live = apply_plan(model, stages("..1"))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()

    live.prefix(IMAGES)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


class Twice(nn.Module):
    """One frozen module called twice, one of its outputs unread; a path around; a dictionary in between."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 1)
        self.packed = Packed()
        self.unread = nn.Conv2d(3, 3, 1)
        self.noise = nn.Dropout(0.5)
        self.head = nn.Linear(3, 2)
        self.late = nn.Linear(2, 2)

    def forward(self, x):
        self.unread(x)
        once, twice = self.shared(x), self.shared(x + 1)
        parts = self.packed(once)
        return self.late(self.head((parts["sum"] + twice + self.noise(parts["pair"][0])).mean((2, 3))))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        return {"sum": y + x, "pair": (y, x)}


def test_calls_outputs_and_reasons_by_name():
    """Modules called twice, nested outputs, what nobody reads, what is random, what is behind something trained."""
    rules = [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}, {"match": "noise", "mode": "train"}]
    prefix = apply_plan(Twice(), {"version": 1, "rules": rules}).prefix(IMAGES)

    assert [(call.module, call.number, call.bytes > 0) for call in prefix.calls] == [
        ("unread", 0, False),
        ("shared", 0, False),
        ("shared", 1, True),
        ("packed", 0, True),
    ]
    assert prefix.reasons == {"noise": "random: Dropout p=0.5", "late": "behind what is trained"}
    assert "not cached: noise: random: Dropout p=0.5" in str(prefix)


def test_batch_norm_in_train_is_named():
    """A rule may keep frozen batch norm alive; then nothing behind it is the same twice."""
    plan = {
        "version": 1,
        "rules": [{"role": "norm", "mode": "train"}, {"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}],
    }
    prefix = found("resnet18", plan)

    assert prefix.reasons["bn1"] == "batch norm in train, whose answer depends on the batch"


def test_nothing_to_memoise_is_said():
    """Where all is trained."""
    assert str(found("test_resnet", "full")) == "no frozen layer before the first trained one can be cached"


class Own(nn.Module):
    """A frozen convolution, something done to its answer by the module's own code, and a head."""

    def __init__(self, code):
        super().__init__()
        self.part, self.head = Coded(code), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.part(x).mean((2, 3)))


class Coded(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.conv, self.code = nn.Conv2d(3, 3, 1), code

    def forward(self, x):
        return self.code(self.conv(x))


ON_BATCH = "its output for an image depends on the other images of the batch"
NOT_TWICE = "its output is not the same for the same batch twice: it is random, or its kernels are not deterministic"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (lambda y: y - y.mean(0), ON_BATCH),
        (lambda y: y - y[:1], ON_BATCH),
        (lambda y: y - y[-1:], ON_BATCH),
        (lambda y: y - 1e-6 * y.mean(0), ON_BATCH),
        (lambda y: y.cumsum(0), ON_BATCH),
        (lambda y: F.batch_norm(y, None, None, training=True), ON_BATCH),
        (lambda y: F.dropout(y, 0.5, True), NOT_TWICE),
        (lambda y: y + 1e-6 * torch.rand_like(y), NOT_TWICE),
    ],
    ids=["batch-mean", "first-image", "last-image", "a-trace", "sum", "batch-norm", "dropout", "a-trace-of-chance"],
)
def test_what_code_of_a_module_does_with_the_batch_is_seen(code, reason):
    """No class and no gradient shows it; an image among other companions does, however little it is."""
    rules = [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(Own(code), {"version": 1, "rules": rules}).prefix(IMAGES)

    assert [call.module for call in prefix.stored] == ["part.conv"]
    assert prefix.reasons == {"part": reason}


def test_what_changes_with_the_number_of_images_is_measured_and_said():
    """It may be the rounding of a device that chooses kernels by shape, so it is reported and never judged."""
    rules = [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(Own(lambda y: y / len(y)), {"version": 1, "rules": rules}).prefix(IMAGES)

    assert [call.module for call in prefix.stored] == ["part"]
    assert 0.3 < prefix.size_difference < 0.4
    assert "features of this device differ by 3.3e-01 of the largest with the batch size" in str(prefix).splitlines()


class Box:
    """No number and no tensor."""


@pytest.mark.parametrize(
    ("code", "use", "reason"),
    [
        (lambda y: (y, Box()), lambda y: y[0], "it gives a Box, which cannot be kept"),
        (lambda y: y.mean(0), lambda y: y[None], "its output has no batch dimension: (3, 64, 64) for two, (3, 64, 64) "
         "for three"),
        (lambda y: [y] * len(y), lambda y: y[0], "its answer has another structure for another number of images"),
    ],
    ids=["kind", "axis", "structure"],
)  # fmt: skip
def test_answers_that_cannot_be_kept_are_named(code, use, reason):
    """The module that gives them runs, what is below it is kept."""

    class Using(Own):
        def forward(self, x):
            return self.head(use(self.part(x)).mean((2, 3)))

    rules = [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(Using(code), {"version": 1, "rules": rules}).prefix(IMAGES)

    assert [call.module for call in prefix.stored] == ["part.conv"]
    assert prefix.reasons == {"part": reason}


def test_what_changes_in_place_what_is_read_runs():
    """Its argument is kept as it was before."""

    class Doubling(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.mul_(2))

    class Using(Own):
        def __init__(self):
            super().__init__(lambda y: y)
            self.late = Doubling(3, 3, 1)

        def forward(self, x):
            y = self.part(x)
            return self.head((self.late(y) + y).mean((2, 3)))

    rules = [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(Using(), {"version": 1, "rules": rules}).prefix(IMAGES)

    assert [call.module for call in prefix.stored] == ["part"]
    assert prefix.reasons == {"late": "it changes in place what the rest of the pass reads"}


def test_a_model_whose_trained_part_reads_the_image_keeps_nothing():
    """A path around the frozen part."""

    class Around(Own):
        def forward(self, x):
            return self.head((self.part(x) + x).mean((2, 3)))

    rules = [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    prefix = apply_plan(Around(lambda y: y), {"version": 1, "rules": rules}).prefix(IMAGES)

    assert prefix.calls == ()
    assert prefix.reasons == {"": "what is trained reads the image itself"}
    assert prefix.obstacle == "the model: what is trained reads the image itself"
    assert str(prefix).splitlines() == [
        "no frozen layer before the first trained one can be cached",
        "not cached: the model: what is trained reads the image itself",
    ]


class Fickle(nn.Module):
    """Calls its parts in another order each time."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.turn = 0

    def forward(self, x):
        self.turn += 1
        first, second = (self.a, self.b) if self.turn % 2 else (self.b, self.a)
        return self.head(second(first(x)).mean((2, 3)))


def test_another_order_each_time_is_not_memoised():
    """Found by watching twice."""
    plan = {"version": 1, "rules": [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
    prefix = apply_plan(Fickle(), plan).prefix(IMAGES)

    assert prefix.calls == ()
    assert prefix.reasons == {"": "its parts are not called in a fixed order"}


def test_what_cannot_be_watched_is_refused():
    """One image, and a pass in which nothing trained takes part."""
    live = apply_plan(create_model("test_resnet", num_classes=3), "linear_probe")
    with pytest.raises(ApplyError) as one:
        live.prefix(IMAGES[:1])
    idle = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    idle.forward = lambda x: idle["used"](x)
    plan = {"version": 1, "rules": [{"match": "used", "frozen": True}, EVERYTHING]}
    with pytest.raises(ApplyError) as nothing:
        apply_plan(idle, plan).prefix(torch.zeros(2, 2))

    assert str(one.value) == (
        "a sample is a batch of at least two images, found the shape (1, 3, 64, 64)\n"
        "  applied.prefix(next(iter(loader))[0])"
    )
    assert str(nothing.value) == ("the model's answer to the sample requires no grad: nothing trained takes part in it")
