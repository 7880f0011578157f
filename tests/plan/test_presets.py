"""What each preset does, counted in trained tensors, on four architectures that share nothing."""

from __future__ import annotations

from functools import cache

import pytest

from freezeplan import load_plan, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe
from freezeplan.model.description import Description
from freezeplan.plan.catalogue import shipped
from freezeplan.resolve.resolver import resolve

MODELS = ("vgg16", "resnet50", "vit_base_patch16_224", "efficientnet_b0")
ALL = [[32], [161], [152], [213]]
HEAD = [[2], [2], [2], [2]]
TRAINED = {
    "bitfit": [[17], [55], [76], [83]],
    "discriminative": ALL,
    "frozen_stages_1": [[28], [128], [136], [200]],
    "frozen_stages_2": [[24], [89], [124], [174]],
    "frozen_stages_3": [[18], [32], [112], [148]],
    "frozen_stages_4": [[12], [2], [100], [109]],
    "frozen_stem": [None, [158], [148], [210]],
    "full": ALL,
    "gradual_unfreeze": [
        [2, 12, 18, 24, 28, *[32] * 9],
        [2, 32, 89, 128, 158, *[161] * 9],
        [2, *range(16, 149, 12), 152],
        [2, 18, 70, 109, 148, 174, 200, 210, *[213] * 6],
    ],
    "head_then_all": [[2, 32], [2, 161], [2, 152], [2, 213]],
    "linear_probe": HEAD,
    "llrd": ALL,
    "llrd_65": ALL,
    "lp_ft": [[2, 32], [2, 161], [2, 152], [2, 213]],
    "norm_and_head": [[2], [108], [52], [100]],
    "norm_only": [None, [106], [50], [98]],
    "surgical_first": [[4], [33], [16], [13]],
    "surgical_last": [[12], [32], [16], [18]],
    "voc_vgg16/frozen_convs": [[6], *HEAD[1:]],
    "voc_vgg16/low_conv_lr": ALL,
    "voc_vgg16/same_lr": ALL,
    "voc_vgg16/scratch": ALL,
}
"""Trained tensors in each phase, for each of MODELS; None where the preset is refused."""


def test_every_preset_is_counted_here() -> None:
    """A new preset needs a line in the table above."""
    assert list(shipped()) == list(TRAINED)


@cache
def described(model: str) -> Description:
    """What is known of a model, asked once."""
    return describe(create_model(model, meta=True))


@pytest.mark.parametrize("name", TRAINED)
def test_a_preset_trains_what_it_says(name: str) -> None:
    """Trained tensors in each phase; no rule of a preset loses most of what it matches."""
    for model, expected in zip(MODELS, TRAINED[name], strict=True):
        if expected is None:
            with pytest.raises(PlanError, match=f"matches no parameter of {model}"):
                resolve(load_plan(name), described(model))
            continue
        resolution = resolve(load_plan(name), described(model))

        assert [len(part.trained) for part in resolution.parts] == expected, model
        assert not any(use.weak for part in resolution.parts for use in part.uses)


REFUSED = [
    pytest.param(
        "frozen_stem",
        "vgg16",
        "frozen_stem.yaml:7:12: rule 1 (role: stem) matches no parameter of vgg16\n"
        "  vgg16 has no stem and 5 stages\n"
        "  a rule that need not match on every model says optional: true",
        id="no-stem",
    ),
    pytest.param(
        "norm_only",
        "vgg16",
        "norm_only.yaml:8:12: rule 1 (role: norm) matches no parameter of vgg16\n"
        "  a rule that need not match on every model says optional: true",
        id="no-norms",
    ),
]


@pytest.mark.parametrize(("preset", "model", "message"), REFUSED)
def test_a_preset_is_refused_where_it_has_no_meaning(preset: str, model: str, message: str) -> None:
    """Too few stages, no stem, no normalisation layers: the error says which."""
    with pytest.raises(PlanError) as error:
        resolve_plan(preset, create_model(model, meta=True))

    assert str(error.value) == message


