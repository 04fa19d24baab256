"""Rows of a data set as it lies on disk, whoever published it: original files and the layouts of Hugging Face.

A file: ``.json`` (a list, or lists by split, or by subset and split), ``.jsonl``, ``.csv``, ``.tsv``, ``.pkl``,
``.parquet``, ``.arrow``. A folder: what ``datasets.save_to_disk`` writes (arrow), parquet shards named by split, or an
image folder (``metadata.csv``, ``.jsonl`` or ``.parquet`` beside the pictures). A data set of the Hugging Face hub by
its id (``owner/name``): from the local cache, or downloaded; nothing else is fetched from a network.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import logging
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllava.errors import DataError, MissingExtraError, first_line
from medllava.jsonl import read_json, read_rows

log = logging.getLogger(__name__)

Row = dict[str, Any]
KINDS = ".json, .jsonl, .csv, .tsv, .pkl, .parquet, .arrow, or a folder in a Hugging Face layout"
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_IMAGE_SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp"}


@dataclass(frozen=True)
class Table:
    """``rows`` are (place for error messages, row) pairs; ``layout`` names what was found, for the report; ``folder``
    is where picture names start from."""

    layout: str
    rows: list[tuple[str, Row]]
    folder: Path


def read_table(path: Path, split: str | None = None) -> Table:
    """All rows of ``path``; where it holds several splits, those of ``split``.

    Raises DataError naming file and row where they cannot be read, or the splits there are.
    """
    path = _local(path)
    if path.is_dir():
        return _folder(path, split)
    if not path.exists():
        raise DataError(f"{path}: no such file; expected {KINDS}")
    suffix = path.suffix.lower()
    if suffix in {".json", ".jsonl"} or (suffix not in _FILES and _starts_with(path, ("[", "{"))):
        return _json(path, split)
    if suffix not in _FILES:
        raise DataError(f"{path}: unknown kind of file; expected {KINDS}")
    if suffix in {".csv", ".tsv"}:
        rows = [(f"{path}:{number}", row) for number, row in _csv(path, "\t" if suffix == ".tsv" else None)]
    else:
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(_READERS[suffix](path))]
    return Table(suffix.removeprefix("."), rows, path.parent)


def _local(path: Path) -> Path:
    """The cached folder of a hub id; anything else as it is. Only tables are downloaded: their rows hold the pictures,
    or the pictures are had by ``eval fetch``."""
    if path.exists() or path.suffix in _FILES or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": ["*.parquet", "*.jsonl", "*.json", "*.csv"]}
    try:
        return Path(snapshot_download(str(path), local_files_only=True, **wanted))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(str(path), **wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: no such file or folder, and no such data set to be had from the hub ({type(error).__name__}:"
            f" {first_line(error, 150)})"
        ) from error


def _starts_with(path: Path, signs: tuple[str, ...]) -> bool:
    with path.open("rb") as file:
        return _start(file.read(200)).startswith(tuple(sign.encode() for sign in signs))


def _start(content: bytes) -> bytes:
    """What a file begins with, after the mark that Windows programs put first."""
    return content.removeprefix(codecs.BOM_UTF8).lstrip()


def _json(path: Path, split: str | None) -> Table:
    with path.open("rb") as file:
        start = _start(file.read(1000))
    if not start:
        raise DataError(f"{path}: holds no questions (the file is empty)")
    if path.suffix.lower() == ".jsonl" or (start.startswith(b"{") and b'"' in start and _is_lines(path)):
        if start.startswith(b"["):  # Named .jsonl, but one JSON list.
            return Table("json", _listed(read_json(path), str(path)), path.parent)
        tell_half_line(path)
        return Table("jsonl", [(f"{path}:{number}", row) for number, row in read_rows(path)], path.parent)
    value = read_json(path)
    if isinstance(value, list):
        return Table("json", _listed(value, str(path)), path.parent)
    rows: list[tuple[str, Row]] = []
    parts = value if all(isinstance(part, dict) for part in value.values()) else {"": value}
    for subset, splits in parts.items():
        if not splits or not all(isinstance(part, list) for part in splits.values()):
            raise DataError(f"{path}: expected a list of questions, or lists by split, or by subset and split")
        part = splits[_split_of(list(splits), split, path)] if len(splits) > 1 or split in splits else next(
            iter(splits.values())
        )
        where = f"{path}: {subset}" if subset else str(path)
        rows += [(place, {**row, "subset": subset} if subset else row) for place, row in _listed(part, where)]
    return Table("json", rows, path.parent)


def _is_lines(path: Path) -> bool:
    """Whether the file's first line is a whole JSON object: JSON Lines under another name."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip().endswith("}")


