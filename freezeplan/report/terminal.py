"""Rows and errors -> terminal: in the core the only importer of rich.

Results go to stdout, problems to stderr. Text that a user wrote is printed without markup, which would eat patterns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.console import Group as Lines
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.status import Status
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from freezeplan.cache.store import Entry
from freezeplan.errors import FreezePlanError, printable
from freezeplan.plan.schema import Plan
from freezeplan.report.diff import Change
from freezeplan.report.rows import Node, count, phase_end, rule_line, tree
from freezeplan.resolve.resolution import Group, Resolution, in_phases

_NAME = 20
"""Columns that the name of a row keeps on a narrow screen."""
UNPLACED = "left out by timm's matcher (layer_decay 1, a stage only by place)"


def stdout() -> Console:
    """Return the console for results; colours and width follow the terminal, ``NO_COLOR`` and ``COLUMNS``."""
    return Console(markup=False, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Return the console for problems and progress."""
    return Console(stderr=True, markup=False, highlight=False)


def print_table(
    console: Console, titles: Sequence[str], rows: Sequence[Sequence[str | Text]], *, left: Collection[str] = ()
) -> None:
    """Print rows below titles so that no cell is cut. Where the console is too narrow, the first column is folded.

    Where it still is, lines run on past its edge, as in a file.

    Args:
        console: Where it goes.
        titles: One a column. The first column is text, the others are numbers.
        rows: With a cell for each column.
        left: Titles of further columns that begin at the left.
    """
    widths = [max(cell_len(str(cell)) for cell in (title, *cells)) for title, *cells in zip(titles, *rows, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= console.width else 1
    first = max(_NAME, console.width - sum(widths[1:]) - gap * (len(widths) - 1))
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, justify="left" if title in (titles[0], *left) else "right", no_wrap=True)
    for name, *numbers in rows:
        text = name if isinstance(name, Text) else Text(name)
        table.add_row(Text("\n").join(text.divide(range(first, len(text), first))), *numbers)
    everything = console.options.update(width=sum(widths) + 2 * len(widths))
    for line in console.render_lines(table, everything, pad=False):
        console.print(Segments([*line, Segment.line()]), soft_wrap=True, end="")


def waiting(text: str, console: Console | None = None) -> Status:
    """Return a context in which a terminal shows, on stderr, that something takes a while; elsewhere nothing."""
    return (console or stderr()).status(Text(text))


def print_error(error: FreezePlanError) -> None:
    """Print every problem of an error to stderr: the place, the sentence, and what to do, one line each."""
    console = stderr()
    for index, problem in enumerate(error.problems):
        if index:
            console.print()
        place = f"{_harmless(problem.where)}: " if problem.where else ""
        head = Text.assemble(("error: ", "bold red"), (place, "bold"), _harmless(problem.message))
        console.print(head, soft_wrap=True)
        for note in problem.notes:
            console.print(Text(f"  {_harmless(note)}"), soft_wrap=True)


def print_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning to stderr without the place in the code that gave it; stands in for ``warnings.showwarning``."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), _harmless(str(message))), soft_wrap=True)


def _harmless(text: str) -> str:
    """Strangers' files are quoted, and may hold what a terminal would obey; only ends of lines stay what they are."""
    return "\n".join(map(printable, text.split("\n")))


def print_resolution(resolution: Resolution, lr: float | None) -> None:
    """Print what a plan means for a model: the tree of decisions, rules, groups, what stays random, hints.

    Of phases that follow each other and decide the same the last one is shown.
    """
    console = stdout()
    console.print(Text.assemble((resolution.plan.title, "bold"), " on ", (resolution.subject, "bold")))
    if resolution.plan.description:
        console.print(Padding(Text(resolution.plan.description, style="dim"), (0, 0, 0, 2)))
    for part in resolution.distinct:
        console.print()
        if part.phase:
            console.print(Text.assemble("phase ", (part.phase, "bold"), f" {phase_end(resolution, part)}"))
        console.print(_tree(tree(part)))
        console.print()
        for label, style, rows in (("frozen", "cyan", part.frozen), ("trainable", "green", part.trained)):
            found = count(rows)
            size = f"{found['elements']:>13,} in {found['tensors']} tensors"
            console.print(Text.assemble((f"{label:<10}", style), size))
    console.print()
    titles = ("group", "lr" if lr is not None else "lr_mult", "wd_mult", "tensors", "elements")
    print_table(console, titles, [_group(group, lr) for group in resolution.groups])
    print_rules(resolution, console)


def print_rules(resolution: Resolution, console: Console | None = None) -> None:
    """Print what each rule matched and decided, what stays random or alive, and the hints."""
    console = console or stdout()
    for part in resolution.parts:
        console.print()
        if part.phase:
            console.print(Text.assemble("phase ", (part.phase, "bold")))
        for use in part.uses:
            console.print(Text(rule_line(use, part)), soft_wrap=True)
    last = resolution.parts[-1]
    sections: Mapping[str, tuple[str, ...]] = {
        "stays random while training:": last.random,
        "frozen, but kept in train by a rule; statistics will move:": last.alive,
        f"{UNPLACED}:": resolution.unplaced,
    }
    for title, lines in sections.items():
        if lines:
            console.print()
            console.print(Text(title, style="yellow"))
            for line in _shorten(lines):
                console.print(Text(f"  {line}"), soft_wrap=True)
    for hint in dict.fromkeys(hint for part in resolution.parts for hint in part.hints):
        console.print()
        console.print(Text.assemble(("hint: ", "yellow"), hint), soft_wrap=True)


def print_explanation(found: Mapping[str, Any]) -> None:
    """Print what ``freezeplan.report.explain.explain`` says of one tensor."""
    console = stdout()
    shape = " x ".join(map(str, found["shape"])) or "scalar"
    console.print(Text.assemble((found["name"], "bold"), f"  {shape}"), soft_wrap=True)
    if found["aliases"]:
        console.print(Text(f"also called {', '.join(found['aliases'])}"), soft_wrap=True)
    if found["part"]:
        console.print(Text(f"part: {found['part']}"), soft_wrap=True)
    console.print(Text(f"group: {found['group'] or 'none, it is never trained'}"), soft_wrap=True)
    for phase in found["phases"]:
        console.print()
        if phase["phase"]:
            console.print(Text.assemble("phase ", (phase["phase"], "bold")))
        rate = "frozen" if phase["frozen"] else f"lr x {phase['lr_mult']:g}"
        if phase.get("lr") is not None:
            rate += f" = {phase['lr']:g}"
        reinit = ", reinit" if phase["reinit"] else ""
        style = "cyan" if phase["frozen"] else "green"
        console.print(Text.assemble((rate, style), f", wd x {phase['wd_mult']:g}, {phase['mode']}{reinit}"))
        if decay := phase.get("decay"):
            floor = f", at least {decay['min_scale']:g}" if decay["min_scale"] else ""
            power = f"{decay['layer_decay']:g}^{decay['exponent']}"
            console.print(Text(f"  lr_mult {decay['lr_mult']:g} x layer_decay {power}{floor}"), soft_wrap=True)
        if phase["unplaced"]:
            console.print(Text(f"  {UNPLACED}"), soft_wrap=True)
        for rule in phase["rules"]:
            decides = f"decides {', '.join(rule['decides'])}" if rule["decides"] else "matches, decides nothing here"
            where = f"  {rule['where']}" if rule["where"] else ""
            console.print(Text(f"  rule {rule['rule']} ({rule['text']}) {decides}{where}"), soft_wrap=True)
        if not any("rate" in rule["decides"] for rule in phase["rules"]):
            console.print(Text("  the plan's default decides rate"))


def print_changes(changes: tuple[Change, ...], *, equal: bool) -> None:
    """Print what two plans decide differently, or that they are equal or equivalent."""
    console = stdout()
    if not changes:
        console.print("the same plan" if equal else "equivalent: the same decisions for every tensor")
    for phase, found in itertools.groupby(changes, key=lambda change: change.phase):
        if phase:
            console.print(Text.assemble("phase ", (phase, "bold")))
        for change in found:
            size = f"  {change.elements:,} in {change.tensors} tensor{'s' * (change.tensors > 1)}"
            text = Text.assemble(
                change.name, "  ", (change.before, "red"), " -> ", (change.after, "green"), (size, "dim")
            )
            console.print(text, soft_wrap=True)


def print_presets(presets: Mapping[str, Plan]) -> None:
    """Print the presets: name and description."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, plan in presets.items():
        table.add_row(Text(name), Text(plan.description or ""))
    stdout().print(table)


def print_forecast(found: Mapping[str, Any]) -> None:
    """Print what training under a plan costs beside training everything.

    Args:
        found: What ``Forecast.as_json`` returned.
    """
    console = stdout()
    phase = f", phase {found['phase']} (the first of {found['phases']})" if found["phase"] else ""
    size, batch = found["image_size"], found["batch_size"]
    console.print(
        Text(f"{found['plan']}{phase} on {found['model']}, {size} x {size} pixels, {batch} images a step", "bold"),
        soft_wrap=True,
    )
    rows: list[tuple[str, ...]] = []

    def add(title: str, mine: int, full: int) -> None:
        rows.append((title, f"{mine:,}", f"{full:,}", f"{mine / full:.3g}" if full else "-"))

    mine, full = found["costs"]["plan"], found["costs"]["full"]
    add("trained parameters", mine["trained"], full["trained"])
    add("gradients, bytes", mine["gradient_bytes"], full["gradient_bytes"])
    for name in mine["optimizer_bytes"]:
        add(f"state of {name}, bytes", mine["optimizer_bytes"][name], full["optimizer_bytes"][name])
    add("activations kept, bytes a step", mine["activation_bytes"], full["activation_bytes"])
    add("forward FLOPs an image", mine["forward_flops"], full["forward_flops"])
    add("backward FLOPs an image", mine["backward_flops"], full["backward_flops"])
    print_table(console, ("", "this plan", "everything", "ratio"), rows)
    console.print(f"a step takes {found['ratio']:.3g} of the arithmetic of training everything", soft_wrap=True)
    if found["behind_flops"]:
        console.print(
            f"frozen behind what is trained: {found['behind_flops']:,} of {mine['forward_flops']:,} forward FLOPs an "
            "image, and as many backward for the gradient of their input; no cache saves them",
            soft_wrap=True,
        )
    if found["cached_ratio"] is not None:
        console.print(
            f"on kept features of {found['cache_bytes']:,} bytes an image: {found['cached_ratio']:.2g} of it",
            soft_wrap=True,
        )
        if found["advice"]:
            console.print(f"advice: {found['advice']}", soft_wrap=True)
    else:
        console.print(Text(f"nothing can be kept: {found['obstacle']}"), soft_wrap=True)


def print_entries(directory: Path, entries: Sequence[Entry]) -> None:
    """Print what a folder keeps of features, and how much that is together."""
    if not entries:
        stdout().print(f"{directory}: no features are kept", soft_wrap=True)
        return
    shards, size = (
        max(len(title), *(len(f"{value:,}") for value in values))
        for title, values in (
            ("shards", [entry.shards for entry in entries]),
            ("bytes", [entry.bytes for entry in entries]),
        )
    )
    key = max(len(entry.key) for entry in entries)
    line = f"{'key':{key}}  {'used':16}  {'shards':>{shards}}  {'bytes':>{size}}  dtype"
    stdout().print(Text(line, style="dim"), soft_wrap=True)
    for entry in entries:
        about = entry.about
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        facts = f"{entry.key:{key}}  {used}  {entry.shards:>{shards},}  {entry.bytes:>{size},}  {about['dtype']}"
        stdout().print(Text(facts), soft_wrap=True)
        names = f"  {about['plan']} on {about['model']}, up to {', '.join(about['memoised'])}"
        stdout().print(Text(names, style="dim"), soft_wrap=True)
    stdout().print(f"{directory}: {sum(entry.bytes for entry in entries):,} bytes", soft_wrap=True)


def _shorten(lines: tuple[str, ...], limit: int = 8) -> tuple[str, ...]:
    return lines if len(lines) <= limit else (*lines[: limit - 1], f"... and {len(lines) - limit + 1} more")


def _tree(node: Node) -> Tree:
    branch = Tree(_label(node), guide_style="dim")
    for child in node.children:
        branch.children.append(_tree(child))
    return branch


def _label(node: Node) -> Lines | Text:
    style = {True: "cyan", False: "green", None: ""}[node.frozen]
    each = f" ({node.alike} alike)" if node.alike > 1 else ""
    plural = "s" * (node.tensors != 1)
    size = f"{node.elements:,} in {node.tensors} tensor{plural}{each}"
    return Text.assemble(node.name, "  ", (node.decision, style), "  " if node.decision else "", (size, "dim"))


def _group(group: Group, lr: float | None) -> tuple[str, ...]:
    shown = in_phases(["-" if rate is None else f"{rate if lr is None else rate * lr:g}" for rate in group.rates])
    return group.name, shown, f"{group.wd_mult:g}", str(len(group.tensors)), f"{group.elements:,}"
