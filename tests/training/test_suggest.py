"""``freezeplan suggest``: what each rung measures, what it leaves, what is said, and that the budget is kept."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from freezeplan import load_plan, resolve_plan
from freezeplan.cli import app
from freezeplan.errors import DataError, FreezePlanError
from freezeplan.model.describer import create_model, describe
from freezeplan.training import short_trials, suggest_command
from freezeplan.training.compare_command import compare_plans
from freezeplan.training.costs import costs, flops_by_stage
from freezeplan.training.evidence import Budget, Evidence, with_gradients
from freezeplan.training.gradients import Pull, auto_rgn, fit_head, relative_gradient_norms, scored
from freezeplan.training.parts import in_parts
from freezeplan.training.photos import read_photos
from freezeplan.training.probe import (
    Depth,
    Features,
    carries_to,
    depth_profile,
    linear_head,
    ridge_error,
    stage_features,
)
from freezeplan.training.ranking import Trial, rank
from freezeplan.training.settings import Settings
from freezeplan.training.short_trials import RATES, joined, on_all_parts, ranking, try_out
from freezeplan.training.suggest import candidates, decide
from freezeplan.training.suggest_command import fewer, suggest_plan
from freezeplan.training.suggest_report import carried
from freezeplan.training.trials import Comparison, Job, Photos
from freezeplan.training.weights import blank

MODEL = "test_resnet"
COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def photos(tmp_path_factory, picture) -> Path:
    """Three classes that a colour tells; the validation images are no images, as nobody may read them."""
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
        for number in range(14):
            (folder / "train" / name / f"{number}.png").write_bytes(picture(colour, number))
        (folder / "val" / name / "broken.png").write_bytes(b"no image")
    return folder


def suggested(out: Path, photos: Path, **options) -> dict:
    given = {"model": MODEL, "weights": "random", "image_size": 32, "epochs": 1, "batch_size": 8, "threads": 1}
    given |= {"data": str(photos), "out": out, "cache_dir": out / "cache", "budget": 1e6}
    assert suggest_plan(**{**given, **options}) == 0
    return json.loads((out / "suggestion.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos) -> tuple[Path, dict]:
    """A suggestion without a limit of time: its folder and its data."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = suggested(out, photos)
    return out, {**found, "printed": printed.getvalue()}


# (a) the depth profile


def images_of_colours(each: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(3).repeat(each)
    images = torch.zeros(3 * each, 3, 32, 32)
    images[torch.arange(3 * each), labels] = 1
    return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), labels


def test_the_profile_finds_that_an_early_stage_alone_tells_the_classes_apart():
    """From its second stage on the model knows nothing of its image: the probe is at chance there."""
    torch.manual_seed(0)
    model = create_model(MODEL, num_classes=3)
    with torch.no_grad():
        for parameter in model.layer2.parameters():
            parameter.zero_()
    images, labels = images_of_colours(10)

    found = stage_features(model, describe(model), images.split(8))
    depths = depth_profile(found.stages, labels, seed=0)

    assert [depth.stage for depth in depths] == [0, 1, 2, 3, 4]
    assert [depth.error for depth in depths[:2]] == [0, 0]
    assert all(depth.error > 0.5 for depth in depths[2:])
    best, first = carries_to(depths)
    assert (best.stage, first.stage) == (0, 0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_features_of_a_stage_are_what_its_last_block_returns(name):
    model = create_model(name, num_classes=3)
    block, stage = (model.blocks[2], 3) if name == "test_vit" else (model.layer2, 2)
    images = torch.randn(5, 3, *model.pretrained_cfg["input_size"][1:])
    seen = []
    handle = block.register_forward_hook(lambda _module, _given, value: seen.append(value))
    model.train()

    found = stage_features(model, describe(model), [images[:3], images[3:]])

    handle.remove()
    value = torch.cat(seen).detach()
    assert torch.equal(found.stages[stage], value.mean(1) if value.ndim == 3 else value.mean((2, 3)))
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found.head, expected)