def tell_half_line(path: Path) -> None:
    """A last line that a killed writer left half is skipped, but not in silence. Raises DataError if there is no such
    file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read(1) in {b"", b"\n"}:
                return
            file.seek(0)
            lines = file.read().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        json.loads(lines[-1].strip() or b"0")
    except ValueError:
        log.warning("%s:%d: the last line is half written and was left out", path, len(lines))


def _listed(value: list[Any], where: str) -> list[tuple[str, Row]]:
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise DataError(f"{where}: row {number}: expected an object, got {type(row).__name__}")
    return [(f"{where}: row {number}", row) for number, row in enumerate(value)]


def _split_of(names: list[str], split: str | None, path: Path) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    asked = f"no split {split!r}" if split else "several splits"
    raise DataError(f"{path}: {asked}; choose with --split one of: {', '.join(sorted(names))}")


# ----------------------------------------------------------------------------------------- folders of Hugging Face


def _folder(path: Path, split: str | None) -> Table:
    if (path / "dataset_dict.json").is_file():
        names = [part.name for part in path.iterdir() if part.is_dir()]
        return _folder(path / _split_of(names, split, path), None)
    arrow = sorted(path.glob("*.arrow"))
    if arrow:
        return Table("arrow", _joined(arrow, _arrow), path)
    for folder in (path, *([path / split] if split else [])):
        for name in _METADATA:
            if (folder / name).is_file():
                return _image_folder(folder / name, path)
    shards = sorted(path.rglob("*.parquet"))
    if shards:
        by_split: dict[str, list[Path]] = {}
        for shard in shards:
            name = re.sub(r"[-_.]?\d+(-of-\d+)?([-_][0-9a-f]{8,})?$", "", shard.stem) or shard.parent.name
            by_split.setdefault(name, []).append(shard)
        return Table("parquet", _joined(by_split[_split_of(list(by_split), split, path)], _parquet), path)
    raise DataError(f"{path}: no *.arrow, *.parquet or metadata.csv/.jsonl in it; expected {KINDS}")


def _joined(files: list[Path], read: Any) -> list[tuple[str, Row]]:
    return [(f"{file}: row {number}", row) for file in files for number, row in enumerate(read(file))]


def _image_folder(metadata: Path, root: Path) -> Table:
    table = read_table(metadata)
    rows = []
    for place, row in table.rows:
        name = row.get("file_name")
        if name is None:
            raise DataError(f"{place}: metadata of an image folder needs 'file_name'")
        image = (metadata.parent / str(name)).relative_to(root).as_posix()
        rows.append((place, {**{key: value for key, value in row.items() if key != "file_name"}, "image": image}))
    return Table("imagefolder", rows, root)


# ------------------------------------------------------------------------------------------------------- kinds of file


def _csv(path: Path, delimiter: str | None = None) -> Iterator[tuple[int, Row]]:
    """(line that it ends in, row) of a table whose header tells what separates columns, unless it is given: comma,
    semicolon (as Excel writes it in much of Europe) or tab. Empty rows are left out."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content.startswith(codecs.BOM_UTF16_LE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    if delimiter is None:
        header = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
        delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in reader:
        if None in row or None in row.values():
            count = len(reader.fieldnames or [])
            raise DataError(f"{path}:{reader.line_num}: not as many fields as the header's {count}")
        if any(row.values()):
            yield reader.line_num, dict(row)


def _pickle(path: Path) -> Iterable[Row]:
    """The question lists of the original PathVQA. Refuses a pickle that holds anything but plain values."""

    class Plain(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise DataError(f"{path}: the pickle holds {module}.{name}; only lists of plain values are read")

    try:
        with path.open("rb") as file:
            value = Plain(file).load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise DataError(f"{path}: not a pickle ({error})") from error
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path}: expected a list of questions")
    return value


def _parquet(path: Path) -> Iterator[Row]:
    arrow = _pyarrow()
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error


def _arrow(path: Path) -> Iterator[Row]:
    arrow = _pyarrow()
    try:
        with arrow.memory_map(str(path)) as source:
            try:
                reader = arrow.ipc.open_stream(source)
            except arrow.ArrowInvalid:
                reader = arrow.ipc.open_file(source)
                reader = (reader.get_batch(number) for number in range(reader.num_record_batches))
            for batch in reader:
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not an arrow file ({error})") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval", error) from error
    return pyarrow


_FILES = (".json", ".jsonl", ".csv", ".tsv", ".pkl", ".parquet", ".arrow")
_READERS: dict[str, Any] = {".pkl": _pickle, ".parquet": _parquet, ".arrow": _arrow}


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_name(value: Any, pictures: Path | None, where: str) -> str | None:
    """The name of a row's picture. One held in the row itself (``{"bytes", "path"}``) is named by its content, so that
    questions about one picture are one group, and written to ``pictures`` if that is given."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    content = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if content is None:
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return str(value["path"])
        raise DataError(f"{where}: the picture is neither a file name nor bytes")
    name = hashlib.sha256(content).hexdigest()[:20] + _suffix(content)
    if pictures is not None and not (pictures / name).is_file():
        from medllava.jsonl import atomic_write

        with atomic_write(pictures / name, "wb") as file:
            file.write(content)
    return name


def _suffix(content: bytes) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return _IMAGE_SUFFIX.get(image.format or "", ".img")
    except (UnidentifiedImageError, OSError):
        return ".img"
