"""Whole slides: .svs, .ndpi, pyramidal .tiff and what else OpenSlide reads, by tile and by field of view.

A slide is never opened as a whole. Places on it are 0..1 of the whole slide, as on a picture; the *field* is the part
that is looked at and sent to a model. Of a slide's pictures only the tissue is read: label and macro images, which
often show a patient's name, are not touched. OpenSlide comes with the extra ``wsi``.
"""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from medllava.errors import DataError, MissingExtraError, first_line
from medllava.geometry import Box, box_from_pixels

if TYPE_CHECKING:
    import openslide

SUFFIXES = {
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm", ".tif", ".tiff"
}
TILE_SIDE = 254
TILE_OVERLAP = 1
"""Deep-zoom tiles of 254 pixels and a border of one at each inner edge: 256 as they are read and sent."""
CACHED_TILES = 2000
"""Encoded tiles kept per slide, some 40 MB of JPEG."""
CACHE_BYTES = 64_000_000
"""OpenSlide's own cache of decoded tiles, per slide."""
MAX_SMALLEST = 100_000_000
"""Most pixels of the smallest level: a slide without a pyramid cannot be looked at as a whole."""
BAND_PIXELS = 4_000_000
"""A field is read and shrunk in bands of about this many pixels, so that it takes little memory at any zoom."""
AROUND = 1.5
"""A region that is not wholly in view is shown with this much around it, as a multiple of its sides."""
MPP_RANGE = (0.02, 50.0)
"""Micrometres per pixel that can be true. Pictures often carry a made-up resolution of 72 per inch, 353 µm a pixel."""

T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """A part of a slide as a picture. ``box``: where it lies, in 0..1 of the slide; ``mpp``: µm per pixel, if known."""

    image: Image.Image
    box: Box
    mpp: float | None


