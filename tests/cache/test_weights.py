"""Features belong to the frozen values, and to the autocast, that they were computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import AppliedPlan, apply_plan
from freezeplan.cache import weights
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model


@pytest.fixture
def live() -> AppliedPlan:
    torch.manual_seed(0)
    return apply_plan(create_model("test_resnet", num_classes=3), "linear_probe", lr=0.1)


def data(count: int = 6) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(count))


def load(model: nn.Module) -> None:
    other = create_model("test_resnet", num_classes=3)
    model.load_state_dict(other.state_dict())


def load_a_part(model: nn.Module) -> None:
    model.layer1.load_state_dict(create_model("test_resnet", num_classes=3).layer1.state_dict())


def move_statistics(model: nn.Module) -> None:
    model.layer1[0].bn1.running_mean.add_(1)


@pytest.mark.parametrize("change", [load, load_a_part, move_statistics])
def test_features_of_other_values_are_refused(
    live: AppliedPlan, tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    """As in a resume that loads the checkpoint too late; with the values back, or cached again, they are taken."""
    features, rest = live.cached(data(), tmp_path)
    before, given = copy.deepcopy(live.model.state_dict()), features.batch(range(6))
    rest.eval()
    expected = rest(given)
    live.model.load_state_dict(before)  # the same values

    assert torch.equal(rest(given), expected)
    with torch.no_grad():
        change(live.model)
    for _ in range(2):
        with pytest.raises(ApplyError) as error:
            rest(given)
        assert str(error.value) == (
            "what is frozen has other values than when these features were computed\n"
            "  load weights first, then: features, rest = applied.cached(...)"
        )
    again, rest = live.cached(data(), tmp_path)
    torch.testing.assert_close(rest.eval()(again.batch(range(6))), live.model(data().tensors[0]))
    live.model.load_state_dict(before)
    first, rest = live.cached(data(), tmp_path)
    assert torch.equal(first.batch(range(6)), given)
    assert torch.equal(rest.eval()(given), expected)


def test_to_use_features_reads_no_frozen_value(
    live: AppliedPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What caching itself wrote (convolutions lie channels-last for a while) does not count."""
    features, rest = live.cached(data(), tmp_path)
    monkeypatch.setattr(weights, "digest_of", lambda *_: pytest.fail("the frozen values were read"))

    rest(features.batch(range(6)))


def test_copies_watch_their_own_values(live: AppliedPlan, tmp_path: Path) -> None:
    features, rest = live.cached(data(), tmp_path)
    other, given = copy.deepcopy(rest).eval(), features.batch(range(6))
    load(live.model)

    other(given)
    with pytest.raises(ApplyError, match="other values"):
        rest(given)


def test_features_of_autocast_are_used_under_autocast(live: AppliedPlan, tmp_path: Path) -> None:
    """Their type is autocast's, which no layer takes outside of it; features made outside are good for both."""
    with torch.autocast("cpu", torch.bfloat16):
        features, rest = live.cached(data(), tmp_path)
        assert rest(features.batch([0, 1])).dtype is torch.bfloat16
    with pytest.raises(ApplyError) as error:
        rest(features.batch([0, 1]))

    assert str(error.value) == (
        "these features were computed under autocast, in torch.bfloat16, and are used outside of it\n"
        "  with torch.autocast(...): outputs = rest(features)"
    )
    features, rest = live.cached(data(), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert rest(features.batch([0, 1])).dtype is torch.bfloat16


class Normed(nn.Module):
    """A norm without parameters ahead of the classifier, as MAE's linear probe has, and a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_model("test_resnet", num_classes=0)
        self.norm = nn.BatchNorm1d(self.backbone.num_features, affine=False)
        self.fc = nn.Linear(self.backbone.num_features, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
        answer: Tensor = self.fc(self.norm(self.backbone(images)))
        return answer


def test_buffers_that_move_are_in_the_state_of_the_rest(tmp_path: Path) -> None:
    """So a checkpoint of the rest is one of all that has changed, and an average of it averages them."""
    torch.manual_seed(0)
    base = Normed()
    model = copy.deepcopy(base)
    features, rest = apply_plan(model, "linear_probe", lr=0.1).cached(data(), tmp_path)
    for _ in range(3):
        rest.train()(features.batch(range(6))).sum().backward()
    state = rest.state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}

    assert moved == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "steps"}
    assert moved <= state.keys() <= model.state_dict().keys()
    assert not any(name.startswith("backbone") for name in state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("indices", [[0, -1], [6], [-7]])
def test_rows_that_a_loader_asks_for(tmp_path: Path, live: AppliedPlan, indices: list[int]) -> None:
    """Numbers count from the end as those of one item do; with views no number reaches another image's."""
    features, _ = live.cached(data(), tmp_path, views=2)
    if indices == [0, -1]:
        assert [int(label) for _, label in features.__getitems__(indices)] == [0, 5]
    else:
        with pytest.raises(IndexError, match=f"image {indices[0]} of 6"):
            features.__getitems__(indices)


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_what_a_collate_function_writes_is_not_kept(
    tmp_path: Path, live: AppliedPlan, keep: Literal["host", "disk"]
) -> None:
    """A loader gets copies, as of one item."""
    features, _ = live.cached(data(), tmp_path, keep=keep)
    before = features.batch(range(6)).clone()

    def zeroed(items: list[tuple[Tensor, int]]) -> Tensor:
        return torch.stack([one.zero_() for one, _ in items])

    assert not any(batch.any() for batch in DataLoader(features, batch_size=4, collate_fn=zeroed))
    assert torch.equal(features.batch(range(6)), before)
