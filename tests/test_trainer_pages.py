"""Every Python block of docs/trainers runs as it is written, on small models and images of noise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import freezeplan

torch.set_num_threads(1)
PAGES = sorted((Path(__file__).resolve().parents[1] / "docs" / "trainers").glob("*.md"))
SMALL = {
    '"resnet50", pretrained=True': '"test_resnet"',
    'TimmWrapperForImageClassification.from_pretrained("timm/resnet50.a1_in1k", num_labels=10)': (
        'TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=10))'
    ),
    "import TimmWrapperForImageClassification": "import TimmWrapperConfig, TimmWrapperForImageClassification",
    'resnet18(weights="DEFAULT")': "resnet18()",
    'fasterrcnn_resnet50_fpn(weights="DEFAULT", trainable_backbone_layers=5)': (
        "fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=2, min_size=64, max_size=64)"
    ),
}
"""What a page says -> what stands in for it, without a download."""


def test_every_page_is_here() -> None:
    """Six trainers, six pages, each with something to run; each stand-in is of use."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)

    assert [page.stem for page in PAGES] == ["accelerate", "huggingface", "lightning", "plain", "timm", "torchvision"]
    assert all("```python\n" in page.read_text(encoding="utf-8") for page in PAGES)
    assert [old for old in SMALL if old not in text] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("error::freezeplan.errors.FreezePlanWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.stem in ("plain", "timm") else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    for old, new in SMALL.items():
        code = code.replace(old, new)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    given = {"train_set": data, "val_set": data, "detection_loader": [([torch.rand(3, 64, 64)], [target])]}
    names: dict[str, Any] = {**given, "__name__": "page"}
    exec(compile(code, str(page), "exec"), names)

    applied = names.get("applied") or next(
        found for module in names["trainer"].model.modules() if (found := freezeplan.applied(module)) is not None
    )
    assert freezeplan.applied(applied.model) is applied
    assert applied.phase in ("", "all", "top", "head")
