"""Models on the meta device: the names, shapes and flags of real ones, and nothing that is real goes unwritten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freezeplan.model import create_model
from freezeplan.model.meta import meta_device


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_a_model_without_values_is_otherwise_the_real_one(name: str) -> None:
    def facts(model: nn.Module) -> list[object]:
        named = (*model.named_parameters(), *model.named_buffers())
        return [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in named]

    meta = create_model(name, num_classes=3, meta=True)

    assert all(parameter.is_meta for parameter in meta.parameters())
    assert facts(meta) == facts(create_model(name, num_classes=3))


def test_tensors_with_values_are_written() -> None:
    """timm makes some on the CPU, such as the rates of drop-path."""
    with meta_device():
        real = torch.empty(3, device="cpu")
        nn.init.ones_(real)
        also = torch.zeros(2, device="cpu").fill_(5).add_(1)
        by_keyword = nn.init.constant_(tensor=torch.empty(2, device="cpu"), val=7.0)
        without = nn.init.normal_(tensor=torch.empty(2))

    assert real.tolist() == [1, 1, 1]
    assert also.tolist() == [6, 6]
    assert by_keyword.tolist() == [7, 7]
    assert without.is_meta
