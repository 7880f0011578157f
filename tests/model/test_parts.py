"""timm models inside other modules: each part has the classifier, stages, layers and lists of its architecture."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, ZOO
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from freezeplan import Plan, apply_plan, load_delta, load_plan, resolve_plan
from freezeplan.errors import ModelError, PlanError
from freezeplan.model import names
from freezeplan.model.describer import create_model, describe
from freezeplan.model.description import Description
from freezeplan.model.timm_facts import LivePart, find_parts
from freezeplan.plan import catalogue
from freezeplan.report.explain import explain
from freezeplan.resolve.resolver import resolve

LLRD = Plan(version=1, layer_decay=0.5, rules=[{"match": ".*", "lr_mult": 1}])
PRESETS = {name: load_plan(name) for name in catalogue.shipped()}
SHORT = [name for name, plan in PRESETS.items() if len(plan.phases) < 3]
"""``gradual_unfreeze`` has a phase for each stage of any model; all models are held against it under ``-m zoo``."""


class Net(nn.Module):
    """A model as users write them: a backbone, and one layer on it."""

    def __init__(self, backbone: nn.Module, features: int = 8):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(features, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(self.backbone(x))
        return found


def on_meta(build: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = build(*args, **kwargs)
    return model


def contained(name: str, **arguments: Any) -> nn.Module:
    return on_meta(lambda: Net(timm.create_model(name, **arguments)))


def frozen_by(model: nn.Module, *rules: dict[str, Any]) -> set[str]:
    plan = {"version": 1, "rules": [*rules, {"match": ".*", "lr_mult": 1}]}
    return {row.name for row in resolve_plan(plan, model).frozen}


def rates(model: nn.Module, plan: Any) -> dict[str, float | None]:
    return {row.name: row.lr_mult for row in resolve_plan(plan, model).rows}


def hints(model: nn.Module, plan: Any) -> tuple[str, ...]:
    return resolve_plan(plan, model).hints


class TestFaultsThatPassedWithoutAWord:
    """Each of these failed before parts were known."""

    def test_stages_of_features_only(self) -> None:
        """``frozen_stages_1`` freezes the stem and layer1 of a ResNet-50, 33 tensors, as on the whole model."""
        model = on_meta(timm.create_model, "resnet50", features_only=True)

        assert len(resolve_plan("frozen_stages_1", model).frozen) == 33

    def test_layer_decay_of_features_only(self) -> None:
        """Flattened names (``layers_0``) are read as the architecture has them (``layers.0``)."""
        model = on_meta(timm.create_model, "swin_tiny_patch4_window7_224", features_only=True)
        whole = rates(create_model("swin_tiny_patch4_window7_224", meta=True), "llrd")

        found = rates(model, "llrd")

        assert len(set(found.values())) > 10
        assert found == {name: whole[name.replace("layers_", "layers.")] for name in found}

    @pytest.mark.parametrize("plan", ["full", {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}])
    def test_a_contained_vit_keeps_its_list_of_what_does_not_decay(self, plan: Any) -> None:
        """``pos_embed`` and ``cls_token`` have more than one dimension; timm's own list exempts them."""
        rows = resolve_plan(plan, contained("test_vit", num_classes=0)).rows

        exempt = {row.name for row in rows if row.wd_mult == 0 and len(row.shape) > 1}
        assert exempt == {"backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"} & {r.name for r in rows}
        assert len(exempt) >= 2

    def test_a_head_of_ones_own_in_place_of_timms(self) -> None:
        """timm's ``get_classifier`` raises there; the module that stands in its place is the classifier."""
        model = create_model("test_convnext", num_classes=10, meta=True)
        model.head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))  # type: ignore[assignment]

        trained = {row.name for row in resolve_plan("linear_probe", model).trained}

        assert trained == {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}

    def test_no_head_in_place_of_timms(self) -> None:
        """An Identity has no parameters: the role is refused with the reason, and other plans apply."""
        model = create_model("test_convnext", num_classes=10, meta=True)
        model.head = nn.Identity()  # type: ignore[assignment]

        with pytest.raises(PlanError, match="the classifier of test_convnext has no parameters"):
            resolve_plan("linear_probe", model)
        assert len(resolve_plan("frozen_stages_1", model).frozen) > 0

    def test_a_wrapper_that_forwards_attributes(self) -> None:
        """PEFT forwards what it does not have to the model inside, under other names."""
        model = Peft(create_model("test_vit", num_classes=10, meta=True))
        whole = rates(create_model("test_vit", num_classes=10, meta=True), "llrd")

        assert model.pretrained_cfg is model.base_model.model.pretrained_cfg
        assert rates(model, "llrd") == {f"base_model.model.{name}": rate for name, rate in whole.items()}
        assert len(frozen_by(model, {"stage": "..2", "frozen": True})) > 10


