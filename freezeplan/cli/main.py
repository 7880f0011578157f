"""The commands. Results to stdout, problems to stderr; exit 0 done, 1 what was given has a problem, 2 wrong usage."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

import freezeplan
from freezeplan.cli import cache, compare, importing, plans, proof, run, suggest
from freezeplan.errors import FreezePlanError
from freezeplan.report import terminal

app = typer.Typer(
    help="Declarative layer freezing for timm: a plan says what is frozen and what learns how fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake is printed and never a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = terminal.print_warning
            app()
    except FreezePlanError as error:
        terminal.print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(freezeplan.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


# In the order of ``freezeplan --help``.
app.command()(plans.show)
app.command()(plans.check)
app.command()(plans.why)
app.command()(plans.diff)
app.command()(plans.schema)
app.command("import")(importing.import_)
app.command()(plans.forecast)
app.command()(plans.presets)
app.command()(proof.verify)
app.command()(suggest.suggest)
app.command()(compare.compare)
app.command()(run.run)
app.command()(run.report)
app.add_typer(cache.app, name="cache")
app.add_typer(proof.delta, name="delta")


if __name__ == "__main__":
    main()
