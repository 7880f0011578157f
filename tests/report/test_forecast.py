"""What training will cost: counted without numbers, and compared with what real steps take."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from freezeplan import FreezePlanError, apply_plan, resolve_plan
from freezeplan.cli import app
from freezeplan.errors import ModelError, PlanError
from freezeplan.model.describer import create_model
from freezeplan.report.forecast import OPTIMIZERS, forecast, measure

MODELS = [
    pytest.param("test_resnet", 64, id="resnet"),
    pytest.param("test_vit", 160, id="vit"),
    pytest.param("test_convnext", 64, id="convnext"),
    pytest.param("tf_efficientnet_lite0", 64, id="efficientnet"),
    pytest.param("vgg16", 64, id="vgg16"),
    pytest.param("swin_tiny_patch4_window7_224", 224, id="swin"),
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["linear_probe", "surgical_last", "full"])
@pytest.mark.parametrize(("name", "size"), MODELS)
def test_a_real_step_takes_what_was_forecast(name, size, plan):
    """Bytes that autograd keeps, FLOPs of both passes, gradients."""
    found = forecast(lambda: create_model(name, num_classes=5, meta=True), plan, image_size=size, batch_size=4)
    model = create_model(name, num_classes=5)
    apply_plan(model, plan)
    kept, forward, backward = measure(model.train(), torch.randn(4, 3, size, size))
    trained = [p for p in model.parameters() if p.requires_grad]

    assert found.cost.activation_bytes == pytest.approx(kept, rel=0.1)
    assert (found.cost.forward_flops, found.cost.backward_flops) == (forward // 4, backward // 4)
    assert found.cost.gradient_bytes == sum(p.nbytes for p in trained)
    assert (found.cost.trained, found.cost.tensors) == (sum(p.numel() for p in trained), len(trained))
    assert found.ratio <= 1
    assert (found.ratio == 1) == (plan == "full")


MAKERS = {
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "adamw" else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_optimizer_state_is_exact(name):
    """Every tensor of the state after a real step."""
    found = forecast(lambda: create_model("test_resnet", meta=True), "surgical_last", image_size=64, batch_size=2)
    model = create_model("test_resnet")
    optimizer = MAKERS[name](apply_plan(model, "surgical_last").trainable_parameters())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values() if tensor is not None]

    assert found.cost.optimizer_bytes(name) == sum(tensor.nbytes for tensor in state)


def test_grouped_convolutions_are_counted_once():
    """The gradient of a depthwise convolution's weight costs what its forward pass does."""
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2)))
    _, forward, backward = measure(model, torch.randn(2, 8, 16, 16))
    one = 2 * 2 * 8 * 16 * 16 * 9

    assert forward == 2 * one
    assert backward == 3 * one  # the first one's images need no gradient


@pytest.mark.slow
def test_the_command(tmp_path):
    """Both outputs, and what is kept on features."""
    arguments = ["forecast", "linear_probe", "resnet18", "--image-size", "64", "--batch-size", "8"]
    runner = CliRunner()
    text = runner.invoke(app, arguments, env={"COLUMNS": "120"}).stdout
    found = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)

    assert text.startswith("linear_probe on resnet18, 64 x 64 pixels, 8 images a step\n")
    assert re.search(r"trained parameters +513,000 +11,689,512 +0\.0439\n", text)
    assert "on kept features of 2,048 bytes an image" in text
    assert found["costs"]["plan"]["gradient_bytes"] == 513_000 * 4
    assert found["cached_ratio"] < 0.01 < found["ratio"] < 0.4
    assert "advice: the features are larger" in runner.invoke(app, ["forecast", "norm_only", *arguments[2:]]).stdout
    assert found == json.loads(json.dumps(found))


@pytest.mark.slow
def test_what_is_frozen_behind_something_trained_is_said():
    """`surgical_first` trains the first stage: what is behind it runs, and only its weights' gradients are saved."""
    arguments = ["surgical_first", "test_resnet", "--image-size", "64", "--batch-size", "2"]
    runner = CliRunner()
    text = runner.invoke(app, ["forecast", *arguments]).stdout
    found = json.loads(runner.invoke(app, ["forecast", *arguments, "--json"]).stdout)
    forward = found["costs"]["plan"]["forward_flops"]
    plan, full = (found["costs"][which]["backward_flops"] for which in ("plan", "full"))

    assert found["behind_flops"] == full - plan > 0
    assert (
        f"frozen behind what is trained: {found['behind_flops']:,} of {forward:,} forward FLOPs an image, and as many "
        "backward for the gradient of their input; no cache saves them\n"
    ) in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "begins", "ends"),
    [
        ("bitfit", "bitfit on test_vit,", "nothing can be kept: no frozen module runs ahead of what is trained\n"),
        (
            "surgical_first",
            "surgical_first on",
            "nothing can be kept: no frozen module runs ahead of what is trained\n",
        ),
        ("gradual_unfreeze", "gradual_unfreeze, phase head (the first of 14) on test_vit,", " of it\n"),
    ],
)
def test_what_a_forecast_is_about_is_said(plan, begins, ends):
    """The phase, of a plan that has several, and why there is nothing to keep."""
    arguments = ["forecast", plan, "test_vit", "--image-size", "160", "--batch-size", "2"]
    text = CliRunner().invoke(app, arguments).stdout

    assert text.startswith(begins)
    assert text.endswith(ends)


def test_what_cannot_be_run_is_said():
    """Images of a size that the model does not take, and code that reads values."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mean((2, 3))) * (2 if float(x.sum()) > 0 else 1)

    plan = {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}
    with pytest.raises(FreezePlanError) as size:
        forecast(lambda: create_model("test_vit", meta=True), "linear_probe", image_size=50, batch_size=2)
    with pytest.raises(ModelError) as value:
        forecast(Reads, plan, image_size=8, batch_size=2)

    assert str(size.value) == (
        "cannot run the model on images of 50 pixels without numbers: Input height (50) should be "
        "divisible by patch size (16).\n"
        "  --image-size, or a model whose code does not read values"
    )
    assert str(value.value) == (
        "cannot run the model on images of 8 pixels without numbers: aten._local_scalar_dense.default\n"
        "  --image-size, or a model whose code does not read values"
    )


@pytest.mark.parametrize(
    ("batch_size", "image_size"), [(10**13, 224), (10**18, 224), (10**30, 224), (2, 10**11), (2, 10**30)]
)
def test_more_than_torch_can_count_is_said(batch_size, image_size):
    """Whether the images themselves overflow or what the model makes of them."""
    with pytest.raises(ModelError) as error:
        forecast(
            lambda: create_model("test_resnet", meta=True),
            "linear_probe", image_size=image_size, batch_size=batch_size,
        )  # fmt: skip

    assert str(error.value) == (
        f"{batch_size:,} images of {image_size:,} pixels have more numbers than torch can count\n"
        "  give a smaller --batch-size or --image-size"
    )


@pytest.mark.parametrize(
    "rules", [[{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}], [{"match": "nowhere", "lr_mult": 1}]]
)
def test_a_plan_that_does_not_fit_says_so_itself(rules):
    """As every other command says it, and not as a model that cannot be run."""
    model = create_model("test_resnet", num_classes=0, meta=True)
    plan = {"version": 1, "rules": rules}
    with pytest.raises(PlanError) as expected:
        resolve_plan(plan, model)
    with pytest.raises(PlanError) as error:
        forecast(lambda: model, plan, image_size=64, batch_size=2)

    assert str(error.value) == str(expected.value)
