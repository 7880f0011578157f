"""Plans under transformers' Trainer on a timm wrapper, and in a loop with accelerate, compared with the plain loop."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from freezeplan import apply_plan
from freezeplan.errors import ApplyError, MissingExtraError
from freezeplan.integrations.huggingface import FreezePlanCallback, create_optimizer
from freezeplan.model.describer import reentrant

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

PARTLY = {
    "version": 1,
    "rules": [{"role": "head", "lr_mult": 1}, {"stage": -1, "lr_mult": 0.1}, {"match": ".*", "frozen": True}],
}
BODY = [{"role": "body", "frozen": True}]
RATES = [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}]
BY_EPOCH = {"version": 1, "phases": [{"name": "head", "until": 1, "rules": BODY}, {"name": "all"}], "rules": RATES}
PLATEAU = {"metric": "eval_score", "patience": 1, "goal": "max"}
BY_PLATEAU = {
    "version": 1,
    "phases": [{"name": "head", "until": PLATEAU, "rules": BODY}, {"name": "all"}],
    "rules": RATES,
}


def small(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **({"img_size": 32} if name == "test_vit" else {}))


def wrapper(name: str = "test_resnet") -> Any:
    """As ``from_pretrained`` gives it, without a download."""
    settings = {"img_size": 32} if name == "test_vit" else None
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=3, model_args=settings))
    model.timm_model.load_state_dict(small(name).state_dict())
    return model


def trainer(model: Any, applied: Any, plain: Any, epochs: int, folder: Path, **settings: Any) -> Trainer:
    images, labels = plain.data
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=24,
        train_sampling_strategy="sequential",
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    found = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[FreezePlanCallback()],
        optimizers=(create_optimizer(applied, args), None),
        compute_metrics=lambda _: {"score": np.float64(plain.scores[round(found.state.epoch) - 1])},
    )
    return found


def by_hand(
    plan: Any,
    plain: Any,
    epochs: int,
    name: str = "test_resnet",
    scheduler: Any = "torch",
    checkpointing: bool = False,
) -> nn.Module:
    model = small(name)
    model.set_grad_checkpointing(checkpointing)  # trained BatchNorms then count each batch twice, here as there
    live = apply_plan(model, plan, lr=0.05, scheduler=scheduler)
    optimizer = torch.optim.SGD(live)
    if scheduler == "any":
        live.attach(optimizer)
    plain.train(model, live, optimizer, range(epochs))
    return model


@pytest.mark.parametrize(
    ("name", "checkpointing", "scheduler"),
    [
        ("test_resnet", True, "torch"),
        ("test_vit", False, "any"),
        *(pytest.param("test_resnet", False, kind) for kind in ("torch", "any")),
        *(pytest.param("test_vit", True, kind) for kind in ("torch", "any")),
    ],
)
def test_an_epoch_gives_the_weights_of_the_plain_loop(
    name: str, checkpointing: bool, scheduler: Any, plain: Any, tmp_path: Path
) -> None:
    """The same plan, data and seed, with activations recomputed or not; what is frozen is bit-identical afterwards."""
    model = wrapper(name)
    applied = apply_plan(model.timm_model, PARTLY, lr=0.05, scheduler=scheduler)
    applied.seal()
    trainer(model, applied, plain, 1, tmp_path, activation_checkpointing=checkpointing).train()
    other = by_hand(PARTLY, plain, 1, name, scheduler, checkpointing)

    assert model.timm_model.grad_checkpointing is checkpointing
    assert plain.difference(model.timm_model.state_dict(), other.state_dict()) <= 1e-6
    assert not torch.equal(model.timm_model.get_classifier().weight, small(name).get_classifier().weight)
    assert applied.verify()


@pytest.mark.parametrize(
    ("plan", "second"),
    [pytest.param(BY_EPOCH, 1, id="epoch"), pytest.param(BY_PLATEAU, 3, id="plateau")],
)
@pytest.mark.parametrize("restore", [False, True], ids=["found", "restored"])
def test_phases_are_those_of_the_plain_loop_and_a_run_resumes_in_the_second(
    plan: Any, second: int, restore: bool, plain: Any, tmp_path: Path
) -> None:
    """Stopped on the way into phase two and within it, a run goes on to the same weights."""
    settings = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = wrapper()
    applied = apply_plan(whole.timm_model, plan, lr=0.05)
    trainer(whole, applied, plain, 5, tmp_path, **settings).train()
    named = {"version": 1, "phases": [{**plan["phases"][0]}, {"name": "all"}], "rules": RATES}
    if second == 3:
        named["phases"][0] = {**named["phases"][0], "until": {**PLATEAU, "metric": "score"}}
    other = by_hand(named, plain, 5)
    assert applied.state_dict()["progress"]["ended"] == ([[0, 3]] if second == 3 else [])
    assert plain.difference(whole.timm_model.state_dict(), other.state_dict()) <= 1e-6

    for stopped in (second, second + 1):
        again = wrapper()
        resumed = apply_plan(again.timm_model, plan, lr=0.05)
        run = trainer(again, resumed, plain, 5, tmp_path / f"after-{stopped}", **settings)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{3 * stopped}"))
        assert resumed.state_dict() == applied.state_dict()
        assert plain.difference(whole.timm_model.state_dict(), again.timm_model.state_dict()) <= 1e-6


def test_a_run_stopped_within_an_epoch_of_phase_two_goes_on_to_the_same(plain: Any, tmp_path: Path) -> None:
    """The Trainer skips what of the epoch was seen; the phase is that of the epoch."""
    settings = {"save_strategy": "steps", "save_steps": 5}
    whole, again = wrapper(), wrapper()
    trainer(whole, apply_plan(whole.timm_model, BY_EPOCH, lr=0.05), plain, 3, tmp_path, **settings).train()
    resumed = apply_plan(again.timm_model, BY_EPOCH, lr=0.05)
    run = trainer(again, resumed, plain, 3, tmp_path / "again", **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))

    assert resumed.phase == "all"
    assert plain.difference(whole.timm_model.state_dict(), again.timm_model.state_dict()) <= 1e-6


def test_arguments_make_the_optimizer(tmp_path: Path) -> None:
    """Rate, betas and decay come from the arguments; the plan's multipliers and exemptions stay."""
    applied = apply_plan(small(), PARTLY, lr=1e-3)
    args = TrainingArguments(
        str(tmp_path), optim="adamw_torch", learning_rate=1e-3, adam_beta2=0.9, weight_decay=0.05, use_cpu=True
    )
    optimizer = create_optimizer(applied, args)

    assert type(optimizer) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        (pytest.approx(1e-4), 0.05, (0.9, 0.9)),
        (pytest.approx(1e-4), 0.0, (0.9, 0.9)),
        (1e-3, 0.05, (0.9, 0.9)),
        (1e-3, 0.0, (0.9, 0.9)),
    ]


