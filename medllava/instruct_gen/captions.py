"""A file of grounded captions, read as it is needed: what memory holds does not grow with what was said."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from medllava.errors import DataError
from medllava.instruct_gen.records import GroundedCaption
from medllava.jsonl import read_records


class CaptionFile:
    """The first ``most`` captions of a file, in its order. Memory holds a few bytes per caption and each video's name.

    Raises DataError for a line that is no caption, a file without any, and an id that occurs twice.
    """

    def __init__(self, path: Path, most: int | None = None) -> None:
        self.path = path
        self._places: dict[str, array[int]] = {}
        """Per video, in order of first appearance: the byte offsets of its captions."""
        ids: set[str] = set()
        starts = _row_starts(path)
        for caption in islice(read_records(path, GroundedCaption), most):
            if caption.id in ids:
                raise DataError(f"{path}: the id {caption.id!r} occurs more than once; ids must be unique")
            ids.add(caption.id)
            self._places.setdefault(caption.video, array("Q")).append(next(starts))
        if not ids:
            raise DataError(f"{path}: no captions in it; make some with: python -m medllava.instruct_gen narrate")
        self._count = len(ids)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[GroundedCaption]:
        return islice(read_records(self.path, GroundedCaption), self._count)

    @property
    def videos(self) -> list[str]:
        """Names of the videos, in order of first appearance."""
        return list(self._places)

    def of_video(self, video: str) -> list[GroundedCaption]:
        """The captions of one video, in the file's order."""
        found = []
        with self.path.open("rb") as file:
            for start in self._places[video]:
                file.seek(start)
                found.append(GroundedCaption.model_validate(json.loads(file.readline())))
        return found


def _row_starts(path: Path) -> Iterator[int]:
    """Byte offset of each line that holds a row."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield start
            start += len(line)