class Forwarding(nn.Module):
    """A wrapper as PEFT and torch.compile have them: what it lacks is that of the model inside."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class Peft(Forwarding):
    """PEFT's names: ``base_model.model.blocks...``."""

    def __init__(self, model: nn.Module):
        nn.Module.__init__(self)
        self.base_model = Forwarding(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base_model"), name)


class ModulesToSave(nn.Module):
    """PEFT's wrapper of a module that is trained whole: the original, and the copy that is active."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})


EXCEPTIONS = {
    # VGG's arms of the experiment name pre_logits, which is backbone.pre_logits there
    "vgg": {"voc_vgg16/frozen_convs": 4, "voc_vgg16/low_conv_lr": 4},
}
"""Architecture module -> preset -> tensors that differ inside another module, with the reason."""


ENCODERS = (
    "deepseek_vit_412m_enc",
    "gemma4_vit_167m_enc",
    "gemma4_vit_570m_enc",
    "mobilenetv5_300m_enc",
    "qwen3_vit_88m_enc",
    "qwen3_vit_306m_enc",
    "qwen3_vit_416m_enc",
)
"""Models that have no classifier, so alone their last layer has the full rate."""


def differing(name: str, presets: list[str]) -> dict[str, int]:
    """The presets under which shared tensors of a contained backbone differ from the whole model's, and how many."""
    whole, net = describe(create_model(name, num_classes=10, meta=True)), describe(contained(name, num_classes=0))
    found: Counter[str] = Counter()
    for preset in presets:
        try:
            expected = resolve(PRESETS[preset], whole)
        except PlanError:
            continue
        for here, there in zip(expected.parts, resolve(PRESETS[preset], net).parts, strict=True):
            rows = {f"backbone.{row.name}": (row.frozen, row.lr_mult, row.wd_mult) for row in here.rows}
            shared = [row for row in there.rows if row.name in rows]
            assert len(shared) == len(net.tensors) - 2
            found[preset] += sum(rows[row.name] != (row.frozen, row.lr_mult, row.wd_mult) for row in shared)
    assert len(found) > 1
    return {preset: count for preset, count in found.items() if count}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_contained_backbone_has_the_rates_of_the_whole_model(family: str) -> None:
    """Every preset that fits the whole model gives each shared tensor the same flag, rate and decay."""
    assert differing(ZOO[family]["model"], SHORT) == EXCEPTIONS.get(family, {})


EVERY = timm.list_models()


@pytest.mark.contained
@pytest.mark.parametrize("name", EVERY)
def test_every_contained_backbone_has_the_rates_of_the_whole_model(name: str) -> None:
    """The same for every model of timm by name, under every preset."""
    family = timm.models._registry._model_to_module[name]

    found = differing(name, list(PRESETS))

    allowed = EXCEPTIONS.get(family, {})
    if name in ENCODERS:
        allowed = dict.fromkeys(("llrd", "llrd_65"), len(describe(create_model(name, meta=True)).tensors))
    assert {preset: count for preset, count in found.items() if count != allowed.get(preset)} == {}


@pytest.mark.parametrize(
    "name", [ENCODERS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS if name != ENCODERS[1])]
)
def test_an_encoder_without_a_classifier_stands_one_layer_ahead_of_what_is_outside(name: str) -> None:
    """Alone its last layer is the model's last; inside of another model the head outside stands behind it."""
    plan = {"version": 1, "layer_decay": 0.5, "rules": [{"match": ".*", "lr_mult": 1}]}
    whole, net = (resolve_plan(plan, model) for model in (create_model(name, meta=True), contained(name)))
    alone = {f"backbone.{row.name}": row.lr_mult for row in whole.rows}

    found = {row.name: row.lr_mult for row in net.rows}

    assert [found.pop(f"fc.{kind}") for kind in ("weight", "bias")] == [1, 1]
    assert found == {row: rate / 2 for row, rate in alone.items()}


