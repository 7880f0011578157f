"""Every fenced block of the README and of the documentation runs, or is exempt by name with a reason.

A page is read from top to bottom in a folder of its own, as a reader would follow it. What its blocks say is done by
their kind: Python runs, plans load, commands print what stands below them, patches fit the script that they are for.
"""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from torch.utils.data import DataLoader, TensorDataset

import freezeplan
from freezeplan import cli, load_plan
from freezeplan.errors import PlanError
from freezeplan.voc_vgg16 import model as experiment_model  # noqa: F401  registers vgg16_slim_fc256

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPT = Path(__file__).parents[1] / "pages" / "train.py"
"""What the patches of a page are for."""
SLOW = {
    "docs/trainers/accelerate.md", "docs/trainers/huggingface.md", "docs/trainers/lightning.md",
    "docs/trainers/torchvision.md", "docs/recipes.md", "docs/errors.md", "docs/tutorial.md",
}  # fmt: skip
APART = {"README.md", "docs/recipes.md"}
"""Pages whose sections stand alone: each begins with new names."""

SMALL = {
    '"vgg16", pretrained=True': '"vgg16_slim_fc256"',
    '"resnet50", pretrained=True': '"test_resnet"',
    'TimmWrapperForImageClassification.from_pretrained("timm/resnet50.a1_in1k", num_labels=10)': (
        'TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=10))'
    ),
    "import TimmWrapperForImageClassification": "import TimmWrapperConfig, TimmWrapperForImageClassification",
    'resnet18(weights="DEFAULT")': "resnet18()",
    'fasterrcnn_resnet50_fpn(weights="DEFAULT", trainable_backbone_layers=5)': (
        "fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=2, min_size=64, max_size=64)"
    ),
}
"""What a page says -> what stands in for it, without a download."""
if not hasattr(torch.optim, "Muon"):
    SMALL["torch.optim.Muon"] = "torch.optim.SGD"

FILES = {
    "README.md": {
        "typo.yaml": "version: 1\nrules:\n  - {match: featuers, frozen: true}\n  - {match: .*, lr_mult: 1}\n",
    },
    "docs/importing.md": {
        "MyModule_ft_schedule.yaml": "0: {params: ['fc.*']}\n1: {params: ['layer4.*']}\n",
        "output/train/args.yaml": "layer_decay: 0.65\nlr: 0.001\n",
        "schedule.yaml": "0: {params: ['fc.*'], max_transition_epoch: 3}\n1: {params: ['layer4.*'], lr: 1.0e-4}\n",
        "mymodule.py": (
            "import timm, torch\n\n\ndef build():\n    model = torch.nn.Module()\n"
            "    model.backbone = timm.create_model('test_resnet', num_classes=0)\n"
            "    model.head = torch.nn.Linear(96, 3)\n    return model\n"
        ),
        "resolved.py": "optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))\n",
        "config.py": "optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))\n",
    },
}
"""Page -> files that its reader has and that it does not show."""

