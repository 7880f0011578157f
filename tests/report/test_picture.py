"""The picture of a plan: what its blocks are, and that it can be read."""

from __future__ import annotations

import itertools
import sys
from importlib.machinery import BuiltinImporter

import pytest

from freezeplan import resolve_plan
from freezeplan.errors import FreezePlanError, MissingExtraError, OutputError
from freezeplan.model.describer import create_model, describe
from freezeplan.report.picture import LIMIT, blocks, colour, draw, paint

NETS = [
    pytest.param("voc_vgg16/low_conv_lr", "vgg16", 16, ("features.0", "head.fc"), id="vgg16"),
    pytest.param("llrd", "vit_large_patch16_224", 29, ("cls_token", "head"), id="vit-of-24-blocks"),
    pytest.param("linear_probe", "resnet50", 19, ("conv1", "fc"), id="resnet50"),
    pytest.param("frozen_stages_2", "efficientnet_b0", 21, ("conv_stem", "classifier"), id="efficientnet"),
    pytest.param("gradual_unfreeze", "convnext_tiny", 27, ("stem.0", "head"), id="phases"),
    pytest.param("full", "resnet200", 7, ("conv1", "fc"), id="too-many-blocks-stay-folded"),
]


def made(plan, name):
    model = create_model(name, meta=True)
    return resolve_plan(plan, model), describe(model)


@pytest.mark.parametrize(("plan", "name", "count", "ends"), NETS)
def test_blocks_are_the_model_in_order(plan, name, count, ends):
    """Every parameter is in one block, the parts that a reader knows, and no more than can be read."""
    resolution, model = made(plan, name)
    for part in resolution.parts:
        found = blocks(part, model)

        assert sum(block.elements for block in found) == sum(row.elements for row in part.rows)
        assert (len(found), found[0].name.split(".")[0], found[-1].name.split(".")[0]) == (
            count,
            *(end.split(".")[0] for end in ends),
        )
        assert len(found) <= LIMIT
        assert all(sum(share for _, share in block.shares) == pytest.approx(1) for block in found)


def test_a_block_says_which_part_of_it_is_trained():
    """The biases of a block beside its frozen weights."""
    resolution, model = made("bitfit", "vit_base_patch16_224")
    block = next(block for block in blocks(resolution, model) if block.name == "blocks.0")

    assert [rate for rate, _ in block.shares] == [None, 1.0]
    assert block.shares[1][1] == pytest.approx(8448 / 7087872)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "name"), [net.values[:2] for net in NETS[:2]] + [("gradual_unfreeze", "test_convnext")]
)
def test_no_two_labels_overlap(plan, name):
    """Measured where the renderer puts them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = paint(*made(plan, name))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [
        text for axis in figure.axes for text in (*axis.texts, *axis.get_xticklabels(), axis.title, axis.xaxis.label)
    ]
    texts += [figure._suptitle, *figure.legends[0].get_texts()]
    places = [t.get_window_extent(canvas.get_renderer()) for t in texts if t.get_text() and t.get_visible()]

    assert len(places) > 20
    assert not [1 for one, other in itertools.combinations(places, 2) if one.overlaps(other)]


def test_frozen_and_full_rate_look_different():
    """Ice with hatching against fire, and a strip for each phase that changes something, up to the stem's."""
    figure = paint(*made("gradual_unfreeze", "test_convnext"))
    looks = {(patch.get_facecolor(), patch.get_hatch()) for axis in figure.axes for patch in axis.patches}

    assert len(figure.axes) == 6
    assert sorted(hatch or "" for _, hatch in looks) == ["", "////"]
    assert len({face for face, _ in looks}) == 2
    assert [colour(place) for place in (0, 0.5, 1)] == ["#fff1b8", "#f69634", "#b30f1a"]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "start"), [("plan.png", b"\x89PNG"), ("plan.SVG", b"<?xml")])
def test_a_picture_is_written_whole(file, start, tmp_path):
    """Under its own name only when it is done, the same bytes each time."""
    for _ in range(2):
        draw(*made("linear_probe", "test_resnet"), tmp_path / file)
        written = (tmp_path / file).read_bytes()

        assert written.startswith(start)
        assert [entry.name for entry in tmp_path.iterdir()] == [file]
    draw(*made("linear_probe", "test_resnet"), tmp_path / file)
    assert (tmp_path / file).read_bytes() == written


def test_an_svg_holds_its_words_as_text(tmp_path):
    """So that it can be searched and read aloud."""
    draw(*made("linear_probe", "test_resnet"), tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")

    assert ">linear_probe on test_resnet<" in text
    assert ">layer1.0<" in text


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    """Another suffix, a folder that is not there, matplotlib missing."""
    made_of = made("linear_probe", "test_resnet")
    with pytest.raises(FreezePlanError) as suffix:
        draw(*made_of, tmp_path / "plan.jpg")
    with pytest.raises(OutputError) as folder:
        draw(*made_of, tmp_path / "nowhere" / "plan.png")
    for name in ("matplotlib.figure", "matplotlib"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])
    with pytest.raises(MissingExtraError) as missing:
        draw(*made_of, tmp_path / "plan.png")

    assert str(suffix.value) == "a picture is a .png or a .svg, found 'plan.jpg'\n  --image plan.svg"
    assert str(folder.value) == f"there is no folder {str(tmp_path / 'nowhere')!r} for the picture"
    assert str(missing.value) == "this needs matplotlib, which is not installed\n  pip install 'freezeplan[run]'"
    assert list(tmp_path.iterdir()) == []