def test_an_optimizer_that_chooses_its_parameters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer-wise ones of transformers take a model, or come with groups of their own."""
    applied = apply_plan(small(), PARTLY, lr=1e-3)
    args = TrainingArguments(str(tmp_path), optim="galore_adamw", use_cpu=True)
    given = (torch.optim.AdamW, {"lr": 0.1, "params": []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: given))
    with pytest.raises(ApplyError) as error:
        create_optimizer(applied, args)

    assert str(error.value) == ("optim='galore_adamw' makes its own groups of parameters, so it cannot take the plan's")


def test_phases_in_several_processes_are_refused_at_the_start() -> None:
    """The Trainer wraps the model once."""
    model = wrapper()
    apply_plan(model.timm_model, BY_EPOCH, lr=0.05)
    with pytest.raises(ApplyError, match=r"^the plan 'plan' has phases, and 2 processes train: "):
        FreezePlanCallback().on_train_begin(
            SimpleNamespace(world_size=2), TrainerState(), None, model=model, train_dataloader=[]
        )


class Endless(IterableDataset):
    """Images without a length, as from a stream."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def endless(plan: Any, plain: Any, folder: Path) -> Trainer:
    model = wrapper()
    run = trainer(model, apply_plan(model.timm_model, plan, lr=0.05), plain, 1, folder, max_steps=4)
    run.train_dataset = Endless(run.train_dataset)
    return run


def test_phases_on_data_without_a_length_are_refused_at_the_start(plain: Any, tmp_path: Path) -> None:
    """The Trainer takes max_steps for one epoch then, so no phase would ever end."""
    with pytest.raises(ApplyError) as error:
        endless(BY_EPOCH, plain, tmp_path).train()

    assert str(error.value) == (
        "the plan 'plan' has phases, and this trainer counts no epochs of data without a length\n"
        "  give the data set a __len__, or train in a loop of your own: applied.step(epoch=e)"
    )


def test_a_plan_without_phases_is_trained_on_data_without_a_length(plain: Any, tmp_path: Path) -> None:
    """Four steps are a pass of three and the first of the next."""
    run = endless(PARTLY, plain, tmp_path)
    run.train()

    assert run.state.global_step == 4


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the import says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "freezeplan.integrations.huggingface", raising=False)
    with pytest.raises(MissingExtraError) as error:
        importlib.import_module("freezeplan.integrations.huggingface")

    assert str(error.value) == f"this needs {package}, which is not installed\n  pip install 'freezeplan[transformers]'"


