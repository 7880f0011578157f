"""The command ``cache``: features that are on disk, and their removal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from freezeplan.cache import store
from freezeplan.cli import completion
from freezeplan.cli.options import AsJson, print_json
from freezeplan.report import terminal

app = typer.Typer(help="List and remove the features of frozen layers on disk.", no_args_is_help=True)
CacheDirectory = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="Where they are.", show_default="the user's cache folder")
]


@app.command("ls")
def list_(directory: CacheDirectory = None, as_json: AsJson = False) -> None:
    """List the features that are kept: of which model and plan, how much, last used when."""
    found = store.entries(directory or store.default_directory())
    if as_json:
        print_json([asdict(entry) for entry in found])
    else:
        terminal.print_entries(directory or store.default_directory(), found)


@app.command("rm")
def remove(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys of entries, or how they begin.", autocompletion=completion.keys),
    ] = None,
    directory: CacheDirectory = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
) -> None:
    """Remove features that are kept; they are computed again when they are needed."""
    if bool(keys) == everything:
        raise typer.BadParameter("keys, or --all", param_hint="KEY")
    where = directory or store.default_directory()
    wanted = [entry.key for entry in store.entries(where)] if everything else keys or []
    freed = store.remove(where, wanted)
    count = "1 entry" if len(set(wanted)) == 1 else f"{len(set(wanted))} entries"
    terminal.stdout().print(f"{where}: removed {count}, {freed:,} bytes", soft_wrap=True)
