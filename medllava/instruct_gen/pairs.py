"""Image-text pairs: a chunk's picture with all that was said of it, and its regions with what was said of each.

Two layouts that training code opens as they are: WebDataset shards (tar files of KEY.png, KEY.txt and KEY.json) and an
image folder with ``metadata.jsonl`` for Hugging Face ``datasets``. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from medllava.errors import DataError
from medllava.geometry import Box
from medllava.images import load_image
from medllava.instruct_gen.records import GroundedCaption, Phrase
from medllava.jsonl import write_records

Kind = Literal["png", "jpg"]

SMALLEST_CROP = 16
"""Regions with a side of fewer pixels than this are no image of their own."""


@dataclass(frozen=True)
class Pair:
    """An image's bytes with its text; ``key`` names it in the output, ``about`` says where it comes from."""

    key: str
    image: bytes
    text: str
    about: dict[str, Any]


def read_pairs(
    captions: Iterable[GroundedCaption], images: Path, *, crops: bool, least: float, kind: Kind
) -> Iterator[Pair]:
    """Pairs of each caption in order: the whole picture, then with ``crops`` each region that a phrase speaks of.

    ``least``: regions of less confidence are left out. Raises DataError naming a picture that cannot be read.
    """
    for caption in captions:
        picture = load_image(images / caption.image)
        key = _key(caption.id)
        about = _about(caption, caption.phrases) | {"part": "image", "box": [0.0, 0.0, 1.0, 1.0], "confidence": None}
        yield Pair(key, _encoded(picture, kind), " ".join(phrase.text for phrase in caption.phrases), about)
        if not crops:
            continue
        for number, phrase in enumerate(caption.phrases):
            region = cut_out(picture, phrase.box) if phrase.box and is_sure(phrase, least) else None
            if region is not None and phrase.box:
                about = _about(caption, (phrase,)) | {
                    "part": "region", "box": phrase.box.model_dump(), "confidence": phrase.confidence,
                }
                yield Pair(f"{key}-region{number:03d}", _encoded(region, kind), phrase.text, about)


def is_sure(phrase: Phrase, least: float) -> bool:
    """Is the phrase's box of at least this confidence? Boxes without one (``--grounding paper``) pass only 0."""
    return least <= 0 or (phrase.confidence is not None and phrase.confidence >= least)


def cut_out(picture: Image.Image, box: Box) -> Image.Image | None:
    """The part of ``picture`` that ``box`` touches; None if it is too small to show anything."""
    x0, y0, x1, y1 = box.to_pixels(*picture.size)
    corners = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    if min(corners[2] - corners[0], corners[3] - corners[1]) < SMALLEST_CROP:
        return None
    return picture.crop(corners)


def write_shards(pairs: Iterable[Pair], out: Path, size: int, kind: Kind) -> dict[str, int]:
    """Write WebDataset shards of ``size`` pairs to the folder ``out``. Returns the pairs in each shard."""
    counts: dict[str, int] = {}
    shard: tarfile.TarFile | None = None
    name = ""
    try:
        for number, pair in enumerate(pairs):
            if number % size == 0:
                if shard is not None:
                    shard.close()
                name = f"shard-{number // size:06d}.tar"
                counts[name] = 0
                shard = tarfile.open(out / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            assert shard is not None
            about = json.dumps(pair.about, ensure_ascii=False, sort_keys=True).encode()
            for ending, content in ((kind, pair.image), ("txt", pair.text.encode()), ("json", about)):
                # Owner, time and rights stay at their defaults, the same everywhere.
                entry = tarfile.TarInfo(f"{pair.key}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
            counts[name] += 1
    finally:
        if shard is not None:
            shard.close()
    return counts


def write_folder(pairs: Iterable[Pair], out: Path, kind: Kind) -> int:
    """Write an image folder for ``datasets.load_dataset("imagefolder", data_dir=out)``. Returns how many pairs."""
    (out / "train").mkdir()

    def rows() -> Iterator[dict[str, Any]]:
        for pair in pairs:
            name = f"{pair.key}.{kind}"
            (out / "train" / name).write_bytes(pair.image)
            # No column may be null in one part of the file and filled in another: its type is guessed part by part.
            yield {"file_name": name, "text": pair.text} | {k: v for k, v in pair.about.items() if k != "confidence"}

    return write_records(out / "train" / "metadata.jsonl", rows())


def _about(caption: GroundedCaption, phrases: tuple[Phrase, ...]) -> dict[str, Any]:
    return {
        "id": caption.id,
        "video": caption.video,
        "start_s": min(phrase.start_s for phrase in phrases),
        "end_s": max(phrase.end_s for phrase in phrases),
    }


def _key(identity: str) -> str:
    """``identity`` as a WebDataset key: no dots, no slashes, at most 60 characters, different for different ids."""
    plain = re.sub(r"[^\w-]+", "_", identity, flags=re.ASCII)
    if plain == identity and len(plain) <= 60:
        return plain
    return f"{plain[:50]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _encoded(picture: Image.Image, kind: Kind) -> bytes:
    """The pixels alone: a new picture carries no EXIF, no colour profile and no comment of its source."""
    bare = Image.frombytes("RGB", picture.size, picture.tobytes())
    buffer = io.BytesIO()
    try:
        if kind == "png":
            bare.save(buffer, "PNG", compress_level=1)
        else:
            bare.save(buffer, "JPEG", quality=95, subsampling=0)
    except OSError as error:
        raise DataError(f"a picture of {picture.size[0]} x {picture.size[1]} cannot be written as {kind}") from error
    return buffer.getvalue()