def facts(model: Description, name: str) -> tuple[Any, ...]:
    return model.stages.get(name), model.exponents[name], name in model.no_decay


@pytest.mark.parametrize("family", FAMILIES)
def test_features_only_is_read_as_its_architecture(family: str) -> None:
    """Stages, layers and what does not decay are those of the whole model, tensor by tensor."""
    name = ZOO[family]["model"]
    try:
        cut = on_meta(timm.create_model, name, features_only=True)
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError, IndexError) as error:
        pytest.skip(f"timm cuts no features from it: {error}")
    found, whole = describe(cut), describe(create_model(name, meta=True))
    part = LivePart("", cut)
    known = {name: tensor.name for tensor in whole.tensors for name in tensor.names}
    there = {tensor.name: part.in_source(tensor.name, known) for tensor in found.tensors}

    assert part.is_cut
    assert None not in there.values()
    assert {here: facts(found, here) for here in there} == {
        here: facts(whole, known[name]) for here, name in there.items() if name is not None
    }
    assert {there[name] for name in found.roles["no_weight_decay"]} <= whole.roles["no_weight_decay"]


class MAE(VisionTransformer):
    """A subclass of a timm model, made by hand: it has no settings of timm's."""

    def __init__(self) -> None:
        super().__init__(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=0)
        self.decoder = nn.Linear(16, 192)


