"""Print the lowest versions that pyproject.toml allows, as constraints for pip; torch excepted, which torchvision pins."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for bound in (*project["dependencies"], *project["optional-dependencies"]["run"]):
    if not bound.startswith("torch>="):
        print(bound.replace(">=", "=="))