RUN, PARSED = "run", "parsed"
COMMANDS = {
    # minutes, or a network and a GPU; tests/voc_vgg16/test_run.py runs the experiment
    r"freezeplan (run|compare|suggest) .*|torchrun .*": PARSED,
    r"freezeplan .*": RUN,
    r"pip install .*": "needs the network; .ci/run does it",
    r"python -m venv .*|\. .*/activate": "makes an environment; .ci/run does it",
    r"pytest .*": "this is what runs",
    r"ruff check \.|ruff format --check \.|mypy|lint-imports": "a step of .ci/run",
    r"python examples/\w+\.py.*": "tests/test_examples.py runs it",
    r"python -c .from mmengine.*": "tests/test_import_openmmlab.py runs it",
    r"python benchmarks/\w+\.py.*": "recorded output of minutes of timing; no time is a test",
}
"""A command of a console block -> what is done with it: run and compared, parsed, or nothing, and then why."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    section: str
    kind: str
    name: str
    """The file that the block shows, from ``title="..."`` or from a comment in its first line; or empty."""
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL):
        section = re.findall(r"^##? .*$", text[: match.start()], flags=re.MULTILINE)[-1]
        _, kind, info, body = match.groups()
        named = re.search(r'title="(\S+)"', info) or re.match(r"# (\S+\.(?:yaml|toml|py))\n", body)
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(key(page), line, section, kind, named[1] if named else "", body))
    return found


def key(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass
class Place:
    """Where a page is followed: a folder, names, a script, and what was printed last."""

    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch
    page: str
    names: dict[str, Any] = field(default_factory=dict)
    section: str = ""
    printed: str = ""
    script: str = SCRIPT.read_text(encoding="utf-8")

    def follow(self, block: Block) -> None:
        assert block.kind in KINDS, f"{block.page}:{block.line}: nothing runs a block of kind {block.kind!r}"
        if not self.names or (self.page in APART and block.section != self.section):
            self.names = given(self.page)
        self.section = block.section
        KINDS[block.kind](self, block)

    def python(self, block: Block) -> None:
        code = block.text
        for old, new in SMALL.items():
            code = code.replace(old, new)
        exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), self.names)
        self.printed = self.capture.readouterr().out

    def text(self, block: Block) -> None:
        """What the Python above it printed."""
        assert self.printed == block.text

    def plan(self, block: Block) -> None:
        """A plan that loads, or whose error the page shows."""
        if block.name == "pyproject.toml":  # tests/test_catalogue.py installs what it describes
            return
        name = block.name or f"plan.{block.kind}"
        Path(name).write_text(block.text, encoding="utf-8", newline="")
        page, problems = (ROOT / block.page).read_text(encoding="utf-8"), ()
        try:
            load_plan(Path(name))
        except PlanError as error:
            problems = error.problems
        assert [str(problem) for problem in problems if f"error: {problem}\n" not in page] == []

    def console(self, block: Block) -> None:
        for command, shown in commands(block):
            how = treatment(command)
            if how == RUN:
                self.run(command, shown)
            elif how == PARSED:
                parse(shlex.split(command, comments=True))
            elif how == "a step of .ci/run":
                assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()

    def run(self, command: str, shown: str) -> None:
        self.patch.setattr("sys.argv", shlex.split(command, comments=True))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        out, err = self.capture.readouterr()
        assert code == (1 if "error: " in shown else 0), err
        if shown:
            assert "\n".join(line.rstrip() for line in (out + err).splitlines()) == shown

    def diff(self, block: Block) -> None:
        self.script = patched(self.script, block.text)
        compile(self.script, SCRIPT.name, "exec")


KINDS = {
    "python": Place.python,
    "text": Place.text,
    "yaml": Place.plan,
    "toml": Place.plan,
    "json": Place.plan,
    "console": Place.console,
    "diff": Place.diff,
}


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a console block with what stands below it; ``a && b`` are two."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        *before, last = line.split(" && ")
        yield from ((command, "") for command in before)
        yield last, shown.rstrip()


def treatment(command: str) -> str:
    """What is done with a command: the first of ``COMMANDS`` that it matches as a whole, its comment aside."""
    command = re.sub(r"\s+# .*$", "", command)
    how = next((how for pattern, how in COMMANDS.items() if re.fullmatch(pattern, command)), None)
    assert how is not None, f"{command!r}: neither run nor exempt"
    return how


def parse(words: list[str]) -> None:
    """Let the command line take a command without doing it."""
    words = words[words.index("freezeplan") + 1 :]
    group = typer.main.get_command(cli.app)
    with group.make_context("freezeplan", words) as context:
        name, command, rest = group.resolve_command(context, words)
        command.make_context(name, rest, parent=context)


def patched(script: str, diff: str) -> str:
    """Apply a patch without line numbers; the lines that it leaves or takes away stand in the script, and once."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert not lines or script.count(old) == 1, f"found {script.count(old)} times:\n{old}"
        script = script.replace(old, new) if lines else script
    return script


def given(page: str) -> dict[str, Any]:
    """The names that a page takes for granted: data, and in the README what its fragments speak of."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    names = {"train_set": data, "val_set": data, "detection_loader": [([torch.rand(3, 64, 64)], [target])]}
    if page == "README.md":
        fragments = {"timm": timm, "torch": torch, "apply_plan": freezeplan.apply_plan, "DataLoader": DataLoader}
        names |= {**fragments, "criterion": torch.nn.CrossEntropyLoss()}
        names["model"] = timm.create_model("test_resnet", num_classes=10)
        names["applied"] = freezeplan.apply_plan(names["model"], "linear_probe", lr=0.1)
    return {**names, "__name__": "page"}


@pytest.fixture
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    page = key(request.param)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, text in FILES.get(page, {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    return Place(capsys, monkeypatch, page)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("error::freezeplan.errors.FreezePlanWarning")
@pytest.mark.parametrize(
    ("place", "page"),
    [
        pytest.param(page, page, id=key(page), marks=pytest.mark.slow if key(page) in SLOW else ())
        for page in PAGES
        if blocks(page)
    ],
    indirect=["place"],
)
def test_the_blocks_of_a_page_do_what_they_say(place: Place, page: Path) -> None:
    """From top to bottom. On a trainer's page a plan is on the model in the end."""
    for block in blocks(page):
        place.follow(block)

    if page.parent.name == "trainers":
        names = place.names
        live = names.get("applied") or next(
            found for module in names["trainer"].model.modules() if (found := freezeplan.applied(module)) is not None
        )
        assert freezeplan.applied(live.model) is live
        assert live.phase in ("", "all", "top", "head")