@pytest.mark.parametrize(
    ("place", "lacks"),
    [
        pytest.param(
            ("transformers.trainer_callback", "ExportableState"),
            "cannot import name 'ExportableState' from 'transformers.trainer_callback'",
            id="no-such-name",
        ),
        pytest.param(
            ("transformers.trainer_callback", None),
            "import of transformers.trainer_callback halted; None in sys.modules",
            id="no-such-module",
        ),
    ],
)
def test_a_package_that_is_too_old_is_named_with_its_extra(
    place: tuple[str, str | None], lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the installed one lacks, and what to install."""
    module, name = place
    if name is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.delattr(sys.modules[module], name)
    monkeypatch.delitem(sys.modules, "freezeplan.integrations.huggingface", raising=False)
    with pytest.raises(MissingExtraError) as error:
        importlib.import_module("freezeplan.integrations.huggingface")

    assert str(error.value) == (
        f"this needs a newer transformers, the installed one is too old: {lacks}\n"
        "  pip install 'freezeplan[transformers]'"
    )
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def accelerated(plan: Any, plain: Any, epochs: int, folder: Path, *, stop: int | None = None) -> tuple[Any, Any]:
    """The loop of docs/trainers/accelerate.md; with ``stop`` it is stopped after so many epochs and resumed."""
    live: Any = None
    for first, last in [(0, epochs)] if stop is None else [(0, stop), (stop, epochs)]:
        accelerator = Accelerator(cpu=True)
        model = small()
        live = apply_plan(model, plan, lr=0.05)
        live.seal()
        optimizer = torch.optim.SGD(live)
        loader = DataLoader(TensorDataset(*plain.data), batch_size=8)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(live)
        if first:
            accelerator.load_state(str(folder / "state"))
        for epoch in range(first, last):
            live.step(epoch=epoch, metrics={"score": plain.scores[epoch - 1]} if epoch else {})
            model.train()
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
        accelerator.save_state(str(folder / "state"))
        accelerator.free_memory()
    return model, live


SCORE = {
    **BY_PLATEAU,
    "phases": [{"name": "head", "until": {**PLATEAU, "metric": "score"}, "rules": BODY}, {"name": "all"}],
}


@pytest.mark.parametrize(
    ("plan", "stop"),
    [
        pytest.param(PARTLY, None, id="no phases"),
        pytest.param(SCORE, 4, id="plateau"),
        *(pytest.param(BY_EPOCH, stop, id=f"epoch-{stop}") for stop in (None, 1, 2)),
        *(pytest.param(SCORE, stop, id=f"plateau-{stop}") for stop in (None, 2, 3)),
    ],
)
def test_accelerate_is_the_plain_loop(plan: Any, stop: int | None, plain: Any, tmp_path: Path) -> None:
    """Prepared, saved and resumed, in any phase; an applied plan is one more thing to register."""
    model, live = accelerated(plan, plain, 5, tmp_path, stop=stop)
    other = by_hand(plan, plain, 5)

    assert plain.difference(model.state_dict(), other.state_dict()) <= 1e-6
    assert live.verify()


TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_of_transformers_is_named() -> None:
    """A model of images that transformers checkpoints reentrantly gets no gradient behind a frozen prefix."""
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **TINY))
    rules = [{"match": r"vit\.embeddings|vit\.layers\.0", "frozen": True}, {"match": ".*", "lr_mult": 1}]
    live = apply_plan(model, {"version": 1, "rules": rules})
    missing, said = [], []
    for way in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": way})
        model.train()(pixel_values=torch.zeros(2, 3, 8, 8)).logits.sum().backward()
        missing.append(sum(p.requires_grad and p.grad is None for p in model.vit.layers.parameters()))
        model.zero_grad()
        try:
            live.check()
        except ApplyError as error:
            said += str(error).splitlines()

    assert missing == [0, 16]
    assert said == [
        "'vit.layers.0' checkpoints with use_reentrant=True behind a frozen prefix: "
        "'vit.layers.1.attention.q_proj.weight' and what else is in its segment get no gradient, without an error",
        "  use_reentrant=False: "
        'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
    ]


def test_a_model_of_text_gives_its_checkpoints_a_gradient() -> None:
    """transformers hooks its embeddings then, so that nothing is lost until the hook is gone."""
    model = BertForSequenceClassification(BertConfig(vocab_size=9, **TINY))
    model.activation_checkpointing_enable({"use_reentrant": True})
    hooked = reentrant(model)
    model.disable_input_require_grads()

    assert (hooked, reentrant(model)) == ("", "'bert'")
