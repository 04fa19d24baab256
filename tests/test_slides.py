"""Whole slides: sizes, fields and tiles where they belong, and clear words on files that are none."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medllava.errors import DataError, MissingExtraError
from medllava.geometry import Box, box_from_pixels
from medllava.slides import Slide, find_slides

RED = (200, 30, 40)


def extent(image: Image.Image, colour: tuple[int, int, int]) -> tuple[float, ...]:
    """The rectangle of a colour, in 0..1 of the image."""
    near = np.abs(np.asarray(image, int) - colour).max(axis=-1) < 40
    rows, columns = np.nonzero(near)
    height, width = near.shape
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


def test_a_slide_of_more_than_a_gigapixel(gigapixel: Any) -> None:
    slide = Slide(gigapixel.path)
    assert slide.size == (40_960, 32_768) and slide.size[0] * slide.size[1] > 1_000_000_000
    assert slide.mpp == pytest.approx(0.5)
    assert slide.power is None
    assert slide.levels[-1] == (640, 512)
    thumbnail = slide.thumbnail(200)
    assert thumbnail.size == (200, 160) and thumbnail.mode == "RGB"


@pytest.mark.parametrize("longest_side", [300, 1000, 2048])
@pytest.mark.parametrize(
    "view", [(0.0, 0.0, 1.0, 1.0), (0.15, 0.1, 0.55, 0.4), (0.1934, 0.1712, 0.3101, 0.2922), (0.19, 0.18, 0.205, 0.197)]
)
def test_a_field_shows_its_place(gigapixel: Any, view: tuple[float, ...], longest_side: int) -> None:
    """The red mark is where it must be, whatever the level, the shrinking and the bands it is read in."""
    x1, y1, x2, y2 = view
    field = Slide(gigapixel.path).field(Box(x1=x1, y1=y1, x2=x2, y2=y2), longest_side)
    assert max(field.image.size) <= longest_side
    assert np.allclose(field.box.as_tuple(), view, atol=1 / 32_768)
    mark = box_from_pixels(*gigapixel.marks[0][0], *gigapixel.size)
    assert mark is not None
    wide, high = field.box.x2 - field.box.x1, field.box.y2 - field.box.y1
    meant = np.clip(
        [(mark.x1 - field.box.x1) / wide, (mark.y1 - field.box.y1) / high, (mark.x2 - field.box.x1) / wide,
         (mark.y2 - field.box.y1) / high], 0, 1,
    )
    assert np.allclose(extent(field.image, RED), meant, atol=2.1 / min(field.image.size))
    assert field.mpp == pytest.approx(0.5 * (field.box.x2 - field.box.x1) * 40_960 / field.image.width, rel=0.02)


def test_bands_make_the_picture_of_one_piece(gigapixel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = Box(x1=0.18, y1=0.16, x2=0.24, y2=0.23)
    slide = Slide(gigapixel.path)
    monkeypatch.setattr("medllava.slides.BAND_PIXELS", 10**9)
    whole = np.asarray(slide.field(view, 700).image, int)
    monkeypatch.setattr("medllava.slides.BAND_PIXELS", 200_000)
    banded = np.asarray(slide.field(view, 700).image, int)
    assert np.abs(whole - banded).max() <= 1


def test_tiles_are_those_of_the_slide_and_are_kept(gigapixel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = Slide(gigapixel.path)
    assert slide.deepest == 16
    first = slide.tile(16, 40, 30)  # x 10160.., y 7620..: in the red mark
    with Image.open(io.BytesIO(first)) as tile:
        assert tile.size == (256, 256) and np.abs(np.asarray(tile, int) - RED).max() < 12
    assert slide.tile(16, 40, 30) is first
    for place in [(17, 0, 0), (-1, 0, 0), (16, 162, 0), (16, 0, -1)]:
        with pytest.raises(LookupError):
            slide.tile(*place)
    monkeypatch.setattr("medllava.slides.CACHED_TILES", 3)
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda n: slide.tile(16, n % 40, 5), range(80)))
    assert many[:40] == many[40:]
    assert len(slide._tiles) == 3


def test_levels_far_apart(make_slide: Callable[..., Any], tissue_tile: Image.Image, tmp_path: Path) -> None:
    made = make_slide(
        tmp_path / "far.tiff", tissue_tile, (16_384, 16_384), steps=(1, 128), marks=[((4096, 4096, 8192, 8192), RED)]
    )
    slide = Slide(made.path)
    with Image.open(io.BytesIO(slide.tile(slide.deepest - 5, 0, 0))) as tile:  # half of the slide at 32 pixels to one
        assert np.allclose(extent(tile, RED), (128 / 255, 128 / 255, 1, 1), atol=0.015)


def test_the_scale_of_a_scanner_and_never_its_label(
    make_slide: Callable[..., Any], tissue_tile: Image.Image, tmp_path: Path
) -> None:
    label = Image.new("RGB", (100, 100), (0, 255, 0))
    told = "Aperio Image Library v11.2.1\n5120x4096 |AppMag = 20|MPP = 0.4990"
    make_slide(tmp_path / "scan.svs", tissue_tile, (5120, 4096), steps=(1, 4), description=told, label=label)
    slide = Slide(tmp_path / "scan.svs")
    assert (slide.mpp, slide.power, slide.levels) == (0.499, 20, [(5120, 4096), (1280, 1024)])
    assert "label" in slide._handle.associated_images  # it is there, and nothing shows it
    tiles = [Image.open(io.BytesIO(slide.tile(level, 0, 0))) for level in range(slide.deepest + 1)]
    for picture in [slide.thumbnail(), *tiles]:
        pixels = np.asarray(picture, int)
        assert not np.any(pixels[..., 1] > pixels[..., 0] + 60)


def test_what_is_no_slide_is_one_line(
    make_slide: Callable[..., Any], tissue_tile: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.svs").write_text("no slide")
    with pytest.raises(DataError, match="notes.svs: no whole slide that OpenSlide can read"):
        Slide(tmp_path / "notes.svs")
    with pytest.raises(DataError, match="nowhere.svs: no such slide"):
        Slide(tmp_path / "nowhere.svs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no slide in this folder"):
        find_slides(tmp_path / "empty")
    with pytest.raises(DataError, match="no such slide or folder"):
        find_slides(tmp_path / "nowhere")

    make_slide(tmp_path / "flat.tiff", tissue_tile, (16_384, 8192), steps=(1,))
    with pytest.raises(DataError, match="cannot be shown as a whole; make a pyramid"):
        Slide(tmp_path / "flat.tiff")
    make_slide(tmp_path / "screen.tiff", tissue_tile, (1024, 1024), mpp=25_400 / 72, steps=(1,))
    slide = Slide(tmp_path / "screen.tiff")
    assert slide.mpp is None  # 72 per inch is no scale of a microscope

    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medllava\[wsi\]'"):
        Slide(tmp_path / "screen.tiff")


def test_a_damaged_place_does_not_spoil_the_rest(
    make_slide: Callable[..., Any], tissue_tile: Image.Image, tmp_path: Path
) -> None:
    made = make_slide(tmp_path / "torn.tiff", tissue_tile, (5120, 4096), steps=(1, 4), marks=[((0, 0, 256, 256), RED)])
    content = bytearray(made.path.read_bytes())
    red = io.BytesIO()
    Image.new("RGB", (256, 256), RED).save(red, "JPEG", quality=90)
    at = bytes(content).index(red.getvalue())
    content[at : at + 100] = b"\0" * 100
    made.path.write_bytes(content)
    slide = Slide(made.path)
    with pytest.raises(DataError, match="the slide is damaged at this place"):
        slide.tile(slide.deepest, 0, 0)
    assert slide.tile(slide.deepest, 5, 5)
