"""Processes that train together wait for one another in every step. If one hangs, the rest would wait for as long as
the library lets them, and then end without a word of where: here each notes where it is, and one that waits too long
says where all are, and ends."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from medllava.errors import MedllavaError

log = logging.getLogger(__name__)

_LATER = timedelta(seconds=60)
"""PyTorch's own limit comes so much later than ours, which can tell more."""
_KEY = "medllava/place/"
_GONE = ("closed by peer", "reset by peer", "remote process exited")
"""What gloo and NCCL say of a peer that is no more."""


def process_group(limit: timedelta) -> Any:
    """accelerate's settings of the process group, with ``limit`` on how long one process waits for another."""
    from accelerate import InitProcessGroupKwargs

    return InitProcessGroupKwargs(timeout=limit + _LATER)


class Watch:
    """Ends this process when it has been in a step for longer than the ``accelerator``'s limit; without other
    processes it does nothing. Used as a context, within which it watches."""

    def __init__(self, accelerator: Any) -> None:
        self._limit = float("inf")
        self._rank, self._count = accelerator.process_index, accelerator.num_processes
        self._place, self._since = "", float("inf")
        self._over = threading.Event()
        self._store: Any = None
        if self._count > 1 and accelerator.init_handler is not None:
            self._limit = (accelerator.init_handler.timeout - _LATER).total_seconds()
            self._store = torch.distributed.distributed_c10d._get_default_store()

    def __enter__(self) -> Watch:
        if self._store is not None:
            threading.Thread(target=self._look, args=(self._store.clone(),), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def at(self, place: str, *, limited: bool = True) -> None:
        """Note where this process is now. ``limited``: it must not stay there for longer than the limit."""
        if self._store is not None:
            self._place, self._since = place, time.monotonic() if limited else float("inf")
            self._store.set(f"{_KEY}{self._rank}", f"{place} ({socket.gethostname()}, process {os.getpid()})")

    def _look(self, store: Any) -> None:
        while not self._over.wait(min(self._limit / 4, 5)):
            if time.monotonic() - self._since > self._limit:
                log.error("\nerror: %s", self._told(store))  # on a line of its own: a progress bar may hold this one
                os._exit(1)  # the thread that waits cannot be woken

    def _told(self, store: Any) -> str:
        keys = {rank: f"{_KEY}{rank}" for rank in range(self._count)}
        places = [
            f"rank {rank}: {store.get(key).decode() if store.check([key]) else 'not there yet'}"
            for rank, key in keys.items()
        ]
        return (
            f"rank {self._rank} has been at {self._place} for {self._limit:.0f} seconds, the limit. Where all are:"
            f" {'; '.join(places)}. One that is behind holds up the rest: see what it said last, and what it does"
            " (py-spy dump --pid PROCESS). If all are at the same step, look at the network between them"
            " (NCCL_DEBUG=INFO). Go on with --resume; --timeout MINUTES allows more"
        )


@contextmanager
def limit_told() -> Iterator[None]:
    """Turn PyTorch's own words for a process that did not come, or is gone, into a MedllavaError."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            if "timed out" in said:
                raise MedllavaError(
                    f"rank {rank} waited for another process, which did not come; see what the others said last. Go on"
                    " with --resume; --timeout MINUTES allows more"
                ) from error
            if any(words in said for words in _GONE):
                raise MedllavaError(
                    f"rank {rank} lost another process, which has ended; see what that one said. Go on with --resume"
                ) from error
        raise
