"""Child processes that do not outlive the process that started them, however that one ends."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Have the system end this process when its parent, of process id ``parent``, ends: kill -9 included.

    For the start of a worker process, or between fork and exec. Does nothing where the system is not Linux.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def begin_worker(parent: int, start: bytes) -> None:
    """End with ``parent``, and first call what ``start`` is the pickle of: an initializer of a pool of processes.

    A parent waits until a new process has read its arguments, which takes long where reading them imports modules.
    """
    end_with_parent(parent)
    pickle.loads(start)()


@contextmanager
def holding_interrupts() -> Iterator[Callable[[], None]]:
    """Hear of Ctrl-C only where the function that this gives is called, and at the end: one that comes in the middle of
    a library's work may leave a lock behind that nobody opens again. Works in the main thread only, whose signals they
    are."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    heard = False

    def note(number: int, frame: object) -> None:
        nonlocal heard
        heard = True

    before = signal.signal(signal.SIGINT, note)

    def listen() -> None:
        nonlocal heard
        if heard and callable(before):
            heard = False
            before(signal.SIGINT, None)

    try:
        yield listen
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    listen()


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started in the block never hear of Ctrl-C, and leave it to their parent."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def usable_cores() -> int:
    """How many cores this process may use, which can be fewer than the machine has: it may be bound to some (Slurm,
    taskset), or a container may have a share of the time of all (``docker --cpus``; cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas(_CGROUP, _CGROUPS)]))


def _quotas(told: Path, groups: Path) -> Iterator[int]:
    """Cores, rounded up, that each of the groups over this process may keep busy, where there is a limit."""
    with suppress(OSError):
        for line in told.read_text().splitlines():
            if line.startswith("0::/"):
                own = groups / line.removeprefix("0::/")
                for folder in (own, *own.parents[: len(own.parts) - len(groups.parts)]):
                    with suppress(OSError, ValueError):  # The root has no such file; "max" is no number.
                        quota, period = (folder / "cpu.max").read_text().split()
                        yield -(-int(quota) // int(period))