class OwnMatcher(nn.Module):
    """A user's own backbone with a matcher, as timm's have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": "^stem", "blocks": [("^first", (0,)), ("^second", (1,))]}


class Raises(OwnMatcher):
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        raise KeyError("stem")


class NoCoarse(OwnMatcher):
    def group_matcher(self) -> dict[str, Any]:  # type: ignore[override]
        return {}


class Head(nn.Module):
    """A root with a ``get_classifier`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.neck, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def get_classifier(self) -> nn.Module:
        return self.out


class NoHead(Head):
    def get_classifier(self) -> nn.Module:
        raise RuntimeError("not yet")


class TestWhatIsAPart:
    @staticmethod
    def parts(model: nn.Module) -> dict[str, str]:
        return {part.name: part.architecture for part in describe(model).parts}

    def test_a_whole_model(self) -> None:
        assert self.parts(create_model("test_resnet", meta=True)) == {"": "test_resnet"}

    def test_the_outermost_wins(self) -> None:
        """A hybrid ViT holds a ResNetV2, which is a part of it and none of its own."""
        assert self.parts(contained("vit_tiny_r_s16_p8_224")) == {"backbone": "vit_tiny_r_s16_p8_224"}

    def test_nested_in_modules_and_wrappers(self) -> None:
        model = nn.DataParallel(Net(nn.Sequential(Net(create_model("test_vit", meta=True)))))

        assert self.parts(model) == {"backbone.0.backbone": "test_vit"}

    def test_two_towers_and_an_average(self) -> None:
        """A copy for an average of weights is a part of its own."""
        vit = timm.create_model("test_vit", num_classes=0)
        model = nn.ModuleDict({"a": vit, "b": timm.create_model("test_resnet"), "ema": copy.deepcopy(vit)})

        assert self.parts(model) == {"a": "test_vit", "b": "test_resnet", "ema": "test_vit"}

    def test_a_tower_used_twice_is_one_part(self) -> None:
        vit = create_model("test_vit", meta=True)

        assert self.parts(nn.ModuleDict({"left": vit, "right": vit})) == {"left": "test_vit"}

    def test_one_that_copies_the_settings_gives_way(self) -> None:
        """Frameworks put the backbone's ``pretrained_cfg`` on their own module."""
        model = Net(create_model("test_vit", meta=True))
        model.pretrained_cfg = model.backbone.pretrained_cfg  # type: ignore[assignment]

        assert self.parts(model) == {"backbone": "test_vit"}

    def test_a_subclass_and_a_matcher_of_ones_own(self) -> None:
        model = nn.ModuleDict({"mae": MAE(), "own": OwnMatcher()})

        assert self.parts(model) == {"mae": "MAE", "own": "OwnMatcher"}

    @pytest.mark.parametrize("name", ["test_vit", "legacy_xception"])
    def test_features_by_hooks_or_by_a_getter(self, name: str) -> None:
        """FeatureGetterNet and FeatureHookNet are read through the architecture, whose last norm they may lack."""
        assert self.parts(on_meta(timm.create_model, name, features_only=True)) == {"": name}

    def test_none(self) -> None:
        assert self.parts(nn.Linear(2, 2)) == {}
        assert find_parts(names.survey(nn.Linear(2, 2))) == ()


class TestTwoTowers:
    @pytest.fixture
    def towers(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "photo": create_model("test_vit", num_classes=0, meta=True),
                "sketch": create_model("test_resnet", num_classes=0, meta=True),
                "join": on_meta(nn.Linear, 4, 4),
            }
        )

    def test_stages_count_in_each_part(self, towers: nn.Module) -> None:
        """The last stage is that of each; together they freeze what two plans on two models would."""
        found = frozen_by(towers, {"stage": "..-2", "frozen": True})

        for name, model in (("photo", "test_vit"), ("sketch", "test_resnet")):
            alone = frozen_by(create_model(model, num_classes=0, meta=True), {"stage": "..-2", "frozen": True})
            assert {tensor for tensor in found if tensor.startswith(name)} == {f"{name}.{tensor}" for tensor in alone}

    def test_a_rule_has_a_layer_decay_of_its_own(self, towers: nn.Module) -> None:
        """For towers that need different ones; the plan's is that of the rest, and outside the exponent is 0."""
        rules = [{"match": "photo", "layer_decay": 0.9}, {"match": ".*", "lr_mult": 1}]
        found = rates(towers, {"version": 1, "layer_decay": 0.5, "rules": rules})
        exponents = describe(towers).exponents

        expected = {name: (0.9 if name.startswith("photo") else 0.5) ** exponents[name] for name in found}
        assert found == pytest.approx(expected, rel=1e-12)
        assert found["join.weight"] == 1
        assert len(set(found.values())) > 6

    def test_why_says_which_factor_it_was(self, towers: nn.Module) -> None:
        """A floor may stand in the plan where rules alone have a factor."""
        rules = [{"match": "photo", "layer_decay": 0.1}, {"match": ".*", "lr_mult": 1}]
        found = resolve_plan({"version": 1, "layer_decay_min_scale": 0.05, "rules": rules}, towers)

        (photo,), (join,) = (explain(found, name)["phases"] for name in ("photo.cls_token", "join.weight"))
        assert photo["lr_mult"] == 0.05
        assert (photo["decay"]["layer_decay"], photo["decay"]["min_scale"]) == (0.1, 0.05)
        assert "decay" not in join

    def test_a_rule_asks_for_what_is_known(self, tmp_path: Path) -> None:
        file = tmp_path / "decay.yaml"
        file.write_text("version: 1\nrules:\n  - {match: .*, lr_mult: 1, layer_decay: 0.5}\n")
        with pytest.raises(PlanError) as error:
            resolve_plan(file, nn.Linear(2, 2))

        place, _, reason = str(error.value).partition(": ")
        assert place.endswith("decay.yaml:3:42")
        assert reason == "Linear is no timm model and holds none, so its layers have no known order"

    def test_tied_across_towers_is_the_first_names(self) -> None:
        towers = nn.ModuleDict(
            {name: create_model("test_vit", num_classes=0, meta=True) for name in ("first", "second")}
        )
        towers.second.cls_token = towers.first.cls_token  # type: ignore[union-attr, assignment]
        described = describe(towers)

        assert "first.cls_token" in described.parts[0].tensors
        assert not any(name.endswith("cls_token") for name in described.parts[1].tensors)
        assert frozen_by(towers, {"match": "second", "stage": "0", "frozen": True}) >= {"first.cls_token"}


class TestOutside:
    def test_the_head_is_what_no_part_holds(self) -> None:
        model = contained("test_resnet", num_classes=0)

        assert {row.name for row in resolve_plan("linear_probe", model).trained} == {"fc.weight", "fc.bias"}

    def test_the_head_that_the_root_names(self) -> None:
        trained = {row.name for row in resolve_plan("linear_probe", Head()).trained}

        assert trained == {"out.weight", "out.bias"}

    def test_a_root_that_cannot_say_its_head(self) -> None:
        with pytest.raises(ModelError) as error:
            describe(NoHead())

        assert str(error.value) == "NoHead.get_classifier() raised RuntimeError('not yet')"

    def test_modules_outside_list_what_does_not_decay(self) -> None:
        class Text(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Parameter(torch.zeros(3, 4))
                self.other = nn.Parameter(torch.zeros(3, 4))

            def no_weight_decay(self) -> set[str]:
                return {"table"}

        model = nn.ModuleDict({"photo": create_model("test_resnet", meta=True), "text": Text()})

        assert describe(model).roles["no_weight_decay"] == {"text.table"}

    def test_a_classifier_of_its_own_stands_one_layer_ahead_of_outside(self) -> None:
        model = contained("test_vit", num_classes=10)
        whole = create_model("test_vit", num_classes=10, meta=True)

        expected = {f"backbone.{name}": 0.5 * (rate or 0) for name, rate in rates(whole, LLRD).items()}
        assert rates(model, LLRD) == expected | {"fc.weight": 1.0, "fc.bias": 1.0}


class TestMatchersOfOnesOwn:
    def test_it_decides_stages_and_layers(self) -> None:
        model = Net(OwnMatcher())

        assert rates(model, LLRD)["backbone.first.weight"] == 0.25
        assert frozen_by(model, {"stage": "1", "frozen": True}) == {"backbone.first.weight", "backbone.first.bias"}

    @pytest.mark.parametrize(
        ("cls", "reason"),
        [
            (Raises, "raised KeyError('stem')"),
            (NoCoarse, "raised TypeError(\"NoCoarse.group_matcher() got an unexpected keyword argument 'coarse'\")"),
        ],
    )
    def test_one_that_raises_is_named(self, cls: type[nn.Module], reason: str) -> None:
        with pytest.raises(ModelError) as error:
            resolve_plan(LLRD, Net(cls()))

        assert str(error.value) == (
            f"{cls.__name__}.group_matcher(coarse=True) {reason}\n"
            "  as in timm, it takes coarse=True or False and returns patterns, such as {'stem': '^stem', ...}"
        )

    def test_it_is_not_asked_where_nothing_is_asked_of_depth(self) -> None:
        assert len(resolve_plan("linear_probe", Net(Raises())).trained) == 2


def test_features_cut_from_what_timm_does_not_have_are_not_known() -> None:
    model = on_meta(timm.create_model, "test_resnet", features_only=True)
    model.pretrained_cfg["architecture"] = "our_resnet"  # type: ignore[index, operator]

    with pytest.raises(PlanError) as error:
        resolve_plan("llrd", nn.ModuleDict({"body": model}))

    assert str(error.value).endswith(
        "ModuleDict holds body cut from our_resnet, which timm does not have, so its layers have no known order"
    )


class TestPeft:
    @pytest.fixture
    def wrapped(self) -> nn.Module:
        vit = create_model("test_vit", num_classes=10)
        vit.head = ModulesToSave(vit.head)  # type: ignore[arg-type, assignment]
        return Peft(vit)

    def test_the_active_copy_alone_is_the_head(self, wrapped: nn.Module) -> None:
        trained = {row.name for row in resolve_plan("linear_probe", wrapped).trained}

        head = "base_model.model.head.modules_to_save.default"
        assert trained == {f"{head}.weight", f"{head}.bias"}

    def test_a_plan_that_trains_the_original_is_told(self, wrapped: nn.Module) -> None:
        assert hints(wrapped, "full")[-1] == (
            "2 tensors such as 'base_model.model.head.original_module.bias' are trained, and nothing reads them: PEFT "
            "trains the copy in modules_to_save; put {match: '.*original_module', frozen: true} above"
        )
        rules = [{"match": ".*original_module", "frozen": True}, {"match": ".*", "lr_mult": 1}]
        assert hints(wrapped, {"version": 1, "rules": rules}) == ()


class TestHints:
    def test_a_text_tower_is_outside(self) -> None:
        """``linear_probe`` on a model like CLIP trains all of it; the sizes say so."""
        text = on_meta(lambda: nn.Sequential(nn.Embedding(9000, 64), nn.Linear(64, 64)))
        model = nn.ModuleDict({"visual": create_model("test_vit", num_classes=0, meta=True), "text": text})

        assert hints(model, "linear_probe")[-1] == (
            "role: head is all that is in no timm model, 3 tensors, and is trained: text (580,160); to freeze some of "
            "it, put {match: text, frozen: true} above"
        )

    def test_an_ordinary_head_is_no_surprise(self) -> None:
        assert hints(contained("test_vit", num_classes=0), "linear_probe") == ()

    def test_a_classifier_that_came_along(self) -> None:
        assert hints(contained("test_resnet", num_classes=10), "linear_probe") == (
            "'backbone.fc.bias' belongs to backbone's own classifier (test_resnet) and is trained; if nothing reads "
            "it, it gets no gradient: create that model with num_classes=0",
        )

    def test_a_stage_without_the_stem_ahead_of_it(self) -> None:
        plan = {"version": 1, "rules": [{"stage": "1..2", "frozen": True}, {"match": ".*", "lr_mult": 1}]}

        assert hints(contained("test_resnet", num_classes=0), plan) == (
            "stage 1 of backbone is frozen and the stem ahead of it is trained, such as 'backbone.conv1.0.weight': to "
            "freeze both, write the stages as ..1 and not as 1",
        )
        plan["rules"][0]["stage"] = "..2"
        assert hints(contained("test_resnet", num_classes=0), plan) == ()


def test_errors_and_reports_name_the_parts() -> None:
    model = contained("test_resnet", num_classes=0)
    found = resolve_plan("frozen_stages_1", model)

    assert found.subject == "Net (backbone: test_resnet)"
    assert explain(found, "backbone.conv1.0.weight")["part"] == "backbone: test_resnet"
    assert explain(found, "fc.weight")["part"] == ""
    with pytest.raises(PlanError, match=r"backbone \(test_resnet\) has a stem \(stage 0\) and 4 stages"):
        resolve_plan({"version": 1, "rules": [{"stage": "7", "frozen": True}]}, model)


class TestReinit:
    def test_inside_a_part_by_its_architecture_outside_by_reset_parameters(self) -> None:
        """The stem of a features_only model too, under the architecture's names."""
        cut = timm.create_model("test_resnet", features_only=True)
        model = Net(cut)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(3)
        torch.manual_seed(5)
        apply_plan(model, {"version": 1, "rules": [{"match": ".*", "lr_mult": 1, "reinit": True}]})
        torch.manual_seed(5)
        fresh = timm.create_model("test_resnet").state_dict()
        part = LivePart("", cut)

        for name, value in cut.state_dict().items():
            there = part.in_source(name, fresh)
            assert there is not None
            assert torch.equal(value, fresh[there])
        torch.manual_seed(5)
        assert torch.equal(model.fc.weight, nn.Linear(8, 10).weight)
        assert before.keys() == model.state_dict().keys()

    def test_two_towers_start_with_other_values(self) -> None:
        model = nn.ModuleDict({name: create_model("test_vit", num_classes=0) for name in ("a", "b")})
        apply_plan(model, {"version": 1, "rules": [{"match": ".*", "lr_mult": 1, "reinit": True}]})

        assert not torch.equal(model.a.cls_token, model.b.cls_token)  # type: ignore[union-attr, arg-type]


def test_a_contained_model_trains_and_is_proved(tmp_path: Path) -> None:
    """Two steps under a plan, verified, saved as a delta and put into the base again, and undone."""
    torch.manual_seed(0)
    model = Net(timm.create_model("test_resnet", num_classes=0), 96)
    base = copy.deepcopy(model)
    applied = apply_plan(model, "frozen_stages_2", lr=0.1)
    applied.seal()
    optimizer = torch.optim.SGD(applied, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
        optimizer.step()
    found = applied.verify()
    applied.save_delta(tmp_path / "net.safetensors")
    held = load_delta(base, tmp_path / "net.safetensors")
    applied.undo()

    assert found
    assert found.checked > 20
    assert held.model == "Net (backbone: test_resnet)"
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