class Slide:
    """An open slide; its methods may be called from several threads. Raises DataError, MissingExtraError.

    ``size``: width and height in pixels of the finest level. ``mpp``: micrometres per pixel there, None if the file
    does not say. ``power``: magnification of the objective, None if not told. ``levels``: width and height of each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library, self._deepzoom = _openslide()
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._open()
        # A scanned area within the slide, where the scanner tells it: all around it is blank.
        self._origin = tuple(
            int(self._handle.properties.get(name, 0))
            for name in (self._library.PROPERTY_NAME_BOUNDS_X, self._library.PROPERTY_NAME_BOUNDS_Y)
        )
        self.size: tuple[int, int] = self._zoom.level_dimensions[-1]
        self.levels: list[tuple[int, int]] = list(self._handle.level_dimensions)
        self.mpp = self._number(self._library.PROPERTY_NAME_MPP_X, *MPP_RANGE)
        self.power = self._number(self._library.PROPERTY_NAME_OBJECTIVE_POWER, 0.5, 400)
        width, height = self.levels[-1]
        if width * height > MAX_SMALLEST:
            raise DataError(
                f"{path}: its smallest level has {width} x {height} pixels, so it cannot be shown as a whole; make a"
                " pyramid of it first, such as with: vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg"
            )

    @property
    def deepest(self) -> int:
        """Number of the finest deep-zoom level; level 0 is one pixel."""
        return int(self._zoom.level_count) - 1

    def tile(self, level: int, column: int, row: int) -> bytes:
        """A deep-zoom tile as JPEG. Raises LookupError if there is no such tile, DataError if it cannot be read."""
        key = level, column, row
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        counts = self._zoom.level_tiles
        if not (0 <= level < len(counts) and 0 <= column < counts[level][0] and 0 <= row < counts[level][1]):
            raise LookupError(f"no tile {column}, {row} at level {level}")
        encoded = _jpeg(self._read(lambda: self._tile(level, column, row)))
        with self._lock:
            self._tiles[key] = encoded
            while len(self._tiles) > CACHED_TILES:
                self._tiles.popitem(last=False)
        return encoded

    def thumbnail(self, longest_side: int = 256) -> Image.Image:
        """The whole slide as a small RGB picture. Raises DataError."""
        return self.field(Box(x1=0, y1=0, x2=1, y2=1), longest_side).image

    def field(self, view: Box, longest_side: int = 2048) -> Field:
        """The part ``view`` (0..1 of the slide) as RGB, shrunk to at most ``longest_side`` pixels and never enlarged.

        Read from the coarsest level that is fine enough. ``Field.box`` is the rectangle of whole pixels that was read.
        Raises DataError if the slide is damaged there.
        """
        x0, y0, x1, y1 = view.to_pixels(*self.size)
        left, top = min(math.floor(x0), self.size[0] - 1), min(math.floor(y0), self.size[1] - 1)
        width = max(min(math.ceil(x1), self.size[0]) - left, 1)
        height = max(min(math.ceil(y1), self.size[1]) - top, 1)
        shrink = max(max(width, height) / longest_side, 1.0)
        size = max(round(width / shrink), 1), max(round(height / shrink), 1)
        picture = self._read(lambda: self._shrunk(left, top, width, height, size, shrink))
        box = box_from_pixels(left, top, left + width, top + height, *self.size)
        assert box is not None, "a field holds at least one pixel"
        return Field(picture, box, self.mpp * shrink if self.mpp else None)

    # -- reading

    def _open(self) -> None:
        try:
            self._handle: openslide.OpenSlide = self._library.OpenSlide(str(self.path))
            self._handle.set_cache(self._library.OpenSlideCache(CACHE_BYTES))
            self._zoom = self._deepzoom(self._handle, TILE_SIDE, TILE_OVERLAP, limit_bounds=True)
        except self._library.OpenSlideUnsupportedFormatError as error:
            raise DataError(
                f"{self.path}: no whole slide that OpenSlide can read" if self.path.is_file()
                else f"{self.path}: no such slide"
            ) from error
        except (self._library.OpenSlideError, OSError, ValueError) as error:
            raise DataError(f"{self.path}: the slide is damaged ({first_line(error)})") from error

    def _number(self, name: str, least: float, most: float) -> float | None:
        try:
            value = float(self._handle.properties.get(name, "nan"))
        except ValueError:
            return None
        return value if least <= value <= most else None

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except self._library.OpenSlideError as error:
            # A handle that failed once fails for ever: the sound parts of the slide need a new one.
            with self._lock:
                self._open()
            raise DataError(f"{self.path}: the slide is damaged at this place ({first_line(error)})") from error

    def _tile(self, level: int, column: int, row: int) -> Image.Image:
        place, _, (width, height) = self._zoom.get_tile_coordinates(level, (column, row))
        if width * height <= BAND_PIXELS:
            tile: Image.Image = self._zoom.get_tile(level, (column, row))
            return tile
        # Between two levels far apart, a tile may be a hundred million pixels of the finer one.
        shrink = 2.0 ** (self.deepest - level)
        size = self._zoom.get_tile_dimensions(level, (column, row))
        left, top = place[0] - self._origin[0], place[1] - self._origin[1]
        wide, high = (round(side * shrink) for side in size)
        wide, high = min(wide, self.size[0] - left), min(high, self.size[1] - top)
        return self._shrunk(left, top, wide, high, size, shrink)

    def _shrunk(
        self, left: int, top: int, width: int, height: int, size: tuple[int, int], shrink: float
    ) -> Image.Image:
        """The rectangle of the finest level's pixels as a picture of ``size``, read band by band."""
        level = self._handle.get_best_level_for_downsample(shrink)
        step = self._handle.level_downsamples[level]
        wide, high = max(width / step, 1.0), max(height / step, 1.0)  # of this level, with fractions
        per_row = high / size[1]
        margin = math.ceil(3 * max(per_row, 1.0)) if size[1] > 1 else 0  # what the filter sees beyond a band
        rows = max(round(BAND_PIXELS / (math.ceil(wide) * per_row)), 1)
        whole = Image.new("RGB", size)
        for start in range(0, size[1], rows):
            end = min(start + rows, size[1])
            first = max(math.floor(start * per_row) - margin, 0)
            last = min(math.ceil(end * per_row) + margin, math.ceil(high))
            place = self._origin[0] + left, self._origin[1] + top + round(first * step)
            band = self._on_background(self._handle.read_region(place, level, (math.ceil(wide), last - first)))
            part = (0.0, start * per_row - first, wide, min(end * per_row - first, last - first))
            whole.paste(band.resize((size[0], end - start), Image.Resampling.LANCZOS, part), (0, start))
        return whole

    def _on_background(self, region: Image.Image) -> Image.Image:
        """Where the scanner saw nothing, a region is transparent: there the slide's own background colour."""
        colour = self._handle.properties.get(self._library.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        plain = Image.new("RGB", region.size, f"#{colour}")
        plain.paste(region, mask=region.getchannel("A"))
        return plain


def frame_of(marked: Box | None, view: Box) -> Box:
    """The part of a slide that a question shows: the view, or where the region is not within it, the region and what is
    around. All in 0..1 of the slide."""
    if marked is None or (
        view.x1 <= marked.x1 and view.y1 <= marked.y1 and marked.x2 <= view.x2 and marked.y2 <= view.y2
    ):
        return view
    dx, dy = (marked.x2 - marked.x1) * (AROUND - 1) / 2, (marked.y2 - marked.y1) * (AROUND - 1) / 2
    return Box(
        x1=max(marked.x1 - dx, 0), y1=max(marked.y1 - dy, 0), x2=min(marked.x2 + dx, 1), y2=min(marked.y2 + dy, 1)
    )


def find_slides(path: Path) -> list[Path]:
    """The slide files of a folder by name, or the one file. Raises DataError if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such slide or folder")
    found = [each for each in sorted(path.iterdir()) if each.is_file() and each.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"{path}: no slide in this folder ({', '.join(sorted(SUFFIXES))})")
    return found


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _openslide() -> tuple[Any, Any]:
    """The library and its deep-zoom generator, imported only when a slide is opened. Raises MissingExtraError."""
    try:
        import openslide
        from openslide.deepzoom import DeepZoomGenerator
    except (ImportError, OSError) as error:
        raise MissingExtraError("openslide", "wsi", error) from error
    return openslide, DeepZoomGenerator
