"""Write the pages and pictures of this folder that are computed: ``python docs/pages.py``.

``zoo.md`` says what is known of each architecture module of timm, ``presets.md`` what each preset does on four models,
``plan.md`` what a plan may say, ``errors.md`` what is said of plans with mistakes. Models are created on the meta
device; nothing is downloaded. ``--left-out`` first asks every model of timm what its matcher leaves out, for
``tests/left_out.json``; that takes minutes, and ``pytest -m zoo`` compares.
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

from freezeplan import cli, errors, load_plan, picture, resolve_plan
from freezeplan.catalogue import shipped
from freezeplan.description import Description, prefixes
from freezeplan.errors import PlanError
from freezeplan.plan import Phase, Plan, Plateau, Rate, Rule
from freezeplan.resolution import Resolution
from freezeplan.zoo import create_model, describe

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
    columns = ("module", "models", "example", "stem", "stages", *ROLES, "left out by timm's matcher")
    lines = [
        "# What is known of timm's architectures\n",
        NOTE,
        f"One model of each of the {len(models)} architecture modules of timm {timm.__version__}, with ten classes. "
        "The columns of roles count tensors.\n",
        "*Left out* are tensors that timm's `group_matcher` does not match and puts into the last group, as if they "
        "were the classifier. In a plan they have the stage of the tensor ahead of them, `layer_decay` gives them "
        "timm's own rate, and every report of a plan that speaks of depth lists them. Where timm has no matcher, the "
        "stages are the layers. The last column counts the module's models that have such tensors, with any of the "
        "parts that are left out whole in one of them.\n",
        "*pos_embed* are position embeddings and the position biases of attention, absolute and relative: learned "
        "tensors, and the convolutions and small networks that make them.\n",
        "Every model of timm by name is held against five presets, and against the last column, by `pytest -m zoo`.\n",
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
        "The tables count what is trained, of all tensors and of all parameters; a preset with phases has a line for "
        "each that changes something. `freezeplan show PRESET MODEL` says it for any other model.\n",
        "The stages of VGG16 are its five blocks of convolutions, and it has no stem; those of ResNet-50 are `layer1` "
        "to `layer4`; those of ViT-B/16 its twelve blocks, the last one with the final norm; those of EfficientNet-B0 "
        "its seven `blocks`, the last one with `conv_head`. So `stage: ..3` is seven convolutions of VGG16, the stem "
        "and `layer1` to `layer3` of ResNet-50, and on ViT-B/16 the patch embedding, class token, position embedding "
        "and blocks 0 to 2.\n",
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
    "namespace, its value a package that holds `.yaml` files, and folders of them; nothing has to be called. With this "
    "in `pyproject.toml`, the file `mylab/plans/probe.yaml` is the preset `mylab/probe` where a plan is asked for:\n",
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
    "`freezeplan presets` lists it with its description. A package that cannot be imported, holds no plan, or takes a "
    "name that there is already gets a warning that names it, and all other presets are there.\n",
    "## Completion in an editor\n",
    "`freezeplan schema > plan.schema.json` writes the JSON schema of a plan. The first line of the plan above points "
    "at it, relative to the plan's own folder: editors with the YAML language server, such as VS Code with its YAML "
    "extension, then complete keys and words, show what each means, and mark what is wrong while it is typed. For a "
    'plan in JSON map the file to the schema in the editor\'s settings; `"$schema"` is no key of a plan.\n',
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
  - {role: norm, mode: eval}                               # its statistics stand still
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
        "# What a plan may say\n",
        NOTE,
        "A plan is YAML 1.2, TOML or JSON, or the same as a dict. Types are strict: text is no number. For each "
        "setting the first matching rule that sets it wins; every parameter gets a rate; every rule wins something "
        "somewhere.\n",
        "`freezeplan schema` prints this page for machines. A first line "
        "`# yaml-language-server: $schema=plan.schema.json` makes an editor complete and check a plan that stands "
        "beside it.\n",
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
    "FreezePlanError": "`except FreezePlanError` catches each of those below; it is a `ValueError`. As itself: an "
    "option that does not go with the others; the notes say which does.",
    "PlanError": "Go to `file:line:column`, take one of the names that are offered, or see the sections below. "
    "`freezeplan check PLAN MODEL` says it again without training.",
    "ModelError": "Take one of the names that are offered; a function of your own is `package.module:function`. For a "
    "model that is not timm's, select by `match` and `type`.",
    "ApplyError": "The sentence names the argument or the call that is missing: `lr=`, `scheduler=`, `attach`, "
    "`replace=True`, `rewrap=`; or what other code did to the model since ([36 faults](proof.md)).",
    "DataError": "Give a VOCdevkit folder or a tar of one; unpack or fetch a damaged file anew.",
    "WeightsError": "Give the weights that the plan was made on, or those of this architecture; the first tensor that "
    "differs is named.",
    "OutputError": "Make the folder, give another one, or remove what is in the way.",
    "MissingExtraError": "Run the `pip install` of its second line. It is an `ImportError` too.",
    "FreezePlanWarning": "No error: it goes on. Read the sentence, and change the plan if it is not what you meant; "
    "`warnings.filterwarnings('error', category=FreezePlanWarning)` makes it one.",
}
"""Class of ``freezeplan.errors`` -> what to do about it."""
CAUSES = {
    "Nothing that can be a plan": ("only_comments", "empty", "list", "text", "no_rules", "rules_empty", "rule_as_text"),
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
    """Return ``errors.md``: every class of error, and what is said of plans that make each mistake."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(CAUGHT, {})
    lines = [
        "# What is said of a mistake\n",
        NOTE,
        "An error says where, what was found, what was expected and what to do, all mistakes of a file at once. "
        "Commands print it to stderr and end with exit code 1, never with a traceback. In Python it is an exception "
        "that keeps its facts:\n",
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
        "## On a model: not what was meant\n",
        "The first line of each says what was meant. It is an error where a rule can do nothing, and a hint where it "
        "does something else, or less.\n",
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
