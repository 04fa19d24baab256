"""Labelled pictures of published data sets as they lie on disk, by definitions in ``eval/benchmarks/encoder``.

Classes are folders (anywhere below, for ``test: "**"``), rows of a table, or numbers in an HDF5 file.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from medllava.config import Recipe, load_recipe
from medllava.errors import ConfigError, DataError, MissingExtraError
from medllava.eval.benchmarks import find_file
from medllava.eval.pictures import SUFFIXES
from medllava.model.image_text import ImageText

if TYPE_CHECKING:
    from PIL import Image


class LabelTable(Recipe):
    """A CSV or XLSX file (``{split}`` in its name) with a row per picture. Without ``label``, each class has a column
    of 0 or 1."""

    file: str
    images: str = "."
    name: str
    label: str | None = None
    split: str | None = None


class EncoderSet(Recipe):
    """What is where, below the folder that is given. ``classes``: folder, label or number -> its names in sentences,
    all folders if empty. ``share``: of a set without a split, the part that is held out for testing, by name; beside
    ``train``, for data that has neither its folder nor that of ``test``."""

    name: str
    about: str = ""
    source: str = ""
    licence: str = ""
    classes: dict[str, list[str]] = {}
    templates: list[str] | None = None
    train: str | None = None
    test: str
    share: float | None = Field(default=None, gt=0, lt=1)
    table: LabelTable | None = None
    arrays: str | None = None
    group_pattern: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> EncoderSet:
        if self.train is None and self.share is None:
            raise ValueError("give 'train', or 'share' where there is no split")
        if self.table and not self.classes:
            raise ValueError("a table needs 'classes'")
        return self


@dataclass(frozen=True)
class Labelled:
    """Pictures to learn from and to test on, each with its class as its one text; ``layout``: what was read."""

    train: list[ImageText]
    test: list[ImageText]
    layout: str


@dataclass
class _InArray(ImageText):
    """A picture that is a row of an open HDF5 data set."""

    array: Any = None
    row: int = field(default=0)

    def load(self) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self.array[self.row])


def load_set(name: str) -> EncoderSet:
    """A definition by path, or by name in ``eval/benchmarks/encoder``. Raises ConfigError."""
    return load_recipe(find_file(name, "benchmarks/encoder", ".yaml"), EncoderSet)


def read_set(definition: EncoderSet, root: Path, pattern: str | None = None) -> Labelled:
    """The set below ``root``. Where there is no split whole cases are held out, by ``pattern`` as in :func:`groups_of`.

    Raises DataError where files or classes are missing.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {definition.name} is had from {definition.source or 'you'}")
    split_there = definition.train and any((root / each).is_dir() for each in (definition.train, definition.test))
    if definition.share is not None and not split_there:
        every = list(_folders(definition, root, "**" if definition.train else definition.test))
        _all_there(definition, every, root)
        return _held_out(every, definition.share, pattern or definition.group_pattern, root)
    parts, layout = [], ""
    for split in (definition.train, definition.test):
        assert split is not None
        if definition.table:
            pairs, layout = list(_rows(definition, definition.table, root, split)), "table"
        elif definition.arrays and not (root / split).is_dir():
            pairs, layout = list(_array(definition.arrays, root, split)), "HDF5"
        else:
            pairs, layout = list(_folders(definition, root, split)), "folders"
        _all_there(definition, pairs, root / split)
        parts.append(pairs)
    return Labelled(parts[0], parts[1], layout)


def _held_out(every: Sequence[ImageText], share: float, pattern: str | None, root: Path) -> Labelled:
    drawn = [_drawn(case) for case in groups_of(every, pattern)]
    learnt = [pair for pair, place in zip(every, drawn, strict=True) if place >= share]
    held = [pair for pair, place in zip(every, drawn, strict=True) if place < share]
    for part, purpose in ((learnt, "to learn from"), (held, "to test on")):
        if lost := {pair.texts[0] for pair in every} - {pair.texts[0] for pair in part}:
            raise DataError(
                f"{root}: held out by name, class {min(lost)!r} has no pictures {purpose}; there are too few pictures"
                " or cases: split them by hand, or leave out --group-pattern"
            )
    return Labelled(learnt, held, f"folders; {share:.0%} held out by name, since there is no split")


