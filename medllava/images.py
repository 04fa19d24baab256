"""Images in and out: any file, bytes or data URI to an RGB picture, and pictures with boxes drawn on them.

The pixels a model sees are made in :mod:`medllava.model.pixels`, from what this module returns.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, TiffImagePlugin, UnidentifiedImageError

from medllava.errors import DataError, ImageTooLarge
from medllava.geometry import Box

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "AVIF", "JPEG2000", "PPM")
"""What is opened, by Pillow's names. It knows some thirty more, rare and little tested, which a stranger's file may
pose as; a PostScript file it would hand to Ghostscript, as a program to run."""
MAX_PIXELS = 100_000_000
"""Largest picture that is opened as a whole; beyond it, a whole slide should be read by region."""
MAX_SIDE = 1_000_000
"""Longest side: Pillow keeps an address for each row, which for very thin pictures is most of the memory."""

MAX_NOTES = 1_000
"""Pieces of EXIF data or comments in a picture that is given as bytes; Pillow copies all that came before for each."""

# Pillow's own warning comes before the limit above is looked at, and says less.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_read_tags = TiffImagePlugin.ImageFileDirectory_v2.load


def _read_bounded_tags(tags: TiffImagePlugin.ImageFileDirectory_v2, file: IO[bytes]) -> None:
    """Read a directory of tags, of a TIFF or in the EXIF data of any picture, if its values fit into the file. Each of
    65,535 tags may point to the same ten megabytes, and Pillow makes a copy for each."""
    start = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(start)
    count, entry = ("Q", "HHQ8x") if tags._bigtiff else ("H", "HHL4x")
    head = file.read(struct.calcsize(tags._endian + count))
    if len(head) == struct.calcsize(tags._endian + count):
        one = struct.Struct(tags._endian + entry)
        table = file.read(min(struct.unpack(tags._endian + count, head)[0], 65_536) * one.size)
        entries = one.iter_unpack(table[: len(table) // one.size * one.size])
        claimed = sum(number * tags._load_dispatch.get(kind, (0,))[0] for _, kind, number in entries)
        if claimed > 2 * size + 1_000_000:
            raise OSError("its tags claim more than the file holds")
    file.seek(start)
    _read_tags(tags, file)


# Pillow reads EXIF while it opens a JPEG or AVIF and has no limit to set, so there is no other place to look first.
TiffImagePlugin.ImageFileDirectory_v2.load = _read_bounded_tags  # type: ignore[assignment, method-assign]

BOX_COLOURS = ("#e6194b", "#0082c8", "#f58231", "#3cb44b", "#911eb4", "#46f0f0", "#f032e6", "#808000")


def load_image(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a file, encoded bytes or a ``data:image/...;base64,`` URI as RGB, upright (EXIF applied); transparency
    is dropped. Nothing is fetched from a network.

    Raises DataError that names the source and says why: missing, empty, not an image, truncated, or (ImageTooLarge)
    of too many pixels.
    """
    name = "image data" if isinstance(source, bytes) else str(source)
    if isinstance(source, str) and source.startswith("data:"):
        name, source = "image data URI", _decode_data_uri(source)
    if isinstance(source, bytes):
        stream: io.BytesIO | Path = io.BytesIO(source)
        size = len(source)
        if _notes(source) > MAX_NOTES:
            raise DataError(f"{name}: the image holds more than {MAX_NOTES:,} pieces of EXIF data or comments")
    else:
        stream = Path(source)
        if not stream.is_file():
            raise DataError(f"{name}: no such image file" if not stream.exists() else f"{name}: is not a file")
        size = stream.stat().st_size
    if size == 0:
        raise DataError(f"{name}: the image is empty (0 bytes)")
    try:
        with Image.open(stream, formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels or max(opened.size) > MAX_SIDE:
                raise ImageTooLarge(
                    f"{name}: {opened.width} x {opened.height} pixels is more than the limit of {max_pixels:,}"
                    f" ({MAX_SIDE:,} a side);"
                    " cut a region of interest out of it first"
                )
            opened.load()
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return _to_rgb(ImageOps.exif_transpose(opened) if turned else opened)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image in a known format (PNG, JPEG, TIFF, WebP, ...)") from error
    except Image.DecompressionBombError as error:
        # Pillow's own limit, whose words speak of an attack.
        raise ImageTooLarge(
            f"{name}: far more pixels than the limit of {max_pixels:,}; cut a region of interest out of it first"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # what decoders raise on damaged data is not only OSError: also RuntimeError, ...
        raise DataError(f"{name}: the image is damaged ({error})") from error


def to_data_uri(image: Image.Image, kind: str = "PNG", *, quality: int = 75) -> str:
    """The picture as a data URI, re-encoded from its pixels so that no metadata goes along. ``quality``: of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_boxes(image: Image.Image, boxes: Sequence[Box], labels: Sequence[str] = ()) -> Image.Image:
    """A copy of ``image`` with the boxes (0..1) outlined in distinct colours and, if given, labelled."""
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(max(image.size) / 200))
    for number, box in enumerate(boxes):
        colour = BOX_COLOURS[number % len(BOX_COLOURS)]
        x0, y0, x1, y1 = box.to_pixels(*image.size)
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
        if number < len(labels) and labels[number]:
            left, top, right, bottom = pen.textbbox((x0 + width, y0 + width), labels[number])
            pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=colour)
            pen.text((x0 + width, y0 + width), labels[number], fill="white")
    return drawn


def draw_heat(
    image: Image.Image, grid: Sequence[Sequence[float]], *, title: str = "", unit: str = "nats"
) -> Image.Image:
    """A copy of ``image`` under a heat map of ``grid`` (rows from the top), with a legend below it.

    The hottest cell is yellow and framed; cells of nothing or less leave the picture as it is. ``title``: first line of
    the legend; ``unit``: of the largest number, which the legend names.
    """
    most = max((value for row in grid for value in row), default=0.0)
    rows, columns = len(grid), len(grid[0])
    scale = 1 / most if most > 0 else 0.0
    levels = [round(255 * max(value * scale, 0.0)) for row in grid for value in row]
    small = Image.new("L", (columns, rows))
    small.putdata(levels)
    heat = small.resize(image.size, Image.Resampling.BICUBIC)
    drawn = image.convert("RGB")
    drawn = Image.composite(_coloured(heat), drawn, heat.point(lambda level: int(level * 0.65)))
    if most > 0:
        values = [value for row in grid for value in row]
        y, x = divmod(values.index(most), columns)
        hottest = Box(x1=x / columns, y1=y / rows, x2=(x + 1) / columns, y2=(y + 1) / rows)
        width = max(2, round(max(image.size) * 0.004))
        ImageDraw.Draw(drawn).rectangle(hottest.to_pixels(*image.size), outline="white", width=width)
    return _with_legend(drawn, title, f"{most:.2f} {unit}" if most > 0 else "no cell above 0")


def _coloured(levels: Image.Image) -> Image.Image:
    """Dark red, red, orange, yellow: brighter is more, for readers without colour too."""
    return Image.merge("RGB", [
        levels.point(lambda level: min(255, 90 + 2 * level)), levels.point(lambda level: max(0, 2 * level - 255)),
        levels.point(lambda level: 0),
    ])


def _with_legend(image: Image.Image, title: str, most: str) -> Image.Image:
    size = max(12, round(max(image.size) * 0.028))
    font = ImageFont.load_default(size)
    margin, line = size // 2, round(size * 1.4)
    height = 2 * margin + 2 * line
    pen = ImageDraw.Draw(image)
    ends = ("0", most)
    bar = max(4 * size, image.width // 4)
    needed = 4 * margin + bar + sum(round(pen.textlength(text, font)) for text in ends)
    width = max(image.width, needed, 2 * margin + round(pen.textlength(title, font)))
    whole = Image.new("RGB", (width, image.height + height), "white")
    whole.paste(image, (0, 0))
    pen = ImageDraw.Draw(whole)
    top = image.height + margin
    pen.text((margin, top), title, fill="black", font=font)
    pen.text((margin, top + line), ends[0], fill="black", font=font)
    left = 2 * margin + round(pen.textlength(ends[0], font))
    ramp = Image.linear_gradient("L").rotate(90).resize((bar, size))
    whole.paste(_coloured(ramp), (left, top + line))
    pen.text((left + bar + margin, top + line), ends[1], fill="black", font=font)
    return whole


def _decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise DataError("image data URI: expected 'data:image/png;base64,...'")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise DataError(f"image data URI: not base64 ({error})") from error


def _notes(data: bytes) -> int:
    """How many pieces of EXIF data a JPEG holds, or of comments a GIF before its first frame."""
    if data.startswith(b"\xff\xd8"):
        return data.count(b"Exif\0\0")
    if not data.startswith(b"GIF8") or len(data) < 13:
        return 0
    place = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 128 else 0)  # behind the colours
    notes = 0
    while place < len(data) and notes <= MAX_NOTES and data[place : place + 1] != b",":
        if data[place : place + 1] != b"!":  # junk, which Pillow passes over byte by byte
            place += 1
            notes += 1
            continue
        comment = data[place + 1 : place + 2] == b"\xfe"
        place += 2
        while place < len(data) and data[place]:
            place += 1 + data[place]
            notes += comment
        place += 1
    return notes


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # 16-bit microscopy TIFFs: scale the used range to 8 bits instead of clipping it to white.
        low, high = image.getextrema()
        span = float(high) - float(low) or 1.0  # type: ignore[arg-type]
        image = image.point(lambda value: (value - float(low)) * 255.0 / span).convert("L")  # type: ignore[arg-type]
    # Transparency is dropped, not laid on white: so did the code that the published weights were trained with.
    return image.convert("RGB")
