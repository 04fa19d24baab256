"""What a run looked like: the loss curve as a picture, and TensorBoard logs. Both are left out if their package is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from medllava.jsonl import read_rows

log = logging.getLogger(__name__)


def plot_loss(log_file: Path, picture: Path, title: str) -> None:
    """Draw loss, validation loss and learning rates over the steps of ``train_log.jsonl``."""
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
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1))
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
    bottom.set_xlabel("step")
    bottom.legend()
    bottom.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


class TensorBoard:
    """Writes log rows for TensorBoard; does nothing if the package is absent. A resumed run purges what it repeats."""

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        self._start = start
        self._writer: Any = None

    def __enter__(self) -> TensorBoard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            log.warning("no TensorBoard log: %s; pip install 'medllava[train]'", error)
            return self
        self._writer = SummaryWriter(str(self._folder), purge_step=self._start)
        return self

    def add(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in row:
                self._writer.add_scalar(key, row[key], row["step"])
        for name, rate in row["lr"].items():
            self._writer.add_scalar(f"lr/{name}", rate, row["step"])

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
