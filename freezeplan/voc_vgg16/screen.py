"""A run on the terminal: the table of arms and the bar while it lasts on stderr, settings and figures on stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from freezeplan.training.settings import Settings
from freezeplan.training.train import Epoch, Run
from freezeplan.voc_vgg16.arms import PUBLISHED, SOURCE
from freezeplan.voc_vgg16.statistics import rates_too_high, saving

NOT_LEARNED = "did not learn"
QUIET = 30.0
"""Seconds between two lines about progress, where there is no terminal."""
LABELS = {"largest": "largest box", "first": "first object"}


@dataclass(frozen=True)
class Line:
    """What the live table shows of one arm and seed."""

    arm: str
    seed: int
    epochs: tuple[Epoch, ...] = ()
    run: Run | None = None


@dataclass
class Screen:
    """Watch a run: a live table of arms with a bar below on a terminal; where there is none a line an arm.

    Without a terminal there is also a line where one is due: how far reading, features or an arm's epochs are, the
    last line being ``QUIET`` seconds ago.

    Use it as a context manager; at the end the terminal is as it was before. It is an ``arms.Watch``.
    """

    console: Console
    epochs: int
    lines: list[Line] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[loss]}", markup=False),
            _Speed(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self._live = Live(get_renderable=self._view, console=self.console, transient=True, redirect_stdout=False)
        self._task = self._bar.add_task("reading weights", total=None, loss="")
        self._asked = 0.0
        self._said = self.clock()

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._live.stop()

    def decoded(self, done: int, images: int) -> None:
        """Say how many images are decoded."""
        self._bar.update(self._task, description="reading images", completed=done, total=images)
        self._say(f"reading images {done:,}/{images:,}")

    def started(self, arm: str, seed: int, images: int) -> None:
        """Add a line to the table and start a new bar."""
        self.lines.append(Line(arm, seed))
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = self._bar.add_task(f"{arm}, seed {seed}", total=images, loss="")

    def batch(self, images: int, loss: Tensor) -> None:
        """Move the bar on; the loss is read twice a second, since reading it waits for the device."""
        self._bar.advance(self._task, images)
        self._bar.update(self._task, description=f"{self.lines[-1].arm}, seed {self.lines[-1].seed}")
        if self.clock() - self._asked > 0.5 and self.console.is_terminal:
            self._asked = self.clock()
            self._bar.update(self._task, loss=f"loss {float(loss):.3f}")

    def kept(self, done: int, images: int) -> None:
        """Say how many images have features."""
        text = f"{self.lines[-1].arm}: features {done:,}/{images:,}"
        self._bar.update(self._task, description=text)
        self._say(text)

    def epoch(self, epoch: Epoch) -> None:
        """Show the epoch's figures in the table."""
        line = self.lines[-1] = replace(self.lines[-1], epochs=(*self.lines[-1].epochs, epoch))
        self._say(
            f"{line.arm}, seed {line.seed}: epoch {epoch.epoch} of {self.epochs}, training loss "
            f"{epoch.train_loss:.3f}, validation top-1 error {percent(epoch.val_top1_error)} %"
        )

    def finished(self, arm: str, run: Run) -> None:
        """Show the arm's figures in the table, or print them where there is no terminal."""
        self.lines[-1] = replace(self.lines[-1], run=run)
        if not self.console.is_terminal:
            mark = "" if run.learned else f" ({NOT_LEARNED})"
            self.console.print(
                f"{arm}, seed {run.seed}: validation top-1 error {percent(run.val.top1_error)} %, "
                f"training error {percent(run.train_error)} %{mark}, {run.seconds:.0f} s",
                soft_wrap=True,
            )

    def _say(self, text: str) -> None:
        if not self.console.is_terminal and self.clock() - self._said >= QUIET:
            self._said = self.clock()
            self.console.print(text, soft_wrap=True)

    def _view(self) -> Group:
        if not self.lines:
            return Group(self._bar)
        table = _table("arm", "seed", "epoch", "train loss", "val top-1 %")
        for line in self.lines:
            last = line.epochs[-1] if line.epochs else None
            table.add_row(
                Text(line.arm, style="bold" if line.run is None else ""),
                str(line.seed),
                f"{len(line.epochs)}/{self.epochs}",
                f"{last.train_loss:.3f}" if last else "",
                percent(last.val_top1_error) if last else "",
            )
        return Group(table, self._bar)


