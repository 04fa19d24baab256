"""Records on disk: JSON Lines that survive a kill, and files that are either whole or absent.

A writer killed in the middle of a line leaves a line without its newline; readers skip that one tail and the next
writer cuts it off, so an append-only file can always be gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from medllava.errors import DataError

Record = TypeVar("Record", bound=BaseModel)


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder for each call


def describe(error: ValidationError) -> str:
    """The faults of a record as one line: ``phrases.0.box: a box is [x1, y1, x2, y2], got 3 numbers; ...``."""
    return "; ".join(
        ".".join(str(part) for part in fault["loc"]) + ": " + fault["msg"].removeprefix("Value error, ")
        if fault["loc"]
        else fault["msg"].removeprefix("Value error, ")
        for fault in error.errors()
    )


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line; a last line without its newline (a killed writer) is skipped.

    Raises DataError naming file:line where a line is not a JSON object, or naming the file if it cannot be read.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix("\ufeff")  # as Windows programs begin a file
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    if not line.endswith("\n"):
                        return
                    raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield each line as a ``kind``. Raises DataError naming file:line, the field and what was expected."""
    for number, row in read_rows(path):
        try:
            yield kind.model_validate(row)
        except ValidationError as error:
            raise DataError(f"{path}:{number}: not a {kind.__name__}: {describe(error)}") from error


def to_line(record: BaseModel | dict[str, Any]) -> str:
    """One record as one line, keys in a stable order, non-ASCII kept readable."""
    row = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
    return _encode(row) + "\n"


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it there only if the block ends well; else remove it.

    An OSError of the block that names no file (a full disk) gets ``path`` as its file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_records(path: Path, records: Iterable[BaseModel | dict[str, Any]]) -> int:
    """Write all records to ``path`` at once (whole or not at all). Returns how many."""
    count = 0
    with atomic_write(path) as file:
        for record in records:
            file.write(to_line(record))
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


@contextmanager
def write_json_list(path: Path) -> Iterator[Callable[[str], None]]:
    """Give a function that adds an item, as :func:`to_item` writes it, to a JSON list on disk; whole or not at all.

    Memory holds one item at a time. The file is as :func:`write_json` writes it.
    """
    with atomic_write(path) as file:
        before = "[\n "

        def add(item: str) -> None:
            nonlocal before
            file.write(before + item)
            before = ",\n "

        yield add
        file.write("[]\n" if before == "[\n " else "\n]\n")


def to_item(value: Any, before: str = "\n ") -> str:
    """A value of texts as keys as ``json.dump(..., ensure_ascii=False, indent=1)`` writes it within a list, whose
    encoder is Python and takes five times as long. ``before``: the line break and indent in front of ``value``."""
    if isinstance(value, str):
        return encode_basestring(value)
    inner = before + " "
    if isinstance(value, dict) and value:
        items = [f"{encode_basestring(key)}: {to_item(item, inner)}" for key, item in value.items()]
        return f"{{{inner}{f',{inner}'.join(items)}{before}}}"
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join([to_item(item, inner) for item in value])}{before}]"
    return json.dumps(value)


def read_json(path: Path) -> Any:
    """Read one JSON document. Raises DataError naming the file (and the line, if it is not JSON)."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error


class Appender:
    """Append records to a JSON Lines file, each flushed to the system as it is written; cuts off a broken last line.

    A record that does not fit on the disk leaves no part of itself. Use as a context manager. Safe for one writing
    process at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Appender:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        size = self._file.tell()
        if size:
            with self.path.open("rb") as whole:
                whole.seek(-1, os.SEEK_END)
                if whole.read(1) != b"\n":
                    whole.seek(0)
                    self._file.truncate(whole.read().rfind(b"\n") + 1)
        return self

    def write(self, record: BaseModel | dict[str, Any]) -> None:
        before, left = self._file.seek(0, os.SEEK_END), memoryview(to_line(record).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(before)
            error.filename = str(self.path)
            raise

    def __exit__(self, *_: object) -> None:
        self._file.close()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
