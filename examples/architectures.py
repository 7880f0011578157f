"""One plan on other architectures: what it freezes on each, without a download and without memory.

``python examples/architectures.py`` prints a line a model for a preset (``--plan``, also a file). Roles and stages are
what timm knows of a model, so the plan is the same; ``match`` would have to be written anew for each.
"""

from __future__ import annotations

import argparse

from freezeplan import resolve_plan
from freezeplan.model.describer import create_model

MODELS = ("vgg16", "resnet50", "vit_base_patch16_224", "convnext_tiny")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="frozen_stages_2")
    parser.add_argument("models", nargs="*", default=MODELS)
    given = parser.parse_args()
    print(f"{given.plan:24}{'frozen':>14}{'trained':>14}  frozen up to")
    for name in given.models:
        found = resolve_plan(given.plan, create_model(name, num_classes=20, meta=True))
        frozen, trained = (sum(row.elements for row in rows) for rows in (found.frozen, found.trained))
        print(f"{name:24}{frozen:>14,}{trained:>14,}  {found.frozen[-1].name if found.frozen else 'nothing'}")


if __name__ == "__main__":
    main()
