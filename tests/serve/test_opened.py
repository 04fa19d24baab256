"""Whole slides in the terminal: the field that a question is about, and where its answer lies on the slide."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medllava.errors import DataError, MedllavaError, MissingExtraError
from medllava.geometry import Box, Point
from medllava.images import load_image
from medllava.model.answerer import Answerer
from medllava.serve.cli import main
from medllava.serve.opened import Photograph, SlideView, open_file
from medllava.slides import Slide

BLUE = (20, 60, 180)
FIELD = "0.7,0.7,0.8,0.8"
"""Of the gigapixel slide, whose blue mark lies within."""


@pytest.fixture
def model(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Answerer, "load", classmethod(lambda cls, path, **options: scripted))
    return scripted


@pytest.fixture
def slide(gigapixel: Any) -> SlideView:
    opened = open_file(str(gigapixel.path))
    assert isinstance(opened, SlideView)
    return opened


def test_one_shot_on_a_slide(model: Any, gigapixel: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model-path", "m", "--image-file", str(gigapixel.path), "--prompt", "Where is the gland?"]
    assert main([*arguments, "--view", FIELD, "--json", "--save-boxes", str(tmp_path / "out.png")]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert answer["text"] == "A gland. [0.10, 0.20, 0.40, 0.60]"
    # Of the slide, as all coordinates in files are of the original.
    assert np.allclose(answer["boxes"], [[0.71, 0.72, 0.74, 0.76]], atol=1e-4)
    assert np.allclose(answer["field"]["box"], [0.7, 0.7, 0.8, 0.8], atol=1e-4)
    assert answer["field"]["mpp"] == pytest.approx(1.0, rel=0.01)
    assert "a slide of 40960 x 32768 pixels; answers concern [0.7, 0.7, 0.8, 0.8], at 1 µm per pixel" in told.err
    assert "(the model was trained at 0.5)" in told.err
    (image,) = model.asked[0][0]
    assert image.size == (2048, 1639)
    assert image.tobytes() == Slide(gigapixel.path).field(Box(x1=0.7, y1=0.7, x2=0.8, y2=0.8), 2048).image.tobytes()
    assert load_image(tmp_path / "out.png").size == image.size

    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "answers concern the whole, at 10 µm per pixel (the model was trained at 0.5)" in told.err
    assert "on the slide" not in told.err  # the same coordinates there
    assert model.asked[1][0][0].size == (2048, 1638)


def test_a_conversation_on_a_slide(
    model: Any, gigapixel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, page = tmp_path / "chat.json", tmp_path / "chat.md"
    monkeypatch.setattr("sys.stdin", io.StringIO(
        f"/image '{gigapixel.path}'\nWhere?\nSure?\n/view 0.7 0.7 0.8 0.8\nAnd here?\n/box 0.72 0.75 0.76 0.8\nThis?\n"
        f"/box 0.2 0.2 0.22 0.22\nThat?\n/box\nBack?\n/save {kept}\n/save {page}\n/view\nAll?\n"
        f"/look {tmp_path / 'h.png'}\n"
    ))
    assert main(["--model-path", "m"]) == 0
    turns = [turn.text for turn in model.asked[-1][1] if turn.role == "user"]
    assert turns == [
        "<image>\nWhere?", "Sure?", "<image>\nAnd here?", "This? Region: [0.20, 0.50, 0.60, 1.00]",
        # Out of view: it is shown with what is around.
        "<image>\nThat? Region: [0.17, 0.17, 0.83, 0.83]", "<image>\nBack?", "<image>\nAll?",
    ]
    sizes = [image.size for image in model.asked[-1][0]]
    assert sizes == [(2048, 1638), (2048, 1639), (1229, 984), (2048, 1639), (2048, 1638)]
    saved = json.loads(kept.read_text())
    assert saved["image_size"] == [40_960, 32_768]
    asked, said = saved["turns"][6], saved["turns"][7]
    assert asked["region"] == {"box": [0.72, 0.75, 0.76, 0.8]} and asked["field"] == [0.7, 0.7, 0.8, 0.8]
    assert np.allclose(said["boxes"], [[0.72, 0.75, 0.76, 0.8]], atol=1e-4)
    assert "field" not in saved["turns"][0]
    text = page.read_text()
    assert "Picture 1: 40960 x 32768 pixels" in text and "Region (box): `[0.72, 0.75, 0.76, 0.80]`" in text
    assert "`[0.71, 0.72, 0.74, 0.76]`" in text  # of the answer, on the slide
    assert "on the slide: [[0.71, 0.72, 0.74, 0.76]]" in capsys.readouterr().err
    assert (tmp_path / "h.png").is_file()


def test_the_models_scale(slide: SlideView) -> None:
    slide.for_model(2.0)
    assert slide.image.size == (2048, 1638)  # at 2 µm it would have 10,240
    slide.look_at(Box(x1=0.5, y1=0.5, x2=0.6, y2=0.6))
    assert slide.image.size == (1024, 819) and slide.mpp == pytest.approx(2.0, rel=0.01)
    assert "trained" not in slide.told()
    slide.look_at(Box(x1=0.5, y1=0.5, x2=0.501, y2=0.501))
    assert slide.image.size == (10, 8)


def test_what_is_marked_is_what_is_shown(slide: SlideView) -> None:
    mark = Box(x1=30_000 / 40_960, y1=25_000 / 32_768, x2=30_600 / 40_960, y2=25_500 / 32_768)
    inner = slide.aim(mark)
    assert inner == mark  # of the whole
    slide.look_at(Box(x1=0, y1=0, x2=0.3, y2=0.3))
    inner = slide.aim(mark)
    assert isinstance(inner, Box)
    x0, y0, x1, y1 = (round(side) for side in inner.to_pixels(*slide.image.size))
    marked = np.asarray(slide.image.crop((x0 + 2, y0 + 2, x1 - 2, y1 - 2)), int)
    assert np.abs(marked - BLUE).max() < 40
    before = slide.image
    assert slide.aim(mark) == inner and slide.image is before  # read once
    slide.look_at(Box(x1=0.5, y1=0.5, x2=0.6, y2=0.6))
    place = slide.aim(Point(x=0.55, y=0.525))
    assert isinstance(place, Point) and (place.x, place.y) == pytest.approx((0.5, 0.25), abs=1e-3)
    assert slide.frame.x1 == pytest.approx(0.5, abs=1e-4)


def test_photographs_stay_photographs(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((60, 40), 50).save(tmp_path / "plain.tiff")
    assert isinstance(open_file(str(tmp_path / "plain.tiff")), Photograph)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {tmp_path / 'plain.tiff'}\n/view 0 0 0.5 0.5\n"))
    with pytest.raises(MedllavaError, match="chosen on a whole slide"):
        main(["--model-path", "m"])
    monkeypatch.setattr("sys.stdin", io.StringIO("/view 0 0 0.5 0.5\n"))
    with pytest.raises(MedllavaError, match="open one with /image"):
        main(["--model-path", "m"])


def test_files_that_are_no_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.svs").write_bytes(b"II*\0" * 20)
    with pytest.raises(DataError, match=r"broken.svs: (no whole slide|the slide is damaged)"):
        open_file(str(tmp_path / "broken.svs"))
    with pytest.raises(DataError, match="nowhere.svs: no such image file"):
        open_file(str(tmp_path / "nowhere.svs"))

    def missing(path: Path) -> Slide:
        raise MissingExtraError("openslide", "wsi")

    monkeypatch.setattr("medllava.serve.opened.Slide", missing)
    with pytest.raises(MissingExtraError, match="wsi"):
        open_file(str(tmp_path / "broken.svs"))
    Image.new("RGB", (30, 20)).save(tmp_path / "plain.tif")
    assert open_file(str(tmp_path / "plain.tif")).size == (30, 20)


def test_boxes_are_drawn_on_the_picture_they_were_given_for(
    model: Any, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30), "pink").save(tmp_path / "other.png")
    saved = tmp_path / "boxes.png"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Where?\n/image {tmp_path / 'other.png'}\n/save {saved}\n"))
    assert main(["--model-path", "m", "--image-file", str(photograph)]) == 0
    assert load_image(saved).size == load_image(photograph).size


def test_a_look_in_piped_json(model: Any, photograph: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\n/look\n"))
    assert main(["--model-path", "m", "--image-file", str(photograph), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1]["looking"]["log_likelihood"] == -0.5
