"""What is known of many image files: whether each opens, its size, a hash of its pixels and one of its look.

Every file is decoded once, several at a time. The facts are kept in a small database in the user's cache folder
(``$XDG_CACHE_HOME/medllava``, else ``~/.cache/medllava``) under path, size and time of change, so that a second command
on the same files opens none of them again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medllava.errors import DataError
from medllava.images import load_image
from medllava.processes import usable_cores

log = logging.getLogger(__name__)

LOOK_SIDE = 16
LOOK_BITS = 2 * LOOK_SIDE * LOOK_SIDE

_FLAT = 2.0
"""Standard deviation in grey levels below which a picture has no look of its own: all blank pictures look alike."""

_TABLE = "images_1"  # a new number whenever the facts are made in another way


@dataclass(frozen=True)
class ImageFacts:
    """``fault``: "missing image", "empty image" or "bad image", or "" for a whole one; ``detail`` says more.

    pixels: SHA-256 of the decoded RGB picture and its size, so that the same picture in two files or formats without
    loss is the same. look: a difference hash of :data:`LOOK_BITS` bits as hex, "" for pictures of one colour.
    """

    fault: str = ""
    detail: str = ""
    width: int = 0
    height: int = 0
    pixels: str = ""
    look: str = ""


def look_at(names: Iterable[str], folder: Path, *, cache: bool = True) -> dict[str, ImageFacts]:
    """The facts of each named file of ``folder`` (a name may also be an absolute path). Never raises for a bad file."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    paths = {name: (folder / name).absolute() for name in dict.fromkeys(names)}
    found: dict[str, ImageFacts] = {}
    with _database(cache) as known:
        stamps = {name: _stamp(path) for name, path in paths.items()}
        unknown: list[str] = []
        for name, path in paths.items():
            stamp = stamps[name]
            kept = known.get(path, stamp) if stamp else None
            if kept is None:
                unknown.append(name)
            else:
                found[name] = kept
        with ThreadPoolExecutor(usable_cores()) as pool:
            looked = pool.map(lambda name: _look(paths[name], str(folder / name)), unknown)
            bar = tqdm(looked, total=len(unknown), desc="images", unit="", disable=not unknown, mininterval=0.5)
            for name, facts in zip(unknown, bar, strict=True):
                found[name] = facts
                stamp = stamps[name]
                if stamp is not None:
                    known.put(paths[name], stamp, facts)
    return {name: found[name] for name in paths}


def look_bits(looks: Iterable[str]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """Looks as (number, LOOK_BITS / 64) words, for counting the bits in which they differ."""
    joined = bytes.fromhex("".join(looks))
    return np.frombuffer(joined, np.uint64).reshape(-1, LOOK_BITS // 64)


def difference_hash(image: Image.Image) -> str:
    """Which way the brightness goes between neighbours of a 16 x 16 reduction, across and down, as hex."""
    grey = image.convert("L")
    small = np.asarray(grey.resize((LOOK_SIDE + 1, LOOK_SIDE + 1), Image.Resampling.BOX), np.int16)
    if small.std() < _FLAT:
        return ""
    across = small[:LOOK_SIDE, 1:] > small[:LOOK_SIDE, :-1]
    down = small[1:, :LOOK_SIDE] > small[:-1, :LOOK_SIDE]
    return np.packbits(np.concatenate([across.ravel(), down.ravel()])).tobytes().hex()


def _look(path: Path, name: str) -> ImageFacts:
    try:
        image = load_image(path)
    except DataError as error:
        kind = "bad image" if path.is_file() and path.stat().st_size else "missing image"
        if path.is_file() and not path.stat().st_size:
            kind = "empty image"
        return ImageFacts(kind, str(error).replace(str(path), name))
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return ImageFacts("", "", image.width, image.height, digest.hexdigest(), difference_hash(image))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class _Known:
    """The database; without a connection it knows nothing and keeps nothing."""

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self._connection = connection
        self._unsaved = 0

    def get(self, path: Path, stamp: tuple[int, int]) -> ImageFacts | None:
        if self._connection is None:
            return None
        columns = "fault, detail, width, height, pixels, look"
        try:
            row = self._connection.execute(
                f"SELECT {columns} FROM {_TABLE} WHERE path=? AND size=? AND mtime_ns=?", (str(path), *stamp)
            ).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return ImageFacts(*row) if row else None

    def put(self, path: Path, stamp: tuple[int, int], facts: ImageFacts) -> None:
        if self._connection is None:
            return
        try:
            values = (str(path), *stamp, *astuple(facts))
            self._connection.execute(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            self._unsaved += 1
            if self._unsaved >= 256:  # what a killed run has looked at is not looked at again
                self._connection.commit()
                self._unsaved = 0
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        log.warning("facts about images are not kept any more (%s)", error)
        self._connection = None


@contextmanager
def _database(wanted: bool) -> Iterator[_Known]:
    """A cache that cannot be used (read-only home, full disk, another's lock) costs time, never the command."""
    connection = None
    if wanted:
        place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "medllava" / "images.sqlite"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(place, timeout=10)
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {_TABLE} (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
                " fault TEXT, detail TEXT, width INTEGER, height INTEGER, pixels TEXT, look TEXT)"
            )
        except (OSError, sqlite3.Error) as error:
            log.warning("%s: facts about images are not kept (%s)", place, error)
            connection = None
    try:
        yield _Known(connection)
    finally:
        if connection is not None:
            try:
                connection.commit()
            except sqlite3.Error as error:
                log.warning("facts about images are not kept (%s)", error)
            connection.close()
