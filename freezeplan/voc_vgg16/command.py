"""``freezeplan run voc_vgg16``: options to a finished run, with every default stated and printed."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from rich.console import Console

from freezeplan.errors import FreezePlanError, MissingExtraError
from freezeplan.model.image_config import image_config
from freezeplan.model.source import is_function, load_model
from freezeplan.report import terminal
from freezeplan.training.checkpoint import FOLDER, check_same_run, open_checkpoints
from freezeplan.training.optimizers import CONSTANTS
from freezeplan.training.pixels import MEAN, STD, normalisation
from freezeplan.training.processes import beside, join
from freezeplan.training.settings import Amp, Augment, Flatten, LabelRule, Normalise, OptimizerName, Resize, Settings
from freezeplan.training.voc import read_voc
from freezeplan.training.weights import weights_title
from freezeplan.voc_vgg16.arms import ARMS, load_arms, run
from freezeplan.voc_vgg16.download import VOC2012, check_counts, default_folder, lists_of, looks_like
from freezeplan.voc_vgg16.download import download as fetch
from freezeplan.voc_vgg16.report import NAME, gallery, read_results, to_html, write_report
from freezeplan.voc_vgg16.results import FILES, check_free, finished, ran_with, summarise, write_results
from freezeplan.voc_vgg16.sample import BATCH_SIZE, EPOCHS, weights_path, write_sample
from freezeplan.voc_vgg16.screen import Screen, download_bar, print_results, print_settings
from freezeplan.voc_vgg16.statistics import merge
from freezeplan.voc_vgg16.weights import LECTURE, SAMPLE_MODEL, default_image_size

MODEL = "vgg16"
RUNS = Path("runs")
_NOT_DECISIVE = ("workers", "skip_bad", "cache_dir", "cache_limit")
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def default_settings(model: str, *, sample: bool) -> Settings:
    """Return what a run takes where it is told nothing else; ``voc_vgg16`` gives the reasons.

    Examples:
        >>> settings = default_settings("vgg16", sample=False)
        >>> settings.epochs, settings.batch_size, settings.image_size, settings.optimizer
        (20, 32, 224, 'rmsprop-tf1')
        >>> default_settings("resnet18", sample=False).optimizer
        'rmsprop'
    """
    return Settings(
        epochs=EPOCHS if sample else 20,
        batch_size=BATCH_SIZE if sample else 32,
        image_size=default_image_size(model),
        optimizer="rmsprop-tf1" if model in LECTURE else "rmsprop",
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=1 if sample else max(1, _cores() // beside()),
        workers=max(1, _cores() // beside()),
    )


def voc_vgg16(
    *,
    data: Path | None = None,
    download: bool = False,
    url: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    arm: Sequence[str] | None = None,
    plan: Sequence[str | Path] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    lr: float | None = None,
    optimizer: OptimizerName | None = None,
    clip: float | None = None,
    warmup: int | None = None,
    seed: Sequence[int] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int | None = None,
    threads: int | None = None,
    label: LabelRule | None = None,
    augment: Augment | None = None,
    normalise: Normalise | None = None,
    flatten: Flatten | None = None,
    resize: Resize | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    skip_bad: bool = False,
    cache: bool = True,
    cache_dir: Path | None = None,
    cache_limit: str | int | None = None,
    channels_last: bool = True,
    compile: bool = False,
    cuda_graph: bool = False,
    amp: Amp | None = None,
) -> Path:
    """Run the lecture's experiment: train the arms, print their errors beside the published ones, write the results.

    Settings and figures go to stdout, progress to stderr. Nothing is trained before the output folder, the arms, the
    data set's lists and annotations, the model and its weights have been checked.

    Under ``torchrun`` the processes share each batch and the work of computing features, on one machine or on several
    with a common folder for ``out``; the first one prints and writes.

    Args:
        data: A VOCdevkit folder, its VOC2012 folder, or a tar of either. None: the embedded sample.
        download: Download the official archive of PASCAL VOC 2012 (2 GB) to the folder ``data``, or to the user's cache
            folder; one that is there is taken, one that was cut is gone on with.
        url: A mirror for ``download``; the checksum is the official one.
        model: A timm model name. None: ``vgg16`` with the lecture's head; of the sample its slim version.
        weights: A safetensors file, a checkpoint, the lecture's ``vgg16.npy``, or ``random``.
            None: timm's pretrained weights; of the sample those that come with it.
        arm: Which of ``arms.ARMS``, in this order. None: all four, in the lecture's order.
        plan: Plan files or presets, each one more arm, called like the file.
        epochs: None: 20, which is a choice, as the lecture does not say; of the sample 25, its recipe's.
        batch_size: None: 32, which is a choice too; of the sample 16, its recipe's.
        image_size: Side in pixels. None: the size that the model was trained on (224 for ``vgg16``, as in the lecture).
        lr: None: 0.0005, the lecture's.
        optimizer: None: ``rmsprop-tf1``, as the lecture computed it, for VGG16; ``rmsprop`` for other models, which
            learn faster with it.
        clip: Largest norm of the gradient. None: no clipping, as in the lecture.
        warmup: Steps of linear warm-up. None: none, as in the lecture.
        seed: None: 0.
        device: ``auto`` takes CUDA where there is one.
        workers: Threads that decode images. None: one a core.
        threads: Threads inside torch. None: one for the sample, whose figures then are the same on every number of
            cores; otherwise one a core.
        label: Which class an image is trained on: that of its ``largest`` box or of its ``first`` object. None:
            ``largest``, which is a choice, as the lecture does not say. Errors are measured against both.
        augment: How training images change from epoch to epoch: ``flip`` mirrors one in two, ``crop-flip`` also shifts
            them by up to an eighth. None: ``none``, as the lecture mentions none. No features are kept of what changes.
        normalise: ``imagenet``, ``half`` (0.5 and 0.5) or ``bgr-mean`` (blue first, 0 to 255, less ImageNet's mean).
            None: ``weights``, as the weights were trained.
        flatten: ``hwc``: VGG16's pool5 pixel by pixel, as TensorFlow has it. None: ``chw``, as torch has it.
        resize: ``center-crop``: the square in the middle of an image. None: ``squash``, all of it.
        out: None: ``runs/voc_vgg16-DATE-TIME`` in the working directory.
        overwrite: Replace results that ``out`` holds.
        resume: Go on with the run that ``out`` holds unfinished, or begin it; on the CPU to the same bits. A finished
            one stays as it is.
        skip_bad: Leave out images that do not decode, and say how many.
        cache: Whether what is frozen ahead of everything trained is run once an image, in the user's cache folder, and
            its features are shared by arms, seeds and runs; the numbers are the same up to rounding.
        cache_dir: Another folder for them.
        cache_limit: Bytes that the folder may hold at most, such as ``20G``. None: what the disk has.
        channels_last: Whether numbers lie in memory pixel by pixel; convolutions are faster on it.
        compile: Whether ``torch.compile`` is used; it needs a C++ compiler and a minute.
        cuda_graph: Whether a step behind cached features is launched as one CUDA graph, where it gives a plain step's
            bits. Off until it has been measured.
        amp: ``bf16``: autocast, faster where the processor has it and less exact; ``fp16``: with a scaled loss, for
            GPUs without bfloat16. None: float32.

    Returns:
        The folder with ``results.json``, ``results.csv``, ``summary.csv``, ``curves.png`` and ``report.html``.

    Raises:
        FreezePlanError: One of its kinds for anything that was given and is missing, damaged or does not fit.
    """
    for package in ("matplotlib", "torchmetrics", "jinja2"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "run")
    plans = load_arms(arm or ARMS, plan or ())
    if resume and (out is None or overwrite):
        raise FreezePlanError(
            "--resume goes on with the run in --out, which has to be given, and overwrites nothing",
            notes=["freezeplan run voc_vgg16 --resume --out DIR"],
        )
    asked = {
        "data": None if data is None else str(data),
        "download": download,
        "weights": weights,
        "plans": [str(one) for one in plan or ()],
    }
    processes = join(cuda=device == "cuda" or (device == "auto" and torch.cuda.is_available()))
    out = processes.agreed(out or RUNS / time.strftime("voc_vgg16-%Y%m%d-%H%M%S"))
    stdout, stderr = (terminal.stdout(), terminal.stderr()) if processes.first else (Console(quiet=True),) * 2
    unfinished = (out / FOLDER).exists()
    done = processes.agreed(resume and not unfinished and finished(out) and (out / NAME).exists())
    if processes.first and not done:
        check_free(out, overwrite=overwrite or (resume and unfinished))
    if url and not download:
        notes = ["freezeplan run voc_vgg16 --download --url URL"]
        raise FreezePlanError("--url is a mirror for --download, which is not given", notes=notes)
    sample = data is None and not download
    model = model or (SAMPLE_MODEL if sample else MODEL)
    if is_function(model):  # the report is made of results.json, and runs nothing that a file names
        notes = ["freezeplan compare takes a model of your own"]
        raise FreezePlanError(f"--model: expected the name of a timm model, found {model!r}", notes=notes)
    if sample and model == SAMPLE_MODEL and weights is None:
        weights = str(weights_path())
    options: dict[str, Any] = {
        "epochs": _at_least(1, "--epochs", epochs),
        "batch_size": _at_least(1, "--batch-size", batch_size),
        "image_size": _at_least(1, "--image-size", image_size),
        "lr": _positive("--lr", lr),
        "optimizer": optimizer,
        "clip": _positive("--clip", clip),
        "warmup": _at_least(0, "--warmup", warmup),
        "label": label,
        "augment": augment,
        "normalise": normalise,
        "flatten": flatten,
        "resize": resize,
        "device": None if device == "auto" else _device(device),
        "threads": _at_least(1, "--threads", threads),
        "workers": _at_least(1, "--workers", workers),
        "skip_bad": skip_bad or None,
        "cache": None if cache else False,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "cache_limit": _bytes("--cache-limit", cache_limit),
        "channels_last": None if channels_last else False,
        "compile": compile or None,
        "cuda_graph": cuda_graph or None,
        "amp": amp,
    }
    given = {name: value for name, value in options.items() if value is not None}
    settings = replace(default_settings(model, sample=sample), **given)
    seeds = list(dict.fromkeys(seed or [0]))
    if flatten not in (None, Settings.flatten) and model not in LECTURE:
        notes = [f"it is the order of VGG16's pool5; leave it out, or --model {MODEL}"]
        raise FreezePlanError(f"--flatten: {model} flattens nothing", notes=notes)
    stated = fixed(model, weights, settings)
    facts = {
        "model": f"{model}; weights: {weights_title(model, weights)}{_digest(weights)}",
        "arms": ", ".join(plans),
        "seeds": ", ".join(map(str, seeds)),
    }
    if processes.count > 1:
        facts["processes"] = f"{processes.count}, each with its share of a batch"
    decisive = {name: value for name, value in asdict(settings).items() if name not in _NOT_DECISIVE}
    texts = {f"plan of {arm}": loaded.model_dump(mode="json", exclude_defaults=True) for arm, loaded in plans.items()}
    if download and done:  # the archive is known by its checksum; it is not fetched to be compared
        data_facts = _data_facts(VOC2012.name, VOC2012.images, VOC2012.classes)
        return _finished(out, {**data_facts, **facts, **decisive, **texts}, stdout)
    if download:
        with download_bar(stderr, VOC2012.name, VOC2012.size) as progress:
            data = fetch(VOC2012, data or default_folder(), url=url, progress=progress)
    with TemporaryDirectory() as temporary:
        with terminal.waiting("reading lists and annotations", stderr):
            voc = read_voc(write_sample(Path(temporary)), name="embedded sample") if data is None else read_voc(data)
        if download:
            check_counts(voc, VOC2012)
        elif looks_like(voc, VOC2012) and lists_of(voc) != VOC2012.images:
            stderr.print(
                f"{voc.files.path}: {len(voc.train):,} training and {len(voc.val):,} validation images; "
                f"all of VOC 2012 has {VOC2012.images[0]:,} and {VOC2012.images[1]:,}",
                soft_wrap=True,
            )
        facts = {**_data_facts(voc.name, lists_of(voc), voc.classes), **facts}
        about = {**facts, **decisive, **texts}
        if done:
            return _finished(out, about, stdout)
        with processes.in_turn():
            checkpoints = open_checkpoints(
                out, about, resume=resume or not processes.first, overwrite=overwrite,
                warn=lambda text: stderr.print(text, soft_wrap=True),
            )  # fmt: skip
        print_settings(stdout, facts, settings, stated, frozenset(given), sample=sample)
        with Screen(stderr, settings.epochs) as screen:
            outcome = run(
                voc, plans, settings, model=model, weights=weights, seeds=seeds, watch=screen, checkpoints=checkpoints,
                processes=processes,
            )  # fmt: skip
        if not processes.first:
            return out
        title = weights_title(model, weights)
        results = summarise(
            outcome, voc, settings, model=model, weights=title, sample=sample,
            asked={**asked, "processes": processes.count},
        )  # fmt: skip
        results["settings"] |= stated
        results["facts"] = about
        print_results(stdout, results)
        write_results(out, results)  # first of all: no mistake of the page may cost figures
        with terminal.waiting("drawing the page", stderr):
            page = to_html(results, gallery(results, voc.files.read))
        write_report(out / NAME, page)
    if outcome.skipped:
        bad = outcome.skipped
        count = "1 image does not decode and was" if len(bad) == 1 else f"{len(bad)} images do not decode and were"
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        stderr.print(f"{count} left out: {', '.join(bad[:5])}{more}", soft_wrap=True)
    checkpoints.remove()
    stdout.print(f"\nWritten to {out}: {', '.join((*FILES, NAME))}", soft_wrap=True)
    return out


def report(folders: Sequence[Path], *, out: Path, data: Path | None = None) -> dict[str, Any]:
    """Merge runs of one experiment, of other arms or seeds, and write their page.

    Args:
        folders: What ``voc_vgg16`` returned: folders with ``results.json``.
        out: The page, replaced if it is there.
        data: Where the images of the mistakes are; the embedded sample is drawn anew.

    Returns:
        What ``statistics.merge`` returned.

    Raises:
        DataError: If a folder holds no results or damaged ones, two are of different experiments or hold the same arm
            and seed.
        OutputError: If the page cannot be written.
        FreezePlanError: If there is ``data``, and the runs are of the embedded sample.
    """
    merged = merge([(str(folder), read_results(folder)) for folder in folders])
    with TemporaryDirectory() as temporary:
        if merged["data"]["sample"]:
            if data is not None:
                raise FreezePlanError("--data: the runs are of the embedded sample", notes=["leave out --data"])
            data = write_sample(Path(temporary))
        photos = gallery(merged, read_voc(data).files.read) if data is not None else None
    write_report(out, to_html(merged, photos))
    return merged


def fixed(model: str, weights: str | None, settings: Settings) -> dict[str, str]:
    """Return the choices that no option makes, in words; they are printed and written with the settings.

    Examples:
        >>> found = fixed("vgg16", "random", default_settings("vgg16", sample=False))
        >>> found["loss"], found["normalisation"]
        ('softmax cross-entropy', 'RGB, less 0.485, 0.456, 0.406, by 0.229, 0.224, 0.225')
    """
    config: Any = image_config(load_model(LECTURE.get(model, model), meta=True))
    if weights is not None and Path(weights).suffix == ".npy":
        config = {"mean": MEAN, "std": STD}
    pixels = str(normalisation(config, settings.normalise))
    if weights is not None and Path(weights).suffix == ".npy" and settings.normalise in ("weights", "bgr-mean"):
        pixels += "; the file's filters, made for BGR, are turned to RGB"
    he = "He-normal, zero biases" if model in LECTURE else "as timm's reset_classifier makes it"
    return {
        "loss": "softmax cross-entropy",
        "optimizer constants": CONSTANTS[settings.optimizer],
        "rate": "constant after the warm-up",
        "new head": f"{he}, the same in all arms of a seed",
        "normalisation": pixels,
        "order of images": "shuffled by the seed, the same in all arms",
    }


def _data_facts(name: str, images: tuple[int, int], classes: Sequence[str]) -> dict[str, str]:
    return {
        "data": f"{name}: {images[0]:,} training and {images[1]:,} validation images",
        "classes": f"{len(classes)}: {', '.join(classes)}",
    }


def _finished(out: Path, about: Mapping[str, Any], stdout: Console) -> Path:
    check_same_run(out, ran_with(out), about)
    stdout.print(f"{out}: finished already", soft_wrap=True)
    return out


def _digest(weights: str | None) -> str:
    """What tells one file of weights from another of its name; nothing where there is no file, or not yet an error."""
    if weights is None or not Path(weights).is_file():
        return ""
    with Path(weights).open("rb") as file:
        return f" (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"


def _bytes(option: str, value: str | int | None) -> int | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(value), re.IGNORECASE)
    if value is None:
        return None
    if not found or not float(found[1]):
        notes = ["in bytes, or with a unit: 500M, 20G"]
        raise FreezePlanError(f"{option} is a size above 0, found {str(value)!r}", notes=notes)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _cores() -> int:
    """Cores that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise FreezePlanError("--device cuda: torch finds no CUDA device", notes=["--device cpu or --device auto"])
    return name


def _at_least(least: int, option: str, value: int | None) -> int | None:
    if value is not None and value < least:
        raise FreezePlanError(f"{option} is a whole number of at least {least}, found {value}")
    return value


def _positive(option: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise FreezePlanError(f"{option} is a number above 0, found {value:g}")
    return value
