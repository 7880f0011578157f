"""Write the pages of this folder that are computed: ``python docs/pages.py``.

``zoo.md`` says what is known of each architecture module of timm, ``presets.md`` what each preset does on four models.
Models are created on the meta device; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import timm

from freezeplan import load_plan, resolve_plan
from freezeplan.catalogue import shipped
from freezeplan.errors import PlanError
from freezeplan.resolution import Resolution
from freezeplan.zoo import create_model, describe

HERE = Path(__file__).parent
NOTE = "<!-- written by `python docs/pages.py`; a test compares -->\n"
FOUR = {
    "VGG16": "vgg16",
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_base_patch16_224",
    "EfficientNet-B0": "efficientnet_b0",
}
ROLES = ("head", "norm", "bias", "pos_embed", "no_weight_decay")


def zoo() -> str:
    """Return ``zoo.md``: one row for each architecture module."""
    models = json.loads((HERE.parent / "tests" / "zoo.json").read_text(encoding="utf-8"))
    names = Counter(timm.models._registry._model_to_module[name] for name in timm.list_models())
    columns = ("module", "models", "example", "stem", "stages", *ROLES, "left out by timm's matcher")
    lines = [
        "# What is known of timm's architectures\n",
        NOTE,
        f"One model of each of the {len(models)} architecture modules of timm {timm.__version__}, with ten classes. "
        "The columns of roles count tensors.\n",
        "*Left out* are tensors that timm's `group_matcher` does not match and puts into the last group, as if they "
        "were the classifier. In a plan they have the stage of the tensor ahead of them, `layer_decay` gives them "
        "timm's own rate, and every report of a plan that speaks of depth lists them. Where timm has no matcher, the "
        "stages are the layers.\n",
        "Every model of timm by name is held against five presets by `pytest -m zoo`.\n",
        row(columns),
        row("---" for _ in columns),
        *(row(_known(module, entry["model"], names[module])) for module, entry in sorted(models.items())),
    ]
    return "\n".join(lines) + "\n"


def _known(module: str, name: str, count: int) -> Iterator[str]:
    model = create_model(name, num_classes=10, meta=True)
    found = describe(model)
    yield from (module, str(count), f"`{name}`")
    yield "yes" if 0 in found.stages.values() else "none"
    yield str(found.last_stage)
    yield from (str(len(found.roles[role] & {t.name for t in found.tensors})) for role in ROLES)
    if not hasattr(model, "group_matcher"):
        yield "no matcher"
    elif found.unplaced:
        yield f"{len(found.unplaced)}: `{found.unplaced[0]}`" + (", ..." if found.unplaced[1:] else "")
    else:
        yield ""


def presets() -> str:
    """Return ``presets.md``: one section for each preset."""
    models = {title: create_model(name, meta=True) for title, name in FOUR.items()}
    lines = [
        "# The presets\n",
        NOTE,
        'A preset is a plan that ships with the package: `apply_plan(model, "linear_probe", lr=1e-3)`. '
        "The tables count what is trained, of all tensors and of all parameters; a preset with phases has a line for "
        "each. `freezeplan show PRESET MODEL` says it for any other model.\n",
        "The stages of VGG16 are its five blocks of convolutions, and it has no stem; those of ResNet-50 are `layer1` "
        "to `layer4`; those of ViT-B/16 its twelve blocks, the last one with the final norm; those of EfficientNet-B0 "
        "its seven `blocks`, the last one with `conv_head`. So `stage: ..3` is seven convolutions of VGG16, the stem "
        "and `layer1` to `layer3` of ResNet-50, and on ViT-B/16 the patch embedding, class token, position embedding "
        "and blocks 0 to 2.\n",
    ]
    for name in shipped():
        plan = load_plan(name)
        lines += [
            f"## {name}\n",
            f"{(plan.description or '').strip()}\n",
            row(("model", "phase", "trained")),
            row(["---"] * 3),
        ]
        for title, model in models.items():
            try:
                lines += _trained(title, resolve_plan(plan, model))
            except PlanError as error:
                lines.append(row((title, "", f"refused: {error.problems[0].message}")))
        lines.append("")
    return "\n".join(lines)


def _trained(title: str, resolution: Resolution) -> Iterator[str]:
    for part in resolution.parts:
        tensors, elements = len(part.trained), sum(row.elements for row in part.trained)
        total = sum(row.elements for row in part.rows)
        share = f"{tensors} of {len(part.rows)} tensors, {elements:,} of {total:,} parameters"
        yield row((title, part.phase, share))
        title = ""


def row(cells: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


PAGES = {"zoo.md": zoo, "presets.md": presets}
"""File in this folder -> what writes it."""


def main() -> None:
    """Write all pages, each under a temporary name first."""
    for name, page in PAGES.items():
        temporary = HERE / f".{name}"
        temporary.write_text(page(), encoding="utf-8")
        temporary.replace(HERE / name)


if __name__ == "__main__":
    main()