@contextmanager
def download_bar(console: Console, name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a download: a bar with bytes, speed and time left on a terminal, one line where there is none.

    Args:
        console: Where to.
        name: The file.
        size: Its bytes.

    Yields:
        What is to be told the number of bytes that are there.
    """
    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
    text = TextColumn("{task.description}", markup=False)
    told = False
    with Progress(text, *columns, console=console, expand=True, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=size)

        def progress(done: int) -> None:
            nonlocal told
            if not told and not console.is_terminal:
                console.print(f"downloading {name}, {size:,} bytes ...", soft_wrap=True)
            told = True
            bar.update(task, completed=done)

        yield progress


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return images per second, or nothing before the first ones are done."""
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


def print_settings(
    console: Console,
    facts: Mapping[str, str],
    settings: Settings,
    fixed: Mapping[str, str],
    given: frozenset[str],
    *,
    sample: bool,
) -> None:
    """Print what a run is going to do, and which of its settings are defaults; the sample gets a banner first.

    Args:
        console: Where to.
        facts: What is not in the settings: data, model, arms.
        settings: All settings.
        fixed: Choices that no setting makes, in words.
        given: Names of those that were asked for; the others are marked as defaults.
        sample: Whether the data are the embedded sample.
    """
    if sample:
        banner = "EMBEDDED SAMPLE, NOT VOC: drawn shapes; its figures say nothing about VOC."
        console.print(Text(banner, "bold yellow"))
        console.print(Text("For the experiment itself give --data a VOCdevkit folder or the archive of VOC 2012."))
        console.print()
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    for name, value in asdict(settings).items():
        shown = "off" if value is None or value is False else "on" if value is True else str(value)
        table.add_row(name.replace("_", "-"), Text.assemble(shown, ("" if name in given else "  (default)", "dim")))
    for name, value in fixed.items():
        table.add_row(name, Text.assemble(value, ("  (fixed)", "dim")))
    console.print(table)
    console.print()


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """Print errors in per cent, one row an arm, beside the published ones; means where there are several seeds.

    Args:
        console: Where to.
        results: What ``results.summarise`` returned.
    """
    other = "first" if results["label"] == "largest" else "largest"
    table = _table("arm", "top-1", "top-5", f"by\n{other}", "any", "training", "published\ntop-1", "published\ntop-5")
    for column in table.columns[-2:]:
        column.style = "cyan"
    for arm, found in results["arms"].items():
        published = PUBLISHED.get(arm)
        seen = [found[key] for key in ("top5_error", f"{other}_error", "any_error", "train_error")]
        theirs = [published.top1_error, published.top5_error] if published else [None, None]
        mark = Text() if found["learned"] else Text(f"\n{NOT_LEARNED}", "yellow")
        table.add_row(Text(arm) + mark, _top1(found["runs"]), *map(percent, seen + theirs))
    seeds = len(next(iter(results["arms"].values()))["runs"])
    kind = "the embedded sample" if results["data"]["sample"] else results["data"]["name"]
    mean = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    console.print(Text(f"Error in % of {results['model']} on {kind}{mean}", "bold"))
    console.print(table)
    for line in (
        f"top-1, top-5: validation images, against the class of the {LABELS[results['label']]}",
        f"by {other}: top-1 of the same model against the class of the {LABELS[other]}",
        "any: right if the class is on the image at all",
        "training: top-1 on the training images; all in eval mode after the last epoch",
    ):
        console.print(Text(line, "dim"))
    console.print(Text(f"published: {SOURCE}", "cyan"))
    for line in rates_too_high(results):
        console.print(Text(f"{line}; try a lower --lr or a larger --batch-size", "yellow"))
    for arm, found in results["arms"].items():
        if not found["learned"]:
            reason = "its training error is no better than that of naming the commonest class"
            console.print(Text(f"{arm} {NOT_LEARNED}: {reason}", "yellow"))
        saved = saving(found["runs"])
        if saved:
            console.print(Text(f"{arm}: {saved}"))


def _top1(runs: Sequence[Mapping[str, Any]]) -> str:
    errors = [run["top1_error"] for run in runs]
    return percent(fmean(errors)) + (f" ± {100 * stdev(errors):.1f}" if len(errors) > 1 else "")


def percent(fraction: float | None) -> str:
    """Write a fraction in per cent; ``-`` where there is none.

    Examples:
        >>> percent(0.191), percent(0.0179), percent(None)
        ('19.1', '1.79', '-')
    """
    if fraction is None:
        return "-"
    return f"{100 * fraction:.1f}" if fraction >= 0.1 or fraction == 0 else f"{100 * fraction:.2f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right")
    return table