def test_the_model_is_as_before_its_features_were_computed():
    model = create_model(MODEL, num_classes=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    stage_features(model, describe(model), [torch.randn(4, 3, 32, 32)])

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_ridge_probe_is_the_closed_form_of_ridge_regression():
    """Each fold answered by the normal equations in the features' space, where the probe solves their dual."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    rows = torch.randn(24, 4, generator=random) + 0.8 * F.one_hot(labels, 4)
    folds = torch.arange(24) % 5
    standard = ((rows - rows.mean(0)) / rows.std(0, correction=0)).double() / 2

    errors = {}
    for penalty in (100.0, 10.0, 1.0, 0.1, 0.01):
        wrong = 0
        for fold in range(5):
            x, y = standard[folds != fold], F.one_hot(labels[folds != fold], 3).double()
            weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(4, dtype=x.dtype), x.T @ (y - y.mean(0)))
            answers = (standard[folds == fold] @ weight + y.mean(0)).argmax(1)
            wrong += int((answers != labels[folds == fold]).sum())
        errors[penalty] = wrong / 24

    error, penalty = ridge_error(rows, labels, folds)

    assert 0 < error < 0.6
    assert (error, penalty) == (min(errors.values()), min(errors, key=lambda key: (errors[key], -key)))


# (b) gradients


def test_relative_gradient_norms_equal_a_loop_by_hand():
    torch.manual_seed(0)
    model = create_model(MODEL, num_classes=3, drop_rate=0.5)
    images, labels = images_of_colours(4)
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    stages = scored(model, describe(model))
    model.train()

    found = relative_gradient_norms(model, stages, batches)

    assert model.training
    model.eval()
    expected = dict.fromkeys(range(5), 0.0)
    for some, classes in batches:
        model.zero_grad()
        F.cross_entropy(model(some), classes).backward()
        for stage in expected:
            own = [p for name, p in model.named_parameters() if stages.get(name) == stage]
            gradient = sum(float((p.grad**2).sum()) for p in own) ** 0.5
            weights = sum(float((p.detach() ** 2).sum()) for p in own) ** 0.5
            expected[stage] += gradient / weights / len(batches)
    assert {pull.stage: pull.norm for pull in found} == pytest.approx(expected, rel=1e-4)
    assert [pull.rate for pull in found] == pytest.approx([v / max(expected.values()) for v in expected.values()], 1e-4)


def test_norms_biases_the_head_and_tensors_near_zero_have_no_part():
    model = create_model(MODEL, num_classes=3)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1e-6)

    names = scored(model, describe(model))

    assert "layer1.0.conv1.weight" not in names
    assert "layer1.0.conv2.weight" in names
    assert all(name.endswith("weight") and model.get_parameter(name).ndim == 4 for name in names)
    assert not any(name.startswith("fc") for name in names)


def test_the_head_is_at_the_minimum_of_its_loss():
    random = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(30, 4, generator=random), torch.arange(30) % 3
    weight, bias = (tensor.requires_grad_() for tensor in fit_head(inputs, labels, 3))

    loss = F.cross_entropy(F.linear(inputs, weight, bias), labels, reduction="sum") + weight.square().sum() / 2
    gradients = torch.autograd.grad(loss, [weight, bias])

    assert all(float(gradient.abs().max()) < 0.02 for gradient in gradients)
    assert float(weight.detach().abs().max()) > 0.1


@pytest.mark.parametrize(("name", "there"), [("test_resnet", True), ("deit_tiny_distilled_patch16_224", False)])
def test_a_classifier_of_several_layers_is_not_fitted_on_features(name, there):
    model = blank(name, 3)

    assert (linear_head(model, describe(model)) is not None) is there


def test_auto_rgn_gives_every_stage_its_rate_and_no_rate_below_the_least():
    plan = auto_rgn([Pull(0, 0.001, 0.0004), Pull(2, 2.0, 1.0), Pull(4, 0.9, 0.456)])
    model = blank(MODEL, 3)

    rates = {row.name: row.lr_mult for row in resolve_plan(plan, model).rows}

    wanted = {"conv1.0.weight": 0.01, "layer1.0.conv1.weight": 1, "layer2.0.conv1.weight": 1}
    wanted |= {"layer4.0.conv1.weight": 0.46, "fc.weight": 1}
    assert {name: rates[name] for name in wanted} == wanted


# What the first two rungs leave


def depths_of(*errors: float) -> tuple[Depth, ...]:
    return tuple(Depth(stage, 8, error, 0.02, 1.0) for stage, error in enumerate(errors))


def dropped(evidence: Evidence, model: nn.Module | None = None) -> dict[str, str]:
    return {one.name: one.dropped for one in candidates(evidence, model or blank(MODEL, 3)) if one.dropped}


LATE = tuple(Pull(stage, 0.1 * (stage + 1), 0.2 * (stage + 1)) for stage in range(5))


def test_without_evidence_only_the_plan_of_the_gradients_is_missing():
    assert dropped(Evidence()) == {"auto_rgn": "no gradients were measured"}


def test_a_prefix_that_has_lost_the_classes_is_not_frozen():
    assert dropped(Evidence(depths_of(0.5, 0.3, 0.2, 0.25, 0.5), LATE)) == {
        "surgical_last": "the probe at stage 3, the last that it freezes, has 25.0 % error, at stage 2 20.0 %"
    }
    assert dropped(Evidence(depths_of(0.5, 0.3, 0.2, 0.24, 0.5), LATE)) == {}
    assert dropped(Evidence(depths_of(0.5, 0.4, 0.3, 0.2, 0.0), LATE)) == {}, "a later stage is trained"


def test_rates_that_are_nearly_alike_are_full_fine_tuning():
    pulls = (Pull(0, 0.9, 0.9), Pull(1, 0.8, 0.8), Pull(2, 0.9, 0.9), Pull(3, 1.0, 1.0))

    assert dropped(Evidence(pulls=pulls)) == {"auto_rgn": "its rates are nearly alike, the lowest is 0.8 (stage 1)"}


def test_a_preset_that_does_not_fit_the_model_is_said():
    model = nn.Sequential(nn.Linear(2, 2))

    assert dropped(Evidence(), model)["llrd"].startswith("it does not fit the model: ")


def test_a_last_stage_that_has_lost_the_classes_is_said():
    lost, whole = carried(Evidence(depths_of(0.5, 0.3, 0.2, 0.25))), carried(Evidence(depths_of(0.5, 0.3, 0.2, 0.23)))

    assert lost[1:] == ("the last stage, which linear_probe reads, has lost part of it: 25.0 % error",)
    assert whole == lost[:1]


# (c) trials, and the budget


class Silent:
    def started(self, job, images):
        raise AssertionError

    finished = started
    failed = started


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trial(job: Job, error: float = 0.5, seconds: float = 10.0) -> Trial:
    wrong = tuple(number < 100 * error for number in range(100))
    return Trial(job.plan, job.lr, job.seed, error, error, 0.0, seconds, None, 1, False, wrong)


PLANS = {name: load_plan(name) for name in ("linear_probe", "surgical_last", "full", "llrd")}


ERRORS = {"linear_probe": 0.30, "surgical_last": 0.25, "full": 0.40, "llrd": 0.60}
"""Held-out error of each plan in these tests."""


SHORT = Settings(epochs=3, batch_size=8, image_size=32)


class ThreeParts:
    """Parts that know their numbers alone."""

    def __len__(self) -> int:
        return 3

    def holding_out(self, part: int) -> int:
        return part


@pytest.fixture
def spending(monkeypatch, tmp_path):
    """Run the trials by a clock that only they move; returns what was tried, with part 0 held out and with others."""

    def run(budget: float, seconds: float, kept: bool = False):
        clock, again = Clock(), []

        def compare(jobs, _comparison, part, *_, **__):
            clock.now += seconds
            if part:
                again.append((jobs[0].plan, jobs[0].lr, part))
            return [trial(jobs[0], ERRORS[jobs[0].plan] + 0.01 * jobs[0].lr + 0.1 * part, seconds=seconds)], {}

        monkeypatch.setattr(short_trials, "compare", compare)
        limit = Budget(budget, clock)
        tried = try_out(
            PLANS, ThreeParts(), Comparison({}, SHORT, MODEL, None, 3), limit, Silent(), folder=tmp_path, seed=0,
            costs=dict.fromkeys(PLANS, seconds), rates=(1.0, 2.0),
        )  # fmt: skip
        assert kept or limit.left >= 0
        return tried, [(one.plan, one.lr) for one in tried.trials], again

    return run


def test_the_budget_is_spent_on_cheap_plans_first_and_what_is_skipped_is_said(spending):
    tried, order, again = spending(budget=55, seconds=10)

    assert order == [("linear_probe", 1), ("linear_probe", 2), ("surgical_last", 1), ("surgical_last", 2), ("full", 1)]
    assert tried.skipped == (
        "trials of llrd: skipped, about 10 s needed and 5 s of the budget left",
        "trials of full from lr 2 on: skipped, about 10 s needed and 5 s of the budget left",
        "surgical_last and linear_probe with other images held out: skipped, about 20 s needed and 5 s of the budget "
        "left",
    )
    assert (again, tried.again) == ([], ())


def test_trials_that_are_there_need_no_budget(spending, monkeypatch):
    monkeypatch.setattr(short_trials, "read_trial", lambda path: path)

    tried, order, again = spending(budget=0, seconds=10, kept=True)

    assert (len(set(order)), len(again), tried.skipped) == (8, 4, ())


def test_no_trial_starts_that_the_budget_does_not_allow(spending):
    tried, order, _ = spending(budget=9, seconds=10)

    assert (order, len(tried.skipped)) == ([], 4)


def test_within_the_budget_all_plans_get_all_rates_and_the_first_two_all_parts(spending):
    tried, order, again = spending(budget=120, seconds=10)

    assert (len(set(order)), tried.skipped) == (8, ())
    assert again == [(plan, 1, part) for part in (1, 2) for plan in ("surgical_last", "linear_probe")]
    assert [[one.plan for one in some] for some in tried.again] == [["surgical_last", "linear_probe"]] * 2


def test_both_of_the_first_two_are_trained_again_or_none_and_ahead_of_what_costs_more(spending):
    tried, order, again = spending(budget=75, seconds=10)

    assert order[4:] == [("full", 1)]
    assert [part for _, _, part in again] == [1, 1]
    assert tried.skipped[-1] == (
        "surgical_last and linear_probe with other images held out: skipped, about 20 s needed and 5 s of the budget "
        "left"
    )


def test_the_first_two_are_ranked_by_all_images_and_the_others_by_the_first_part(spending):
    tried, _, _ = spending(budget=120, seconds=10)
    probe = [replace(one, wrong=(False,) * 100, val_error=0.0) for some in tried.again for one in some[1:]]
    turned = replace(tried, again=tuple((some[0], one) for some, one in zip(tried.again, probe, strict=True)))

    before, after = ranking(tried), ranking(turned)

    assert [place.plan for place in before] == ["surgical_last", "linear_probe", "full", "llrd"]
    assert [place.plan for place in after] == ["linear_probe", "surgical_last", "full", "llrd"]
    assert before[0].val_error == pytest.approx((0.26 + 0.36 + 0.46) / 3)
    assert after[0].val_error == pytest.approx(0.31 / 3)
    assert [place.val_error for place in after[2:]] == pytest.approx([0.41, 0.61])
    assert after[2].behind is not None
    assert after[2].behind[0] < 0.41 - 0.31 < after[2].behind[1], "behind the first on the first part"


def test_what_was_compared_on_all_images_is_known_when_another_plan_is_second(spending):
    tried, _, _ = spending(budget=120, seconds=10)
    better = trial(Job("full", 1.0, 0), 0.27)

    turned = replace(tried, trials=(*(one for one in tried.trials if one.plan != "full"), better))

    assert [place.plan for place in ranking(turned)][:2] == ["surgical_last", "full"]
    assert ranking(turned)[0].val_error == pytest.approx(0.26)
    assert [place.plan for place in on_all_parts(turned)] == ["surgical_last", "linear_probe"]
    assert on_all_parts(turned)[1].val_error == pytest.approx((0.31 + 0.41 + 0.51) / 3)


def test_more_images_make_the_interval_of_a_difference_narrower():
    one, two = (trial(Job(plan, 1e-3, 0), error) for plan, error in (("linear_probe", 0.3), ("full", 0.36)))
    three = [joined([one] * 3), joined([two] * 3)]

    def width(trials):
        low, high = rank(trials)[1].behind
        return high - low

    assert width(three) == pytest.approx(width([one, two]) / 3**0.5, rel=0.1)


def test_gradients_are_not_measured_without_time_for_the_plan_made_of_them():
    model, images = create_model(MODEL, num_classes=3), type("S", (), {"labels": torch.zeros(6)})()
    features = Features({}, torch.zeros(6, model.fc.in_features))

    found = with_gradients(
        Evidence(forward=0.001), features, model, images, SHORT, Budget(10, Clock()), classes=3, seed=0, ahead=11
    )

    assert (found.pulls, found.skipped) == (
        (),
        (
            "gradients, and the trial of the plan that is made of them: skipped, about 11 s needed and 10 s of the "
            "budget left",
        ),
    )


def test_costs_count_what_a_plan_computes():
    """Full fine-tuning takes every step; a probe is one pass over the images; what is behind a prefix lies between."""
    train, held = (type("S", (), {"labels": torch.zeros(count)})() for count in (100, 50))
    photos = Photos(train, held, 0)
    shared = Comparison({}, SHORT, MODEL, "random", 3)
    evidence = Evidence(forward=0.01, step=0.04)
    plans = {name: load_plan(name) for name in ("linear_probe", "surgical_last", "full")}
    flops = flops_by_stage(blank(MODEL, 3), 32)
    last = flops[4] / sum(flops.values())

    found = costs(plans, photos, shared, evidence)
    uncached = costs(plans, photos, replace(shared, settings=replace(shared.settings, cache=False)), evidence)

    everything = 3 * 100 * 0.04 + (4 * 50 + 100) * 0.01
    assert found == pytest.approx({"linear_probe": 1.5, "surgical_last": 1.5 + last * everything, "full": everything})
    assert set(uncached.values()) == {everything}


def test_flops_of_stages_are_those_of_the_convolutions():
    """All stages together have what the whole model has but for its head."""
    model = blank(MODEL, 3)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, 32, 32, device="meta"))

    found = flops_by_stage(model, 32)

    assert sum(found.values()) == counter.get_total_flops() - 2 * model.fc.weight.numel()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_budget_that_is_used_up_skips_every_rung_and_says_so(tmp_path, photos, capsys):
    clock = iter(range(0, 10**9, 1000))

    found = suggested(tmp_path / "out", photos, budget=60, clock=lambda: float(next(clock)))

    out = capsys.readouterr().out
    assert found["depths"] == found["gradients"] == found["trials"] == []
    assert found["skipped"][0] == "depth profile and gradients: skipped, as the budget is used up"
    assert "no plan was tried: linear_probe is named because it is the cheapest, without evidence" in out
    assert (found["plan"], found["lr"]) == ("linear_probe", None)
    assert "--lr" not in out
    text = (tmp_path / "out" / "suggested.yaml").read_text()
    assert "no trial ran" in text
    assert "% error" not in text


# What is said


def ranked(*rows: tuple[str, float, float]):
    """Places of plans by (name, error, seconds), each wrong on images of its own from the first one on."""
    return rank([trial(Job(plan, 1e-3, 0), error, seconds) for plan, error, seconds in rows])


@pytest.mark.parametrize(
    ("rows", "plan", "sentence"),
    [
        (
            [("linear_probe", 0.10, 1), ("full", 0.40, 9)],
            "linear_probe",
            "linear_probe is enough: linear_probe is best",
        ),
        ([("full", 0.10, 9), ("linear_probe", 0.40, 1), ("llrd", 0.41, 9)], "full", "nothing here beats full"),
        ([("surgical_last", 0.10, 2), ("full", 0.40, 9)], "surgical_last", "surgical_last is best"),
        (
            [("full", 0.300, 9), ("linear_probe", 0.310, 1)],
            "linear_probe",
            "linear_probe is enough: no evidence of a difference between full and linear_probe (+0.0 to +3.0 points); "
            "linear_probe is the cheaper one",
        ),
        (
            [("linear_probe", 0.10, 1), ("surgical_last", 0.40, 2)],
            "linear_probe",
            "linear_probe is best; full was not tried",
        ),
        (
            [("full", 0.300, 9), ("surgical_last", 0.310, 4), ("linear_probe", 0.9, 1)],
            "surgical_last",
            "no evidence of a difference between full and surgical_last (+0.0 to +3.0 points); surgical_last is the "
            "cheaper one",
        ),
        (
            [("linear_probe", 0.3, 1)],
            "linear_probe",
            "linear_probe alone was tried, so nothing is known of other plans",
        ),
    ],
)
def test_what_is_said_follows_from_the_intervals(rows, plan, sentence):
    decision = decide(ranked(*rows))

    assert (decision.plan, decision.sentence) == (plan, sentence)


def test_the_cheaper_plan_trains_less_however_long_it_took():
    """Seconds of a trial depend on who computed the features that are shared."""
    probe, last = trial(Job("linear_probe", 1e-3, 0), 0.3, 4.0), trial(Job("surgical_last", 1e-3, 0), 0.31, 3.0)

    decision = decide(rank([probe, replace(last, trained=100)]))

    assert decision.plan == "linear_probe"
    assert "linear_probe is the cheaper one" in decision.sentence


# The command


@pytest.mark.slow
def test_the_plan_is_valid_and_names_its_evidence(whole, photos, capsys):
    out, found = whole
    path = out / "suggested.yaml"
    lines = path.read_text().splitlines()
    checked = CliRunner().invoke(app, ["check", str(path), MODEL, "--num-classes", "3"])

    assert checked.exit_code == 0, checked.output
    plan, source = load_plan(path), found["plan"]
    rules = [number for number, line in enumerate(lines) if line.startswith("  - ")]
    assert len(rules) == len(plan.rules)
    row = next(row for row in found["ranking"] if row["plan"] == source)
    for number in rules:
        assert lines[number - 1].startswith("  # ")
        assert f"by the trials: {100 * row['val_error']:.1f} % error, place " in lines[number - 1]
    comments = "\n".join(line for line in lines if line.lstrip().startswith("#"))
    assert found["sentence"] in comments
    assert "# a ridge probe is best at stage " in comments
    assert "# the relative gradient is largest at stage " in comments
    assert all(f"trial: {row['plan']}, lr {row['lr']:g}: " in comments for row in found["ranking"])
    if source != "auto_rgn":
        same = resolve_plan(load_plan(source), blank(MODEL, 3))
        assert [row[:4] for row in resolve_plan(plan, blank(MODEL, 3)).rows] == [row[:4] for row in same.rows]


@pytest.mark.slow
def test_every_rung_leaves_its_figures(whole):
    out, found = whole

    assert [depth["stage"] for depth in found["depths"]] == [0, 1, 2, 3, 4]
    assert [pull["stage"] for pull in found["gradients"]] == [0, 1, 2, 3, 4]
    assert max(pull["rate"] for pull in found["gradients"]) == 1
    assert found["gradient_batches"] >= 5
    assert {trial["plan"] for trial in found["trials"]} >= {"linear_probe", "full"}
    assert {trial["lr"] for trial in found["trials"] if trial["plan"] == "full"} == set(RATES)
    assert b"<svg" in (out / "depth.svg").read_bytes()


@pytest.mark.slow
def test_what_is_printed_is_what_was_measured_and_the_command_that_goes_on(whole, photos):
    folder, found = whole
    out, text = found["printed"], " ".join(found["printed"].split())

    for depth in found["depths"]:
        shown = f"{depth['stage']} {depth['channels']} {100 * depth['error']:.1f} {100 * depth['spread']:.1f} "
        assert f" {shown}" in text
    assert found["sentence"] in text
    data = "42 training images in 3 parts, of which one is held out, 3 classes; the validation images were not read"
    assert data in text
    command = next(line for line in out.splitlines() if line.startswith("freezeplan compare "))
    assert command == (
        f"freezeplan compare {folder / 'suggested.yaml'} --model {MODEL} --data {photos} --weights random "
        f"--image-size 32 --lr {found['lr']:g}"
    )


def without_cost(found: dict) -> list[dict]:
    return [{k: v for k, v in one.items() if k not in ("seconds", "peak_bytes")} for one in found["trials"]]


@pytest.mark.slow
def test_a_suggestion_goes_on_where_it_was(tmp_path, photos, whole, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "trials" / "full, lr 0.001, seed 0.json").unlink()
    path = out / "trials" / "linear_probe, lr 0.003, seed 0.json"
    path.write_text(path.read_text()[:-20])
    trained: list[str] = []
    real = suggest_command.Screen.started
    monkeypatch.setattr(
        suggest_command.Screen, "started", lambda s, job, n: (trained.append(job.name), real(s, job, n))[1]
    )
    with pytest.raises(FreezePlanError, match="already holds a suggestion\n  --resume goes on with it"):
        suggested(out, photos)
    with pytest.raises(FreezePlanError, match="holds a suggestion for something else: epochs 1, now 2"):
        suggested(out, photos, resume=True, epochs=2)

    again = suggested(out, photos, resume=True)

    assert trained == ["linear_probe, lr 0.003, seed 0", "full, lr 0.001, seed 0"]
    assert without_cost(again) == without_cost(whole[1])
    kept = [[t for t in found["trials"] if t["plan"] == "auto_rgn"] for found in (again, whole[1])]
    assert kept[0] == kept[1] != []


@pytest.mark.slow
def test_the_validation_images_are_no_part_of_it(tmp_path, photos, whole):
    """They do not decode here, and ``compare``, which reads them, says so."""
    given = {"data": str(photos), "model": MODEL, "weights": "random", "image_size": 32, "out": tmp_path / "out"}

    with pytest.raises(DataError, match="does not decode"):
        compare_plans(["full"], **given)

    assert whole[1]["trials"]


@pytest.mark.parametrize(("images", "sizes"), [(1000, [15, 12, 15]), (4, [3, 3])], ids=["many", "two-a-class"])
def test_every_image_is_held_out_once_and_every_part_has_every_class(photos, images, sizes):
    data = fewer(read_photos(photos), images, seed=0)

    parts = in_parts(data, SHORT, 0, MODEL, lambda done, count: None)

    assert [len(rows) for rows in parts.rows] == sizes
    assert sorted(torch.cat(parts.rows).tolist()) == list(range(len(data.train)))
    for part, rows in enumerate(parts.rows):
        found = parts.holding_out(part)
        assert torch.equal(found.held_out.images, parts.images.images[rows])
        assert len(found.train.labels) == len(data.train) - len(rows)
        assert set(found.held_out.labels.tolist()) == set(found.train.labels.tolist()) == {0, 1, 2}


def test_fewer_images_are_of_every_class(photos):
    data = read_photos(photos)

    found = fewer(data, 9, seed=0)

    assert [sum(photo.objects[0].name == name for photo in found.train) for name in sorted(COLOURS)] == [3, 3, 3]
    assert found.val == data.val
    assert fewer(data, 1000, seed=0) is data
    assert {photo.objects[0].name for photo in fewer(data, 4, seed=0).train} == set(COLOURS)
    assert len(fewer(data, 4, seed=0).train) == 6


@pytest.mark.slow
def test_the_command_and_its_exit_codes(tmp_path, photos):
    words = f"suggest --model {MODEL} --weights random --data {photos} --image-size 32 --epochs 1 --budget 1ms"
    given = [*words.split(), "--out", str(tmp_path / "out"), "--threads", "1"]
    runner = CliRunner()

    wrong = runner.invoke(app, given)
    done = runner.invoke(app, [*given, "--budget", "0.01s"])
    lone = runner.invoke(app, ["suggest", "--model", MODEL, "--data", str(tmp_path / "nothing")])

    assert wrong.exit_code == 2
    assert "expected a time such as 90s, 2m or 1h, found '1ms'" in " ".join(wrong.output.replace("│", "").split())
    assert (done.exit_code, "no plan was tried" in done.output) == (0, True)
    assert isinstance(lone.exception, DataError)


def test_the_help_of_suggest(golden, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")

    found = CliRunner().invoke(app, ["suggest", "--help"], prog_name="freezeplan")

    assert found.exit_code == 0
    words = re.sub("[─│╭╮╰╯]", " ", found.output).split()  # where lines break depends on the version of rich
    golden(GOLDEN / "help_suggest.txt", textwrap.fill(" ".join(words), 100, break_on_hyphens=False) + "\n")
