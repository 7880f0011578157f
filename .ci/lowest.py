"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import tomllib
from pathlib import Path

TORCHVISION = {"2.6": "0.21.0"}  # of each torch, as its own release notes say; timm needs torchvision and names none

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for bound in (*project["dependencies"], *project["optional-dependencies"]["run"]):
    name, _, version = bound.partition(">=")
    print(f"{name}=={version}.*" if name == "torch" else f"{name}=={version}")
    if name == "torch":
        print(f"torchvision=={TORCHVISION[version]}")
