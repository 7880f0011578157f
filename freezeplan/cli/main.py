"""The commands. Results to stdout, problems to stderr; exit 0 done, 1 what was given has a problem, 2 wrong usage."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Annotated, Any, TextIO

import typer

import freezeplan
from freezeplan.cli import cache, compare, importing, plans, proof, run, suggest
from freezeplan.errors import FreezePlanError, OutputError
from freezeplan.report import terminal

app = typer.Typer(
    help="Declarative layer freezing for timm: a plan says what is frozen and what learns how fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake is printed and never a traceback."""
    output = _Output(sys.stdout or io.StringIO())  # there is none if it was closed
    try:
        with redirect_stdout(output), warnings.catch_warnings():
            warnings.showwarning = terminal.print_warning
            try:
                app()
            finally:
                output.flush()
    except FreezePlanError as error:
        terminal.print_error(error)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != _INTERRUPTED:
            raise
        terminal.stderr().print(_stopped(sys.argv[1:]), soft_wrap=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error is not output.failure:
            raise
        output.discard()
        terminal.print_error(OutputError(f"the output cannot be written: {error.strerror or error}"))
        sys.exit(1)


_INTERRUPTED = 130
"""The exit code after Ctrl-C; typer, which sees it first inside a command, gives the same."""


class _Output:
    """Standard output, which remembers its own failure: a disk that is full is no mistake of a command."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._remembered():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._remembered():
            self._stream.flush()

    def discard(self) -> None:
        """Let what cannot be written go nowhere, or the interpreter tries it once more at its end."""
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stopped(words: Sequence[str]) -> str:
    """What is said after Ctrl-C: that it is stopped, and how it is gone on with.

    Args:
        words: What was typed behind ``freezeplan``.
    """
    command = getattr(typer.main.get_command(app), "commands", {}).get(words[0] if words else "")
    options = {option for parameter in getattr(command, "params", ()) for option in parameter.opts}
    if "--resume" not in options:
        return "stopped"
    given = {word.partition("=")[0] for word in words}
    more = " ".join(option for option in ("--resume", "--out DIR") if option.partition(" ")[0] not in given)
    return f"stopped; the same command{f' with {more}' if more else ''} goes on"


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
