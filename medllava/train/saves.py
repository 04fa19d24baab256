"""The saves of a run: ``OUT/step-000200/`` and so on, each a complete checkpoint with the state to go on from.

A save is written beside its place and renamed when every byte is on the disk: a kill or a full disk in the middle
leaves the saves before it as they were. Kept are the newest ``keep`` and the one with the lowest validation loss, which
``best.json`` names (a file, because links do not survive every way of copying a folder).
"""

from __future__ import annotations

import glob
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from medllava.errors import CheckpointError, MedllavaError
from medllava.jsonl import read_json, write_json
from medllava.model.folders import full_disk_told, sync_folder

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
ZERO_FOLDER = "zero"
"""Beside it, under DeepSpeed: what every process needs to go on."""
BEST_FILE = "best.json"
TRIAL = ".trial.part"
_STEP = re.compile(r"step-(\d{6,})")

Figures = Mapping[str, float]
"""What is known about a checkpoint when it is written: step, loss, eval_loss, ..."""
Write = Callable[[Path, Figures], None]
"""Writes a complete checkpoint into a folder that is not there yet (or into the run's own)."""


class Saves:
    """The step folders in ``out``. ``write``: None for parts of a model, whose saves hold the state alone.

    main: false in all processes of a run but the one that writes; the others only keep count.
    """

    def __init__(self, out: Path, *, keep: int = 1, write: Write | None = None, main: bool = True) -> None:
        self._out = out
        self._keep = keep
        self._write = write
        self._main = main
        self._best: tuple[int, float] | None = None

    def restore(self, load: Callable[[Path], int]) -> int:
        """Have ``load`` read the newest state; returns the step to go on from, 0 if there is none.

        A save that cannot be read (a damaged disk, a copy that was cut off) is told and the one before it taken.
        Raises CheckpointError if there are saves, but none that can be used.
        """
        faults = []
        for step, folder in self._folders():
            if not (folder / STATE_FILE).is_file():
                continue
            try:
                load(folder / STATE_FILE)
            except CheckpointError as error:
                log.warning("%s; going on from the save before it", error)
                faults.append(error)
                continue
            self._read_best(step)
            return step
        if faults:
            raise faults[0]
        return 0

    def save(self, step: int, write_state: Callable[[Path], None], figures: Figures) -> None:
        """Write the checkpoint and the state of ``step``, and drop the saves that are no longer needed."""
        final = self.folder(step)
        self._out.mkdir(parents=True, exist_ok=True)
        temporary = self._out / f".{final.name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            if self._write:
                self._write(temporary, figures)
            temporary.mkdir(exist_ok=True)
            with full_disk_told(final):
                write_state(temporary / STATE_FILE)
            sync_folder(temporary)
            if final.exists():
                _remove(final)
            temporary.replace(final)
            sync_folder(self._out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for newer, folder in self._folders():
            if newer > step:  # of a run that went on from here instead
                _remove(folder)
        self._prune()

    def is_best(self, loss: float) -> bool:
        return self._best is None or loss < self._best[1]

    def mark_best(self, step: int, loss: float) -> None:
        """Remember ``step``, just saved or the last of the run, as the one with the lowest validation loss."""
        self._best = step, loss
        if self._main and self.folder(step).is_dir():
            self._write_best(self.folder(step).name)
            self._prune()

    def finish(self, step: int) -> None:
        """After the run's own checkpoint is in ``out``: what only a resume needs goes away."""
        if self._best and self._best[0] == step:
            self._write_best(".")
        self._prune()
        for _, folder in self._folders():
            _forget_state(folder)

    def clear(self) -> None:
        """Remove every save, for a run that starts anew and for a part of a model that is done."""
        for _, folder in self._folders():
            _remove(folder)
        (self._out / BEST_FILE).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process was writing."""
        final = f".{glob.escape(self._out.name)}.????????.part"  # of the checkpoint at the end of a run
        for left in [*self._out.glob(".*.part"), *self._out.parent.glob(final)]:
            log.info("removing %s, left by a killed run", left)
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def check_room(self, checkpoint: int, state: int) -> None:
        """Raises MedllavaError if the disk has no room for the saves of the whole run. Sizes in bytes."""
        there = sum(_size(folder) for _, folder in self._folders())
        # At most: those kept, one being written, the best one, and the run's own at the end.
        needed = (self._keep + 1) * (checkpoint + state) + 2 * checkpoint - there
        free = shutil.disk_usage(_existing(self._out)).free
        if needed > free:
            raise MedllavaError(
                f"{self._out}: the saves of this run need {needed:,} bytes ({self._keep + 1} times {checkpoint:,} of"
                f" weights and {state:,} of state, and the best and last checkpoint), but {free:,} are free; free some"
                " space, choose another --out, or lower keep"
            )

    def trial(self, prove: Callable[[Path], None]) -> None:
        """Write a checkpoint as the run's saves will be, let ``prove`` read it back, and remove it.

        Raises what the two raise: before the first step instead of after the last one.
        """
        assert self._write is not None
        new = not self._out.exists()
        self._out.mkdir(parents=True, exist_ok=True)
        folder = self._out / TRIAL
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._write(folder, {})
            prove(folder)
        except ValueError as error:  # transformers refuses some settings only when they are written
            raise CheckpointError(f"{self._out}: a checkpoint of this model cannot be written: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if new and not any(self._out.iterdir()):
                self._out.rmdir()

    def folder(self, step: int) -> Path:
        return self._out / f"step-{step:06d}"

    def _folders(self) -> Iterator[tuple[int, Path]]:
        """Step folders, the newest first."""
        if not self._out.is_dir():
            return
        found = [(match, path) for path in self._out.iterdir() if (match := _STEP.fullmatch(path.name))]
        yield from sorted(((int(match[1]), path) for match, path in found if path.is_dir()), reverse=True)

    def _prune(self) -> None:
        for place, (step, folder) in enumerate(self._folders()):
            if place < self._keep:
                continue
            if self._best and step == self._best[0]:
                _forget_state(folder)
            else:
                _remove(folder)

    def _write_best(self, folder: str) -> None:
        assert self._best is not None
        write_json(self._out / BEST_FILE, {"step": self._best[0], "eval_loss": self._best[1], "folder": folder})

    def _read_best(self, start: int) -> None:
        file = self._out / BEST_FILE
        if file.is_file():
            found = read_json(file)
            if found["step"] <= start and self.folder(found["step"]).is_dir():
                self._best = found["step"], found["eval_loss"]


def _forget_state(folder: Path) -> None:
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / ZERO_FOLDER, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a save; a kill in the middle leaves nothing that looks like one."""
    doomed = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
