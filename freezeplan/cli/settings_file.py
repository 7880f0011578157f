"""A file of a command's options: keys are their long names; what is typed on the command line wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from freezeplan.errors import PlanError, Problem, did_you_mean
from freezeplan.plan.load import read_data


def use_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Take a file's values for the options that are not typed. The callback of ``--settings``.

    Args:
        context: The command's, whose defaults are changed.
        path: A YAML, TOML or JSON file such as ``epochs: 5``; None: nothing happens.

    Raises:
        PlanError: If the file cannot be read, a key is no option, or a value does not fit; each with its place.
    """
    if path is None:
        return path
    data, source = read_data(path)
    if not isinstance(data, dict):
        raise PlanError("expected options, such as epochs: 5", where=str(path))
    options = {
        parameter.name: parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option" and parameter.name not in (None, "settings", "help")
    }
    values: dict[str, Any] = {}
    problems = []
    for key, value in data.items():
        where = source.where((key, "<key>"))
        parameter = options.get(str(key).replace("-", "_"))
        if parameter is None:
            known = [str(name).replace("_", "-") for name in options]
            problems.append(Problem(f"no option is called {key!r}", where, tuple(did_you_mean(str(key), known))))
            continue
        many = parameter.multiple
        given = value if many and isinstance(value, list) else [value] if many else value
        try:
            parameter.process_value(context, given)
        except (typer.BadParameter, TypeError, ValueError) as error:
            found = getattr(error, "message", str(error))
            if found.startswith("Input "):
                found = f"{found.removeprefix('Input ')}, found {value!r}"
            problems.append(Problem(f"{key}: {found}", source.where((key,))))
            continue
        values[str(parameter.name)] = given
    if problems:
        raise PlanError(problems)
    context.default_map = values
    return path
