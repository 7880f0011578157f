"""What a shell may complete: names of presets, plan files, names of timm's models."""

from __future__ import annotations

from pathlib import Path

from freezeplan import catalogue

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def plans(incomplete: str) -> list[str]:
    """Return presets, plan files and folders that begin like this.

    Examples:
        >>> plans("voc_vgg16/f")
        ['voc_vgg16/frozen_convs']
    """
    above = Path(incomplete).parent if "/" in incomplete else Path()
    entries = above.iterdir() if above.is_dir() else ()
    files = (f"{entry}/" if entry.is_dir() else str(entry) for entry in entries)
    named = [name for name in files if name.endswith((*_SUFFIXES, "/")) and not name.startswith(".")]
    return [name for name in (*catalogue.shipped(), *catalogue.added(), *sorted(named)) if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Return timm's models whose names begin like this; the import of timm takes some seconds.

    Examples:
        >>> models("vgg16_b")
        ['vgg16_bn']
    """
    from freezeplan.zoo import model_names

    return [name for name in model_names() if name.startswith(incomplete)]
