"""Image-text pairs from the layouts that contrastive training and its evaluation read.

- a LLaVA JSON file: the assistant's turns of the samples of the wanted kinds, with the folder of the images;
- a folder with ``metadata.jsonl`` (``file_name``, ``text``), at its top or in ``train/``: the ``imagefolder`` of
  Hugging Face datasets;
- a folder of WebDataset shards: tar files of ``KEY.png`` (or jpg, jpeg, webp) and ``KEY.txt``.

``instruct_gen export`` writes the latter two. A picture may have several texts. Pictures stay on the disk.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from medllava.conversation import read_llava, sample_from_llava
from medllava.errors import ConfigError, DataError
from medllava.geometry import strip_boxes
from medllava.images import load_image
from medllava.jsonl import file_sha256, read_rows

LISTINGS = ("metadata.jsonl", "train/metadata.jsonl")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}


@dataclass
class ImageText:
    """A picture with its texts. ``group``: the video or case it comes from, else itself; ``where``: its file, and its
    place in it (first byte, bytes) if that is a tar file."""

    name: str
    texts: list[str] = field(default_factory=list)
    group: str = ""
    where: tuple[Path, int, int] = (Path(), 0, -1)

    def load(self) -> Image.Image:
        """The picture. Raises DataError naming the file."""
        path, first, size = self.where
        if size < 0:
            return load_image(path)
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(size)
        try:
            return load_image(content)
        except DataError as error:
            raise DataError(f"{path}: {self.name}: {error}") from error


def read_image_texts(data: Path, images: Path | None = None, kinds: Sequence[str] = ("caption",)) -> list[ImageText]:
    """The pairs of ``data``. ``images``: folder that a LLaVA file's image names start from; ``kinds``: of its samples.

    Raises DataError or ConfigError: nothing there, an unreadable row, a picture that is missing.
    """
    if data.is_file():
        if images is None:
            raise ConfigError(f"{data}: image names in it start from a folder; name it with --images")
        pairs = _from_llava(data, images, kinds)
    elif listings := [path for name in LISTINGS if (path := data / name).is_file()]:
        pairs = _from_folder(listings[0])
    elif shards := sorted(data.glob("*.tar")):
        pairs = _from_shards(shards)
    else:
        raise DataError(
            f"{data}: no pairs; expected a LLaVA JSON file, a folder with metadata.jsonl, or one with .tar shards"
        )
    pairs = [pair for pair in pairs if pair.texts]
    if not pairs:
        raise DataError(f"{data}: holds no picture with a text")
    absent = [pair.where[0] for pair in pairs if pair.where[2] < 0 and not pair.where[0].is_file()]
    if absent:
        raise DataError(f"{absent[0]}: no such image file ({len(absent)} of {len(pairs)} images are missing)")
    return pairs


def read_classes(folder: Path) -> list[ImageText]:
    """The pictures of a folder of folders, each of which is a class and the one text of its pictures.

    Raises DataError if there are fewer than two classes."""
    pairs = [
        ImageText(f"{inner.name}/{path.name}", [inner.name], f"{inner.name}/{path.name}", (path, 0, -1))
        for inner in sorted(folder.iterdir() if folder.is_dir() else ()) if inner.is_dir()
        for path in sorted(inner.rglob("*")) if path.suffix.lower() in PICTURES
    ]
    classes = {pair.texts[0] for pair in pairs}
    if len(classes) < 2:
        raise DataError(f"{folder}: expected a folder for each class with its pictures; found {len(classes)} classes")
    return pairs


def data_sha256(data: Path) -> str:
    """Hash of a file, or of the names, sizes and listings of a folder of pairs (its pictures' bytes are not read)."""
    digest = hashlib.sha256()
    if data.is_file():
        return file_sha256(data)
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(data).as_posix()} {path.stat().st_size}\n".encode())
        if path.suffix in (".jsonl", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _from_llava(data: Path, images: Path, kinds: Sequence[str]) -> list[ImageText]:
    pairs: dict[str, ImageText] = {}
    found: set[str] = set()
    for number, row in enumerate(read_llava(data)):
        sample = sample_from_llava(row, f"{data}: row {number}")
        found.add(sample.kind)
        if sample.kind not in kinds or len(sample.images) != 1:
            continue
        name = sample.images[0]
        pair = pairs.setdefault(name, ImageText(name, [], sample.provenance.video or name, (images / name, 0, -1)))
        told = [strip_boxes(turn.text).strip() for turn in sample.turns if turn.role == "assistant"]
        pair.texts += [text for text in told if text]
    if not pairs:
        raise DataError(
            f"{data}: no sample of kind {', '.join(kinds)} with one picture; the file has: {', '.join(sorted(found))}"
        )
    return list(pairs.values())


def _from_folder(listing: Path) -> list[ImageText]:
    pairs: dict[str, ImageText] = {}
    for number, row in read_rows(listing):
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{listing}:{number}: expected 'file_name' and 'text'")
        group = str(row.get("video") or name)
        pair = pairs.setdefault(name, ImageText(name, [], group, (listing.parent / name, 0, -1)))
        if text.strip():
            pair.texts.append(text.strip())
    return list(pairs.values())


def _from_shards(shards: Sequence[Path]) -> list[ImageText]:
    pairs: dict[str, ImageText] = {}
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    path = PurePosixPath(member.name)
                    stem, _, ending = path.name.partition(".")
                    key = f"{shard.name}:{path.parent / stem}"
                    pair = pairs.setdefault(key, ImageText(key, [], key))
                    if f".{ending.lower()}" in PICTURES:
                        pair.where = (shard, member.offset_data, member.size)
                    elif ending in ("txt", "json"):
                        opened = archive.extractfile(member)
                        content = opened.read() if opened else b""
                        if ending == "txt":
                            pair.texts += [text] if (text := content.decode("utf-8").strip()) else []
                        elif video := _video(content):
                            pair.group = video
        except (tarfile.TarError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{shard}: not a whole WebDataset shard ({error})") from error
    return [pair for pair in pairs.values() if pair.where[2] >= 0]


def _video(content: bytes) -> str:
    try:
        about = json.loads(content)
    except ValueError:
        return ""
    return str(about.get("video") or "") if isinstance(about, dict) else ""
