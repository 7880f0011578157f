"""Write the generated pages and pictures of this folder: ``python docs/pages.py``.

``zoo.md`` lists the facts about each architecture module of timm, ``presets.md`` the effect of each preset on four
models, ``plan.md`` every key of a plan, ``errors.md`` the messages for plans with mistakes. Models are created on the
meta device; nothing is downloaded. ``--left-out`` first finds the tensors outside timm's layer groups in every model,
for ``tests/left_out.json``; that takes minutes, and ``pytest -m zoo`` compares.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm

from freezeplan import cli, errors, load_plan, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe
from freezeplan.model.description import Description, prefixes
from freezeplan.plan.catalogue import shipped
from freezeplan.plan.schema import Phase, Plan, Plateau, Rate, Rule
from freezeplan.report import picture
from freezeplan.resolve.resolution import Resolution

HERE = Path(__file__).parent
PLANS = HERE.parent / "tests" / "plans"
LEFT_OUT = HERE.parent / "tests" / "left_out.json"
NOTE = "<!-- written by `python docs/pages.py`; a test compares -->\n"
FOUR = {
    "VGG16": "vgg16",
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_base_patch16_224",
    "EfficientNet-B0": "efficientnet_b0",
}
ROLES = ("head", "norm", "bias", "pos_embed", "no_weight_decay")
PICTURES: dict[str, tuple[str, str, int | None]] = {
    "low_conv_lr": (str(HERE.parent / "examples" / "low_conv_lr.yaml"), "vgg16", 20),
    "head_then_all": ("head_then_all", "resnet18", 10),
    "frozen_stages_2": ("frozen_stages_2", "resnet50", 10),
    "llrd": ("llrd", "vit_base_patch16_224", 10),
}
"""Picture -> the plan, the model and its classes."""


def zoo() -> str:
    """Return ``zoo.md``: one row for each architecture module."""
    models = json.loads((HERE.parent / "tests" / "zoo.json").read_text(encoding="utf-8"))
    names = Counter(timm.models._registry._model_to_module[name] for name in timm.list_models())
    columns = ("module", "models", "example", "stem", "stages", *ROLES, "not in timm's layer groups")
    lines = [
        "# timm's architectures\n",
        NOTE,
        f"One model of each of the {len(models)} architecture modules of timm {timm.__version__}, with ten classes. "
        "The columns of roles count tensors.\n",
        "timm's `group_matcher` does not match some tensors and puts them into the last group, together with the "
        "classifier. In a plan such a tensor has the stage of the tensor before it. `layer_decay` gives it timm's own "
        "rate. A report lists it if the plan uses depth. The last column counts the models of a module that have such "
        "tensors, and names the parts. Where timm has no matcher, the stages are the layers.\n",
        "*pos_embed* means position embeddings and the position biases of attention, absolute and relative: learned "
        "tensors, and the convolutions and small networks that compute them.\n",
        "`pytest -m zoo` checks every model of timm with five presets, and the last column.\n",
        row(columns),
        row("---" for _ in columns),
        *(row(_known(module, entry["model"], names[module])) for module, entry in sorted(models.items())),
    ]
    return "\n".join(lines) + "\n"


def _known(module: str, name: str, count: int) -> Iterator[str]:
    model = create_model(name, num_classes=10, meta=True)
    found = describe(model)
    yield from (module, str(count), f"`{name}`")
    yield "yes" if 0 in found.stages.values() else "none"
    yield str(found.last_stage)
    yield from (str(len(found.roles[role] & {t.name for t in found.tensors})) for role in ROLES)
    if not hasattr(model, "group_matcher"):
        yield "no matcher"
    else:
        parts = json.loads(LEFT_OUT.read_text(encoding="utf-8")).get(module, {})
        models = {name for names in parts.values() for name in names}
        yield f"{len(models)} of {count}: {', '.join(f'`{part}`' for part in parts)}" if parts else ""


def left_out(model: Description) -> set[str]:
    """The largest parts of a model that timm's matcher leaves out whole; a tensor where its module is not."""
    unplaced = frozenset(model.unplaced)
    parts = ((*prefixes(name), name) for name in model.unplaced)
    return {next(part for part in found if model.below.get(part, unplaced) <= unplaced) for found in parts}