def test_discriminative_rates_fall_by_2_6_from_stage_to_stage() -> None:
    """ULMFiT's factor, from the top, within the rounding of the file."""
    rows = resolve_plan("discriminative", create_model("resnet50", meta=True)).rows
    rates = {row.name.split(".")[0]: row.lr_mult for row in rows}

    assert rates["fc"] == 1
    for stage, name in enumerate(["layer4", "layer3", "layer2", "layer1", "conv1"], start=1):
        assert rates[name] == pytest.approx(2.6**-stage, rel=2e-3)


def test_discriminative_rates_fall_through_twelve_stages() -> None:
    """On ViT-B each block has its own, on a ViT of 24 blocks the thirteen farthest from the top share the last."""
    base, large = (
        {row.name: row.lr_mult for row in resolve_plan("discriminative", create_model(name, meta=True)).rows}
        for name in ("vit_base_patch16_224", "vit_large_patch16_224")
    )

    for block in range(12):
        assert base[f"blocks.{block}.norm1.weight"] == pytest.approx(2.6 ** (block - 12), rel=5e-3)
    assert base["pos_embed"] == base["blocks.0.norm1.weight"]
    assert {large[f"blocks.{block}.norm1.weight"] for block in range(13)} == {large["pos_embed"]}
    assert large["pos_embed"] == pytest.approx(2.6**-12, rel=5e-3)
    assert large["blocks.13.norm1.weight"] > large["pos_embed"]


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("vgg16", ["head", "last stage", "last 2 stages", "last 3 stages", "last 4 stages", "all"]),
        ("vit_base_patch16_224", [phase.name for phase in load_plan("gradual_unfreeze").phases]),
    ],
)
def test_phases_that_change_nothing_are_not_shown(model: str, shown: list[str]) -> None:
    """A model with five stages is through after the sixth phase; the empty ones behind it change nothing."""
    resolution = resolve_plan("gradual_unfreeze", create_model(model, meta=True))

    assert [part.phase for part in resolution.distinct] == shown
    assert len(resolution.parts) == 14
    assert max(len(group.name) for group in resolution.groups) < 40


def test_surgical_last_trains_what_stands_behind_the_last_stage() -> None:
    """VGG's fully connected layers, and the convolution and norm that other heads hold."""
    trained = {
        model: {row.name for row in resolve_plan("surgical_last", create_model(model, meta=True)).trained}
        for model in ("vgg16", "hgnetv2_b0", "convnext_tiny")
    }

    assert {"features.24.weight", "pre_logits.fc1.weight", "head.fc.weight"} <= trained["vgg16"]
    assert {"head.last_conv.0.weight", "head.fc.weight"} <= trained["hgnetv2_b0"]
    assert {"head.norm.weight", "head.fc.weight"} <= trained["convnext_tiny"]


def test_layer_decay_of_vit_base() -> None:
    """llrd gives the last block 0.75, the patch embedding 0.75 to the 13th, the classifier 1."""
    rows = resolve_plan("llrd", create_model("vit_base_patch16_224", meta=True)).rows
    rates = {row.name: row.lr_mult for row in rows}

    assert (rates["head.weight"], rates["blocks.11.attn.qkv.weight"]) == (1, 0.75)
    assert rates["patch_embed.proj.weight"] == pytest.approx(0.75**13)


def test_every_preset_names_its_source_or_says_what_it_is_for() -> None:
    """A preset is documentation: a description, and for a published method where it is from."""
    described = {name: load_plan(name).description or "" for name in shipped()}
    own = {"full", "frozen_stem", *(f"frozen_stages_{n}" for n in range(1, 5))}

    assert all(described.values())
    assert [n for n, text in described.items() if "Source:" not in text and n not in own and "/" not in n] == []
