"""What a run looks like: its log, its curves as a picture, TensorBoard as far as the package is there, and, only where
it was asked for, Weights & Biases."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from medllava.errors import MissingExtraError
from medllava.jsonl import Appender, atomic_write, read_json, read_rows, write_records

log = logging.getLogger(__name__)

LOG_FILE = "train_log.jsonl"


def plot_loss(log_file: Path, picture: Path, title: str) -> None:
    """Draw loss, validation loss, learning rates and throughput over the steps of ``train_log.jsonl``."""
    try:
        import matplotlib
    except ImportError as error:
        log.warning("no loss picture: matplotlib could not be imported (%s); pip install 'medllava[train]'", error)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for _, row in read_rows(log_file)]
    if not rows:
        return
    steps = [row["step"] for row in rows]
    figure, (top, bottom, pace) = pyplot.subplots(3, 1, figsize=(8, 7.5), sharex=True, height_ratios=(3, 1, 1))
    top.plot(steps, [row["loss"] for row in rows], label="training loss")
    judged = [row for row in rows if "eval_loss" in row]
    if judged:
        top.plot([row["step"] for row in judged], [row["eval_loss"] for row in judged], "o-", label="validation loss")
    for part in sorted({key for row in rows for key in row if key.endswith("_loss") and key != "eval_loss"}):
        top.plot(steps, [row.get(part) for row in rows], alpha=0.6, label=part.replace("_", " "))
    top.set_ylabel("loss per supervised token")
    top.set_ylim(bottom=0)
    top.set_title(title)
    top.legend()
    top.grid(alpha=0.3)
    for name in rows[-1]["lr"]:
        bottom.plot(steps, [row["lr"].get(name) for row in rows], label=name)
    bottom.set_ylabel("learning rate")
    bottom.legend()
    bottom.grid(alpha=0.3)
    key, unit = ("tokens_per_s", "tokens") if "tokens_per_s" in rows[-1] else ("samples_per_s", "samples")
    pace.plot(steps, [row.get(key) for row in rows])
    pace.set_ylabel(f"{unit} / s")
    pace.set_ylim(bottom=0)
    pace.set_xlabel("step")
    pace.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_write(picture, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


class Journal:
    """The run's log: rows in ``train_log.jsonl`` and, if the package is there, TensorBoard. A resumed run first drops
    what was logged after ``start``, the step it resumes from. ``enabled``: false in all processes but the main one.

    wandb: project of Weights & Biases, to which the recipe and the rows are then sent (``WANDB_MODE=offline`` keeps
    them in the run's folder). Without it nothing leaves the machine. Raises MissingExtraError without the package.
    """

    def __init__(self, out: Path, start: int, *, enabled: bool, wandb: str | None = None) -> None:
        self._out = out
        self._start = start
        self._enabled = enabled
        self._board: _Board | None = None
        self._project = wandb
        self._tracker: Any = None

    def __enter__(self) -> Journal:
        if not self._enabled:
            return self
        file = self._out / LOG_FILE
        if file.is_file():
            write_records(file, [row for _, row in read_rows(file) if row["step"] <= self._start])
        self._rows = Appender(file).__enter__()
        try:
            self._board = _Board(self._out / "tensorboard", self._start)
        except ImportError as error:
            log.warning("no TensorBoard log: %s; pip install 'medllava[train]'", error)
        if self._project:
            self._tracker = _track(self._project, self._out)
        return self

    def add(self, row: dict[str, Any]) -> None:
        self._rows.write(row)
        values = {
            key: value for key, value in row.items()
            if isinstance(value, float) and key not in ("seconds", "supervised_tokens", "samples")
        }
        values |= {f"lr/{name}": rate for name, rate in row["lr"].items()}
        if self._board is not None:
            self._board.add(row["step"], values)
        if self._tracker is not None:
            self._tracker.log(values, step=row["step"])

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            self._rows.__exit__(*error)
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish(exit_code=int(error[:1] != (None,)))


def check_wandb() -> None:
    """Raises MissingExtraError if the package cannot be used."""
    try:
        import wandb  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtraError("wandb", "wandb", error) from error


def _track(project: str, out: Path) -> Any:
    """The run at Weights & Biases; a resumed one goes on under its own id, kept in ``wandb-id.txt``."""
    check_wandb()
    import wandb

    file = out / "wandb-id.txt"
    name = file.read_text(encoding="utf-8").strip() if file.is_file() else secrets.token_hex(8)
    with atomic_write(file) as opened:
        opened.write(name + "\n")
    record = out / "run.json"
    run = read_json(record) if record.is_file() else {}
    # No paths and no command line: they may name people and places.
    config = {"recipe": run.get("identity", {}).get("recipe"), "versions": run.get("versions")}
    return wandb.init(project=project, id=name, name=out.name, dir=str(out), config=config, resume="allow")


class _Board:
    """A TensorBoard event file, written in place. PyTorch's own writer hands its rows to a thread, and a full disk then
    shows as that thread's traceback. Raises ImportError without the package."""

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = self._path.open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if start:  # what an earlier file says about later steps is not shown
            self._write(step=start, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        rows = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary.Summary(value=rows))

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        try:
            self._records.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            error.filename = str(self._path)
            raise
