"""Folders of large files, written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_folder(path: Path, write: Callable[[Path], None], last: tuple[str, ...]) -> None:
    """Let ``write`` fill a temporary folder, then put its files into ``path``; files named in ``last`` go there last,
    and are removed first, so that a folder that has them is complete. Other files in ``path`` stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with full_disk_told(path):
            write(temporary)
        mask = _umask()
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)  # the libraries leave weights readable by their owner alone
        sync_folder(temporary)
        if not path.exists():
            temporary.chmod(0o777 & ~mask)
            temporary.replace(path)
            return
        for name in last:
            (path / name).unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: last.index(file.name) if file.name in last else -1):
            file.replace(path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Return when the folder's files, and the folder itself, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn the libraries' own words for a full disk into the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "os error 28" in str(error) or "unexpected pos" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
