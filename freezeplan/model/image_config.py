"""What images a model expects: timm's configuration of it, or of the first timm model that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from freezeplan.errors import ModelError
from freezeplan.model import names
from freezeplan.model.timm_facts import config, find_parts, title


def image_config(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's ``pretrained_cfg`` of a model, or of the first timm model inside it: size, mean, deviation, crop.

    Raises:
        ModelError: If the model is not timm's and holds none.

    Examples:
        >>> from freezeplan.model import create_model
        >>> backbone = create_model("resnet18", meta=True)
        >>> image_config(nn.ModuleDict({"backbone": backbone, "head": nn.Linear(512, 2)}))["mean"]
        (0.485, 0.456, 0.406)
    """
    if own := config(model):
        return own
    found = next((known for part in find_parts(names.survey(model)) if (known := config(part.module))), None)
    if found is None:
        raise ModelError(
            f"{title(model)} is not a timm model and holds none, which the training needs",
            notes=["it takes the size of the images and their normalisation from timm's configuration"],
        )
    return found