def all_left_out() -> str:
    """Return ``left_out.json``: architecture module -> part that is left out -> the models that have it."""
    table: dict[str, dict[str, list[str]]] = {}
    for name in timm.list_models():
        for part in sorted(left_out(describe(create_model(name, num_classes=10, meta=True)))):
            table.setdefault(timm.models._registry._model_to_module[name], {}).setdefault(part, []).append(name)
    lines = (f" {json.dumps(module)}: {json.dumps(parts, sort_keys=True)}" for module, parts in sorted(table.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def presets() -> str:
    """Return ``presets.md``: one section for each preset."""
    models = {title: create_model(name, meta=True) for title, name in FOUR.items()}
    lines = [
        "# The presets\n",
        NOTE,
        'A preset is a plan that ships with the package: `apply_plan(model, "linear_probe", lr=1e-3)`. '
        "The tables count trained tensors and trained parameters. A preset with phases has a row for each phase that "
        "changes something. `freezeplan show PRESET MODEL` prints the same for any other model.\n",
        row(("model", "stem", "stages", "`stage: ..3` selects")),
        row(["---"] * 4),
        row(("VGG16", "none", "five blocks of convolutions", "seven convolutions")),
        row(("ResNet-50", "`conv1`, `bn1`", "`layer1` to `layer4`", "the stem and `layer1` to `layer3`")),
        row(
            (
                "ViT-B/16",
                "patch embedding, class token, position embedding",
                "twelve blocks, the last one with the final norm",
                "the stem and blocks 0 to 2",
            )
        ),
        row(
            (
                "EfficientNet-B0",
                "`conv_stem`, `bn1`",
                "seven `blocks`, the last one with `conv_head`",
                "the stem and blocks 0 to 2",
            )
        ),
        "",
    ]
    for name in shipped():
        plan = load_plan(name)
        lines += [
            f"## {name}\n",
            f"{(plan.description or '').strip()}\n",
            *([f"![{name} on {PICTURES[name][1]}](pictures/{name}.svg)\n"] if name in PICTURES else []),
            row(("model", "phase", "trained")),
            row(["---"] * 3),
        ]
        for title, model in models.items():
            try:
                lines += _trained(title, resolve_plan(plan, model))
            except PlanError as error:
                lines.append(row((title, "", f"refused: {error.problems[0].message}")))
        lines.append("")
    return "\n".join([*lines, *OWN_PRESETS])


def _trained(title: str, resolution: Resolution) -> Iterator[str]:
    for part in resolution.distinct:
        tensors, elements = len(part.trained), sum(row.elements for row in part.trained)
        total = sum(row.elements for row in part.rows)
        share = f"{tensors} of {len(part.rows)} tensors, {elements:,} of {total:,} parameters"
        yield row((title, part.phase, share))
        title = ""


OWN_PRESETS = (
    "## Presets of your own package\n",
    "A package that others install adds presets by an entry point of the group `freezeplan.presets`. Its name is the "
    "namespace. Its value is a package with `.yaml` files, or folders of them. No code is called. With this "
    "in `pyproject.toml`, the file `mylab/plans/probe.yaml` is the preset `mylab/probe`:\n",
    """```toml title="pyproject.toml"
[project.entry-points."freezeplan.presets"]
mylab = "mylab.plans"

[tool.setuptools.package-data]
"mylab.plans" = ["*.yaml"]
```
""",
    """```yaml title="probe.yaml"
# yaml-language-server: $schema=plan.schema.json
version: 1
name: probe
description: The classifier and the norms learn.
rules:
  - {role: [head, norm], lr_mult: 1}
  - {match: .*, frozen: true}
```
""",
    "`freezeplan presets` lists it with its description. If a package cannot be imported, has no plan, or uses a name "
    "that exists already, a warning names the package. All other presets still load.\n",
    "## Completion in an editor\n",
    "`freezeplan schema > plan.schema.json` writes the JSON schema of a plan. The first line of the plan above points "
    "to it, relative to the folder of the plan. An editor with the YAML language server, such as VS Code with its YAML "
    "extension, then completes keys, shows their meaning and marks mistakes as you type. For a plan in JSON, map the "
    'file to the schema in the settings of the editor; `"$schema"` is not a key of a plan.\n',
)
"""The end of ``presets.md``."""

ABOUT = {
    Plan: ("A plan", "plan.yaml"),
    Rule: ("A rule", "rules.yaml"),
    Rate: ("default", "default.yaml"),
    Phase: ("A phase", "phases.yaml"),
    Plateau: ("A plateau", "plateau.yaml"),
}
"""Model of pydantic -> the title of its section and the file of its example."""
EXAMPLES = {
    Plan: """\
version: 1
name: everything
description: A plan with every key.
layer_decay: 0.75
layer_decay_min_scale: 0.01
weight_decay: timm          # or all
overlap: first              # or error
phases:
  - name: head
    until: 1
    rules:
      - {role: body, frozen: true}
  - name: all
rules:
  - {role: head, lr_mult: 1}
default: {lr_mult: 0.5}
""",
    Rule: """\
version: 1
rules:
  - {role: norm, mode: eval}                               # statistics are not updated
  - {match: 'layer4\\.0\\.conv.*', wd_mult: 0.1}             # single quotes keep backslashes
  - {type: Conv2d, stage: -1, lr_mult: 0.5}                # both must hold
  - {role: [head, bias], lr_mult: 1, reinit: false}        # a list means any
  - {match: pos_embed, lr_mult: 0.1, optional: true}       # only some models have it
  - {stage: ..2, frozen: true}
  - {match: layer4, layer_decay: 0.9}                      # multiplied into the rate that another rule gives
  - {match: .*, lr_mult: 0.1}
""",
    Rate: """\
version: 1
rules:
  - {role: head, lr_mult: 1}
default: {frozen: true}     # or {lr_mult: 0.1}
""",
    Phase: """\
version: 1
phases:
  - {name: head, until: 2, rules: [{role: body, frozen: true}]}
  - {name: top, until: 50%, rules: [{stage: ..-2, frozen: true}]}
  - {name: all}
rules:
  - {match: .*, lr_mult: 1}
""",
    Plateau: """\
version: 1
phases:
  - name: head
    until: {metric: accuracy, patience: 2, goal: max}
    rules:
      - {role: body, frozen: true}
  - name: all
rules:
  - {match: .*, lr_mult: 1}
""",
}


def plan() -> str:
    """Return ``plan.md``: every key of a plan, from the models that check it."""
    schema = Plan.model_json_schema()
    lines = [
        "# The plan language\n",
        NOTE,
        "A plan is YAML 1.2, TOML or JSON, or the same as a dict. Types are strict: the text `'1'` is not a number. "
        "Three rules hold:\n",
        "1. **For each setting, the first matching rule that sets it decides.** So one rule can decide the mode of the "
        "norms and another the rate of the backbone.\n"
        "2. **Every parameter gets a rate**, from a rule or from the plan's `default`.\n"
        "3. **Every rule decides something.** A rule that matches nothing is an error; `optional: true` allows it. A "
        "rule is also an error if the rules above it decide everything that it matches.\n",
        "`match` must fit the whole dotted name of a parameter, or of a module above it: `features` selects the module "
        "and everything below it, and `features.1` does not select `features.10`.\n",
        "`freezeplan schema` prints the JSON schema of this page. With the first line "
        "`# yaml-language-server: $schema=plan.schema.json`, an editor completes and checks a plan in the same "
        "folder as the schema.\n",
    ]
    for model, (title, file) in ABOUT.items():
        own = schema if model is Plan else schema["$defs"][model.__name__]
        lines += [
            f"## {title}\n",
            f"{_markdown((model.__doc__ or '').split('Examples:')[0])}\n",
            row(("key", "value", "without it", "meaning")),
            row(["---"] * 4),
            *(_key(key, entry, required=key in own.get("required", ())) for key, entry in own["properties"].items()),
            "",
            _block("yaml", EXAMPLES[model], file),
        ]
    return "\n".join(lines)


def _key(key: str, entry: Mapping[str, Any], *, required: bool) -> str:
    default = entry.get("default")
    absent = "an error" if required else f"`{json.dumps(default)}`" if default not in (None, []) else ""
    return row((f"`{key}`", _value(key, entry), absent, _markdown(entry.get("description", ""))))


def _value(key: str, entry: Mapping[str, Any]) -> str:
    """What may stand behind a key, from its JSON schema, in words."""
    parts = entry.get("anyOf") or entry.get("oneOf")
    if parts:
        words = [_value(key, part) for part in parts if part.get("type") != "null"]
        several = words[1:] and words[-1] == f"a list of {words[0].removeprefix('a ')}"
        return f"{words[0]}, or a list" if several else " or ".join(words)
    if "$ref" in entry:
        (title,) = (title for model, (title, _) in ABOUT.items() if entry["$ref"].endswith(f"/{model.__name__}"))
        return f"[{title.lower()}](#{title.lower().replace(' ', '-')})"
    if "const" in entry:
        return f"`{json.dumps(entry['const'])}`"
    if "enum" in entry:
        return " or ".join(f"`{word}`" for word in entry["enum"])
    if entry["type"] == "array":
        return f"a list of {_value(key, entry['items']).removeprefix('a ')}"
    if "pattern" in entry:
        return {"stage": "a range", "until": "a percentage"}[key]
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    bounds = " and ".join(f"{words} {entry[limit]}" for limit, words in limits.items() if limit in entry)
    kind = {"string": "text", "integer": "an integer", "number": "a number", "boolean": "`true` or `false`"}
    return f"{kind[entry['type']]} {bounds}".strip()


TO_DO = {
    "FreezePlanError": "`except FreezePlanError` catches all classes below. It is a `ValueError`. Raised itself, "
    "it reports an option that conflicts with others; the notes name the right one.",
    "PlanError": "Go to `file:line:column` and use one of the suggested names, or see the sections below. "
    "`freezeplan check PLAN MODEL` repeats the check without training.",
    "ModelError": "Use one of the suggested names. A function of your own is `package.module:function`. In a "
    "model that is not timm's, select by `match` and `type`.",
    "ApplyError": "The sentence names the argument or the call that is missing: `lr=`, `scheduler=`, `attach`, "
    "`replace=True`, `rewrap=`. Or it names what other code changed in the model since ([faults](proof.md)).",
    "DataError": "Give a folder of photos, or a tar of one. Unpack or download a damaged file again.",
    "WeightsError": "Give weights of this architecture, or those that the plan was applied to. The error names the "
    "first tensor that differs.",
    "OutputError": "Create the folder, give another one, or remove the file that blocks it.",
    "MissingExtraError": "Run the `pip install` of its second line. It is an `ImportError` too.",
    "FreezePlanWarning": "The program continues. Change the plan if the sentence is not what you meant. "
    "`warnings.filterwarnings('error', category=FreezePlanWarning)` turns it into an error.",
}
"""Class of ``freezeplan.errors`` -> what to do about it."""
CAUSES = {
    "Not a plan": ("only_comments", "empty", "list", "text", "no_rules", "rules_empty", "rule_as_text"),
    "The text of the file": (
        *("tab", "colon", "unfinished", "unclosed_list", "two_documents", "unknown_anchor", "duplicate_key"),
        *("latin1", "utf16"),
    ),
    "The version": ("version_missing", "no_version", "version_other", "version_text"),
    "A key": (*("key_unknown", "key_unknown_top", "unknown_key", "unknown_rule_key", "unrelated_key", "merged_keys"),),
    "A pattern": (
        *("pattern_broken", "bad_pattern", "number_as_pattern", "empty_lists", "wrong_escape", "escape_wrong"),
        *("inline_bracket", "inline_bracket_first", "inline_brace", "inline_comma"),
    ),
    "What a rule selects": ("selector_missing", "role_unknown", "stage_wrong", "stage_backwards"),
    "What a rule sets": (
        *("setting_missing", "settings_only", "null_setting", "frozen_text", "windows_lines", "byte_order_mark"),
        *("lr_mult_zero", "lr_mult_negative", "lr_mult_text", "infinite", "nan", "rates_two"),
    ),
    "default and phases": ("default_text", "default_two", "until_fraction"),
    "Several at once": ("several",),
}
"""Title -> the plans of ``tests/plans/bad`` that make that mistake, by their names without suffix."""
ON_VGG16 = ("container_type", "probe_of_vgg", "root_name")


def error_catalogue() -> str:
    """Return ``errors.md``: every class of error, and the message for each mistake in a plan."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(CAUGHT, {})
    lines = [
        "# Errors and what to do\n",
        NOTE,
        "An error says where it is, what was found, what was expected and what to do. All mistakes of a file are "
        "reported at once. Commands print errors to stderr and end with exit code 1, without a traceback. In Python, "
        "the exception holds the same facts as data:\n",
        _block("python", CAUGHT),
        _block("text", printed.getvalue()),
        "## The classes\n",
        row(("class", "meaning", "what to do")),
        row(["---"] * 3),
        *(row((f"`{name}`", _markdown(doc.split("\n\n")[0]), TO_DO[name])) for name, doc in classes().items()),
        "",
    ]
    seen: set[str] = set()
    for title, names in CAUSES.items():
        lines.append(f"## {title}\n")
        for name in names:
            files = (PLANS / "bad" / f"{name}{suffix}" for suffix in (".yaml", ".toml", ".json"))
            file = next(file for file in files if file.exists())
            said = console(f"freezeplan check {file.name}", PLANS / "bad")
            what = re.sub(r"error: \S+: ", "", said)
            if what not in seen:
                lines += _shown(file, f"freezeplan check {file.name}", said)
            seen.add(what)
    lines += [
        "## Valid plans that do not do what was meant\n",
        "The first line of each plan says what was meant. `check` prints an error if a rule can do nothing, and a hint "
        "if it does something else, or less.\n",
    ]
    for file in sorted((PLANS / "wrong").glob("*.yaml")):
        command = f"freezeplan check {file.name} {'vgg16' if file.stem in ON_VGG16 else 'vit_base_patch16_224'}"
        lines += _shown(file, command, console(command, PLANS / "wrong"))
    return "\n".join(lines)


CAUGHT = """\
from freezeplan import load_plan
from freezeplan.errors import FreezePlanError

try:
    load_plan({"version": 1, "rules": [{"match": "features", "lr_mul": 0.2}]})
except FreezePlanError as error:
    for problem in error.problems:
        print(problem.where, problem.message, problem.notes, sep="\\n")
"""


def classes() -> dict[str, str]:
    """Every class of error and warning that ``freezeplan.errors`` defines, in its order, to its docstring."""
    own = (value for value in vars(errors).values() if getattr(value, "__module__", "") == errors.__name__)
    return {value.__name__: value.__doc__ for value in own if isinstance(value, type) and issubclass(value, Exception)}


def _shown(file: Path, command: str, printed: str) -> Iterator[str]:
    """A plan, unless it is no text, and what a command says of it."""
    try:
        yield _block(file.suffix[1:], file.read_text(encoding="utf-8-sig"), file.name)
    except UnicodeDecodeError:
        yield f"`{file.name}`, in another encoding: `{printed.strip()}`\n"
    else:
        yield _block("console", f"$ {command}\n{printed}")


def console(command: str, folder: Path) -> str:
    """Run a command of freezeplan in a folder, as if in a terminal of 100 columns, and return what it prints."""
    out = io.StringIO()
    with (
        contextlib.chdir(folder),
        patch.object(sys, "argv", command.split()),
        patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        contextlib.suppress(SystemExit),
    ):
        cli.main()
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _block(kind: str, text: str, file: str = "") -> str:
    title = f' title="{file}"' if file else ""
    return f"```{kind}{title}\n{text.rstrip()}\n```\n"


def _markdown(text: str) -> str:
    """A docstring on one line, with backticks as Markdown has them."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def row(cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def draw(name: str, path: Path) -> None:
    """Draw a picture of ``PICTURES`` as a file."""
    plan, model, classes = PICTURES[name]
    network = create_model(model, num_classes=classes, meta=True)
    picture.draw(resolve_plan(plan, network), describe(network), path)


PAGES = {"zoo.md": zoo, "presets.md": presets, "plan.md": plan, "errors.md": error_catalogue}
"""File in this folder -> what writes it."""


def main() -> None:
    """Write all pages, each under a temporary name first, and draw all pictures."""
    if "--left-out" in sys.argv[1:]:
        _write(LEFT_OUT, all_left_out())
    for name, page in PAGES.items():
        _write(HERE / name, page())
    for name in PICTURES:
        draw(name, HERE / "pictures" / f"{name}.svg")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
