"""``freezeplan compare``: every plan gets the same images, budget and head; the rate is chosen apart from the error."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from freezeplan.cli import app
from freezeplan.errors import DataError, FreezePlanError, PlanError
from freezeplan.training import compare_command, trials
from freezeplan.training.compare import fit_to, hold_out, load_plans, read_trial
from freezeplan.training.compare_command import compare_plans
from freezeplan.training.photos import read_photos
from freezeplan.training.trials import Job, peak
from freezeplan.training.weights import blank

MODEL = "test_resnet"


def compared(out: Path, photos: Path, *plans: str, **options) -> dict:
    given = {"model": MODEL, "weights": "random", "image_size": 32, "epochs": 2, "batch_size": 8, "threads": 1}
    code = compare_plans(plans, **{**given, "data": str(photos), "out": out, "cache_dir": out / "cache", **options})
    return {**json.loads((out / "results.json").read_text()), "code": code}


def without_cost(results: dict) -> list[dict]:
    """The trials without what differs from run to run."""
    return [{k: v for k, v in trial.items() if k not in ("seconds", "peak_bytes")} for trial in results["trials"]]


@pytest.mark.slow
def test_plans_are_ranked_with_their_best_rates(tmp_path, photos, capsys):
    found = compared(tmp_path / "out", photos, "linear_probe", "full", lr=[1e-3, 1e-2], seed=[0, 1])
    out = capsys.readouterr().out

    assert found["code"] == 0
    assert len(found["trials"]) == 2 * 2 * 2
    assert {row["plan"] for row in found["ranking"]} == {"linear_probe", "full"}
    for row in found["ranking"]:
        mine = [t for t in found["trials"] if t["plan"] == row["plan"]]
        by_rate = {lr: sum(t["choice_error"] for t in mine if t["lr"] == lr) for lr in (1e-3, 1e-2)}
        assert row["lr"] == min(by_rate, key=lambda lr: (by_rate[lr], lr))
        assert row["val_error"] == pytest.approx(sum(t["val_error"] for t in mine if t["lr"] == row["lr"]) / 2)
    model = blank(MODEL, 3)
    counts = {"linear_probe": model.fc.weight.numel() + 3, "full": sum(p.numel() for p in model.parameters())}
    assert {(t["plan"], t["trained"], t["features"]) for t in found["trials"]} == {
        ("linear_probe", counts["linear_probe"], True),
        ("full", counts["full"], False),
    }
    assert all(
        (tmp_path / "out" / name).stat().st_size > 100 for name in ("results.csv", "comparison.svg", "report.html")
    )
    table = out[out.index("plan  ") : out.index("no other plan")].rpartition("\n")[0]  # sentences below are not cut
    assert len(table.splitlines()) == 3
    assert [line for line in table.splitlines() if len(line.rstrip()) > 80] == []
    assert "no validation split: 20% of each class, by seed 0" in out


@pytest.mark.slow
def test_every_plan_sees_the_same_images_in_the_same_order(tmp_path, photos):
    """The same plan under two names, so alone and beside others, gives the same digits."""
    plan = tmp_path / "again.yaml"
    plan.write_text("version: 1\nrules:\n  - {role: head, lr_mult: 1}\n  - {match: .*, frozen: true}\n")

    both = compared(tmp_path / "a", photos, "full", "linear_probe", str(plan), lr=[1e-2])
    alone = compared(tmp_path / "b", photos, "linear_probe", lr=[1e-2])

    (probe,) = without_cost(alone)
    assert [{**t, "plan": ""} for t in without_cost(both)[1:]] == [{**probe, "plan": ""}] * 2


def test_the_rate_is_chosen_on_images_that_are_not_validated_on(photos):
    data = read_photos(photos)
    held, count = hold_out(data, 0)

    assert count == 2 * 3
    assert {p.file for p in held.val[:count]} < {p.file for p in data.train}
    assert held.val[count:] == data.val
    assert {p.file for p in held.train} | {p.file for p in held.val[:count]} == {p.file for p in data.train}


def test_a_class_with_one_training_image_is_named(tmp_path, picture):
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(picture((9, 9, 9), 0))

    with pytest.raises(DataError) as caught:
        hold_out(read_photos(tmp_path), 0)

    assert str(caught.value) == (
        f"{tmp_path}: class 'b' has one training image, and a part of each class is held out to choose the rate\n"
        "  add images of it, or leave out such classes with --skip-bad"
    )


def test_a_plan_that_freezes_the_new_head_gets_it_trained():
    plans, notes = fit_to(load_plans(["surgical_first", "linear_probe"]), blank(MODEL, 3))

    assert notes == ("surgical_first freezes the head, which is new and knows nothing: it is trained too",)
    assert plans["surgical_first"].rules[0].role == ("head",)
    assert plans["linear_probe"] == load_plans(["linear_probe"])["linear_probe"]


def test_all_plans_that_do_not_fit_are_named_before_anything_is_trained(tmp_path, photos):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            "version: 1\nrules:\n  - {match: nothing, frozen: true}\ndefault: {lr_mult: 1}\n"
        )

    with pytest.raises(PlanError) as caught:
        compared(tmp_path / "out", photos, str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml"))

    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_stands_for_the_plans_in_it(tmp_path):
    for name in ("b.yaml", "a.toml"):
        (tmp_path / name).write_text(
            "version = 1\nrules = [{match = '.*', lr_mult = 1}]\n"
            if name == "a.toml"
            else "version: 1\nrules: [{match: .*, lr_mult: 1}]\n"
        )
    (tmp_path / "notes.txt").write_text("no plan")

    assert list(load_plans([tmp_path, "full"])) == ["a", "b", "full"]
    with pytest.raises(PlanError, match="two plans would be called 'a'"):
        load_plans([tmp_path, tmp_path / "a.toml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"empty: holds no plan\n  plans are .yaml, .yml, .toml, .json files"):
        load_plans([tmp_path / "empty"])


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was(tmp_path, photos, monkeypatch):
    out = tmp_path / "out"
    first = compared(out, photos, "linear_probe", lr=[1e-3, 1e-2])
    with pytest.raises(FreezePlanError, match="already holds a comparison\n  --resume goes on with it"):
        compared(out, photos, "linear_probe", "full", lr=[1e-3])
    started: list[Job] = []
    real = compare_command.Screen.started
    monkeypatch.setattr(compare_command.Screen, "started", lambda s, job, n: (started.append(job), real(s, job, n))[1])

    second = compared(out, photos, "linear_probe", "full", lr=[1e-3, 1e-2], resume=True)

    assert [job.plan for job in started] == ["full", "full"]
    assert [t for t in second["trials"] if t["plan"] == "linear_probe"] == first["trials"]


def test_a_comparison_of_something_else_is_not_gone_on_with(tmp_path, photos):
    mine = tmp_path / "mine.yaml"
    mine.write_text("version: 1\nrules:\n  - {match: .*, lr_mult: 1}\n")
    out = tmp_path / "out"
    compared(out, photos, str(mine), lr=[1e-3], epochs=1)
    mine.write_text("version: 1\nrules:\n  - {match: .*, lr_mult: 2}\n")

    with pytest.raises(FreezePlanError, match=r"holds another run: its plan mine is .*lr_mult.:1.0.*, now it is .*2.0"):
        compared(out, photos, str(mine), lr=[1e-3], epochs=1, resume=True)
    with pytest.raises(FreezePlanError, match=r"holds another run: its training is 1 epochs .*, now it is 2 epochs"):
        compared(out, photos, "full", lr=[1e-3], epochs=2, resume=True)
    with pytest.raises(FreezePlanError, match="holds another run: its held-out images is seed 0, now it is seed 1"):
        compared(out, photos, "full", lr=[1e-3], epochs=1, seed=[1, 0], resume=True)


@pytest.mark.slow
def test_the_worse_half_is_stopped(tmp_path, photos, capsys):
    """What is stopped was among the worse at that time; what was trained to the end has the figures of a full run."""
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    whole = compared(tmp_path / "a", photos, "linear_probe", "full", lr=rates, seed=[0, 1], epochs=4)
    capsys.readouterr()

    found = compared(tmp_path / "b", photos, "linear_probe", "full", lr=rates, seed=[0, 1], epochs=4, halving=True)

    out = capsys.readouterr().out
    kept = without_cost(found)
    assert len(kept) == 2 * 2
    assert all(trial in without_cost(whole) for trial in kept)
    assert len(found["stopped"]) == 2 * (4 + 2)
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "b" / "trials").glob("*epochs.json")}
    for epoch, arms in ((1, 8), (2, 4)):
        errors: dict[tuple[str, float], float] = {}
        for trial in files.values():
            if trial["until"] == epoch:
                arm = trial["plan"], trial["lr"]
                errors[arm] = errors.get(arm, 0) + trial["choice_error"]
        going = {(t["plan"], t["lr"]) for t in files.values() if t["until"] == 2} if epoch == 1 else {
            (t["plan"], t["lr"]) for t in kept
        }  # fmt: skip
        assert (len(errors), len(going)) == (arms, arms // 2)
        assert max(errors[arm] for arm in going) <= min(errors[arm] for arm in set(errors) - going)
    assert out.count("stopped: ") == len(found["stopped"])
    assert "after 1 of 4 epochs, at " in found["stopped"][0]
    assert not (tmp_path / "b" / "trials" / "unfinished").exists()


@pytest.mark.slow
def test_a_seed_that_fails_stops_no_other_seed(tmp_path, photos, monkeypatch):
    """What failed is told once, under the name of the whole trial; only what was behind is called stopped."""
    real, tried = trials.train_one, []

    def train_one(job, *rest):
        tried.append(job.name)
        if (job.plan, job.lr, job.seed) == ("linear_probe", 1e-2, 1):
            raise FreezePlanError("no memory left")
        return replace(real(job, *rest), choice_error=0.1 if job.lr == 1e-2 else 0.9)

    monkeypatch.setattr(trials, "train_one", train_one)

    found = compared(tmp_path / "out", photos, "linear_probe", lr=[1e-3, 1e-2], seed=[0, 1], epochs=2, halving=True)

    assert (found["code"], found["failed"]) == (1, {"linear_probe, lr 0.01, seed 1": "no memory left"})
    assert tried.count("linear_probe, lr 0.01, seed 1, 1 epochs") == 1
    assert [(trial["lr"], trial["seed"]) for trial in found["trials"]] == [(1e-2, 0)]
    assert [said.partition(":")[0] for said in found["stopped"]] == [
        "linear_probe, lr 0.001, seed 0",
        "linear_probe, lr 0.001, seed 1",
    ]


@pytest.mark.slow
def test_a_damaged_trial_is_trained_again(tmp_path, photos):
    out = tmp_path / "out"
    first = compared(out, photos, "linear_probe", lr=[1e-3])
    path = out / "trials" / "linear_probe, lr 0.001, seed 0.json"
    path.write_text(path.read_text()[:-20])

    assert read_trial(path) is None
    assert without_cost(compared(out, photos, "linear_probe", lr=[1e-3], resume=True)) == without_cost(first)


@pytest.mark.slow
def test_a_plan_that_cannot_be_trained_stops_no_other(tmp_path, photos, monkeypatch):
    real = trials.train_one

    def train_one(job, *rest):
        if job.plan == "full":
            raise FreezePlanError("no memory left", notes=["--batch-size 4"])
        return real(job, *rest)

    monkeypatch.setattr(trials, "train_one", train_one)

    found = compared(tmp_path / "out", photos, "full", "linear_probe", lr=[1e-3])

    assert found["code"] == 1
    assert found["failed"] == {"full, lr 0.001, seed 0": "no memory left\n  --batch-size 4"}
    assert [row["plan"] for row in found["ranking"]] == ["linear_probe"]


def test_the_command_and_its_exit_codes(tmp_path, photos):
    words = (
        f"compare linear_probe --model {MODEL} --weights random --data {photos} --image-size 32 --epochs 1 --lr 0.01"
    )
    given = [*words.split(), "--threads", "1", "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "c")]
    runner = CliRunner()

    done = runner.invoke(app, given)
    wrong = runner.invoke(app, [*given, "--lr", "0"])
    lone = runner.invoke(app, [*given, "--address", "somewhere"])

    assert (done.exit_code, "linear_probe alone was trained, its best rate is 0.01" in done.output) == (0, True)
    assert (wrong.exit_code, lone.exit_code) == (2, 2)


def test_the_model_gets_its_images_as_timm_evaluates_it():
    image = Image.effect_noise((80, 60), 90).convert("RGB")

    found = compare_command.eval_transform(MODEL, 32)(image)

    assert (found.shape, found.dtype) == ((3, 32, 32), torch.uint8)


def test_the_largest_memory_is_measured_anew():
    assert (peak(torch.device("cpu")) or 1) > 0


def dying_once(mark: Path):
    """What a worker runs, killed the first time that ``full`` is trained; defined inside, it travels by value."""

    def train_there(job, shared):
        import os
        import signal

        from freezeplan.training.on_ray import train_there

        if job.plan == "full" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_there(job, shared)

    return train_there


@pytest.mark.slow
def test_ray_gives_the_same_digits_and_runs_a_killed_worker_again(tmp_path, photos, monkeypatch):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    from freezeplan.training import on_ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    here = compared(tmp_path / "a", photos, "linear_probe", "full", lr=[1e-3, 1e-2])
    monkeypatch.setattr(on_ray, "train_there", dying_once(tmp_path / "died"))

    there = compared(tmp_path / "b", photos, "linear_probe", "full", lr=[1e-3, 1e-2], ray=True)

    assert (tmp_path / "died").exists()
    assert (there["code"], without_cost(there)) == (0, without_cost(here))