def test_every_stand_in_and_every_treatment_is_of_use() -> None:
    """An exemption that exempts nothing is gone."""
    every = [block for page in PAGES for block in blocks(page)]
    said = [command for block in every if block.kind == "console" for command, _ in commands(block)]

    assert {treatment(command) for command in said} == set(COMMANDS.values())
    assert [old for old in SMALL if not any(old in block.text for block in every)] == []


def test_no_block_is_overlooked() -> None:
    """Whatever begins a fence, of backticks or tildes, is one that is read here."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:>\s*)?(?:```|~~~)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)

        assert len(fences) == 2 * len(blocks(page)), key(page)


def test_six_trainers_have_six_pages_with_code() -> None:
    trainers = {page.stem: [block.kind for block in blocks(page)] for page in PAGES if page.parent.name == "trainers"}

    assert sorted(trainers) == ["accelerate", "huggingface", "lightning", "plain", "timm", "torchvision"]
    assert all("python" in kinds for kinds in trainers.values())


CAUGHT = [
    pytest.param("python", "assert 1 == 2, 'no'\n", "no", id="python"),
    pytest.param("text", "something\n", "'something.n'", id="what-was-printed"),
    pytest.param("yaml", "version: 1\nrules: []\n", "at least one rule", id="an-error-that-is-not-shown"),
    pytest.param("console", "$ freezeplan check full\nno\n", "a valid plan", id="what-a-command-prints"),
    pytest.param("console", "$ freezeplan check no_plan\n", "no preset is called 'no_plan'", id="a-command-that-fails"),
    pytest.param("console", "$ freezeplan run x --nonsense\n", "nonsense", id="an-option-that-is-not"),
    pytest.param("console", "$ make coffee\n", "neither run nor exempt", id="a-command-of-no-treatment"),
    pytest.param("diff", " no such line\n+pass\n", "found 0 times", id="a-patch-that-does-not-fit"),
    pytest.param("", "nothing\n", "nothing runs a block of kind ''", id="a-block-of-no-kind"),
]


@pytest.mark.parametrize("place", [ROOT / "docs/index.md"], indirect=True)
@pytest.mark.parametrize(("kind", "text", "message"), CAUGHT)
def test_a_block_that_is_wrong_is_caught(
    place: Place, kind: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks above can fail."""
    monkeypatch.setattr(f"{__name__}.ROOT", Path.cwd())
    page = Path("page.md").absolute()
    page.write_text(f"# A page\n\n```{kind}\n{text}```\n", encoding="utf-8")
    (block,) = blocks(page)

    with pytest.raises(Exception, match=message):
        place.follow(block)


PLAN = """
version: 1
phases:
  - {name: head, until: UNTIL, rules: [{role: body, frozen: true}]}
  - {name: all}
rules:
  - {role: head, lr_mult: 1}
  - {match: .*, lr_mult: 0.1}
"""


@pytest.mark.parametrize(
    ("until", "scores"),
    [("2", (0, 0, 0, 0)), ("50%", (0, 0, 0, 0)), ("{metric: top1, patience: 1, goal: max}", (0.5, 0.5, 0.6, 0.7))],
)
def test_timms_script_with_the_lines_of_its_page(
    until: str, scores: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--lr and --weight-decay hold, --layer-decay does nothing, the body thaws after two epochs, the state is saved."""
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(PLAN.replace("UNTIL", until))
    script = SCRIPT.read_text(encoding="utf-8")
    for block in blocks(ROOT / "docs/trainers/timm.md"):
        if block.kind == "diff":
            script = patched(script, block.text)
    names: dict[str, Any] = {"__name__": "train"}
    exec(compile(script, SCRIPT.name, "exec"), names)
    args = Namespace(
        opt="sgd", lr=0.1, weight_decay=0.05, momentum=0.9, layer_decay=0.5, opt_kwargs={}, model="test_resnet",
        num_classes=10, output="output", start_epoch=0, scores=scores, eval_metric="top1",
        sched="cosine", epochs=4, warmup_epochs=0, cooldown_epochs=0, min_lr=0.0, sched_on_updates=False,
    )  # fmt: skip
    loader = DataLoader(given("")["train_set"], batch_size=8)

    model, optimizer, seen = names["main"](args, loader)

    assert [(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.05), (0.1, 0.0), (1.0, 0.05), (1.0, 0.0),
    ]  # fmt: skip
    assert all(group["initial_lr"] == 0.1 for group in optimizer.param_groups)
    assert [sum(flags) for flags in seen] == [2, 2, 47, 47]
    assert [path.name for path in Path("output").iterdir()] == ["plan.pt"]
    again = timm.create_model("test_resnet", num_classes=10)
    live = freezeplan.apply_plan(again, "plan.yaml", scheduler="timm", epochs=4)
    live.load_state_dict(torch.load("output/plan.pt"))
    assert (live.phase, freezeplan.applied(model).phase) == ("all", "all")