def _all_there(definition: EncoderSet, pairs: Iterable[ImageText], where: Path) -> None:
    found = {pair.texts[0] for pair in pairs}
    wanted = definition.classes or found
    missing = [name for name in wanted if name not in found]
    if missing or len(found) < 2:
        what = f"no pictures of class {missing[0]!r}" if missing else "fewer than two classes with pictures"
        raise DataError(f"{where}: {what}; eval/benchmarks/encoder/{definition.name}.yaml says what lies where")


def groups_of(pairs: Sequence[ImageText], pattern: str | None) -> list[str]:
    """The case of each picture, found by the first group of ``pattern`` in its name. Raises ConfigError."""
    if pattern is None:
        return [pair.group for pair in pairs]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-pattern {pattern!r}: {error}") from error
    if not compiled.groups:
        raise ConfigError(f"--group-pattern {pattern!r}: it needs a group in parentheses, which finds the case")
    found = [compiled.search(pair.name) for pair in pairs]
    return [match[1] if match else pair.group for match, pair in zip(found, pairs, strict=True)]


def _drawn(name: str) -> float:
    """A number 0..1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def _folders(definition: EncoderSet, root: Path, split: str) -> Iterator[ImageText]:
    base = root if split == "**" else root / split
    if not base.is_dir():
        raise DataError(f"{base}: no such folder; eval/benchmarks/encoder/{definition.name}.yaml says what lies where")
    inner = base.rglob("*") if split == "**" else base.iterdir()
    for folder in sorted(path for path in inner if path.is_dir()):
        if definition.classes and folder.name not in definition.classes:
            continue
        for path in sorted(folder.iterdir() if split == "**" else folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                name = f"{folder.name}/{path.name}"
                yield ImageText(name, [folder.name], name, (path, 0, -1))


def _rows(definition: EncoderSet, table: LabelTable, root: Path, split: str) -> Iterator[ImageText]:
    file = root / table.file.replace("{split}", split)
    if not file.is_file() and file.with_suffix(".csv").is_file():
        file = file.with_suffix(".csv")
    if not file.is_file():
        raise DataError(f"{file}: no such file; eval/benchmarks/encoder/{definition.name}.yaml says what lies where")
    for number, row in enumerate(_sheet(file) if file.suffix == ".xlsx" else _csv(file), start=2):
        try:
            if table.split and row[table.split] != split:
                continue
            name = str(row[table.name])
            marked = [each for each in definition.classes if float(row[each] or 0)] if table.label is None else []
            label = row[table.label] if table.label else marked[0]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"{file}:{number}: {type(error).__name__} {error}; columns: {', '.join(row)}") from error
        path = root / table.images / name
        if not path.is_file():
            raise DataError(f"{file}:{number}: no such image file: {path}")
        yield ImageText(name, [str(label)], name, (path, 0, -1))


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        yield from csv.DictReader(opened)


def _sheet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import openpyxl
    except ImportError as error:
        raise MissingExtraError("openpyxl", "eval", error) from error
    rows = openpyxl.load_workbook(file, read_only=True).active.iter_rows(values_only=True)
    head = [str(name) for name in next(rows)]
    for row in rows:
        if row[0] is not None:
            yield dict(zip(head, row, strict=False))


def _array(pattern: str, root: Path, split: str) -> Iterator[ImageText]:
    files = [root / pattern.format(split=split, part=part) for part in "xy"]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file, and no folder {root / split}")
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "eval", error) from error
    try:
        pictures, labels = h5py.File(files[0])["x"], h5py.File(files[1])["y"][:].reshape(-1)
    except (OSError, KeyError) as error:
        raise DataError(f"{files[0]}: not a pair of HDF5 files with x and y ({error})") from error
    for row, label in enumerate(labels):
        name = f"{files[0].name}:{row}"
        yield _InArray(name, [str(int(label))], name, (files[0], row, -1), pictures, row)


def names_of(definition: EncoderSet, pairs: Iterable[ImageText]) -> dict[str, list[str]]:
    """Class -> its names in sentences."""
    found = sorted({pair.texts[0] for pair in pairs})
    return {name: definition.classes.get(name) or [re.sub(r"_+", " ", name)] for name in found}
