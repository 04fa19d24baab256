"""Videos as tasks of a Ray cluster: the same function that local processes run, on as many machines as there are.

Only names and reasons travel. Videos, transcripts and the output folder must lie on a file system that all nodes mount
at the same path (NFS, Lustre, a bucket mounted as a folder); a node that does not see them, or has other code, ends the
run by name. What a task writes is whole or absent and the same wherever it is made, so a task may run twice: when its
worker or its whole node is lost, only that video is worked on again, and a node that was merely cut off for a while
does no harm.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, MissingExtraError, first_line
from medllava.instruct_gen.narrator import code_digest

if TYPE_CHECKING:
    from medllava.instruct_gen.narrate import Task

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Workers that a video may take down with it before it is given up."""

MOST_SUBMITTED = 1000
"""Videos handed to Ray at once: enough for any cluster, few enough that looking for finished ones costs nothing."""

STORE_BYTES = 80 * 2**20
"""Shared memory of a node started here. Ray would take a third of the machine's; next to nothing goes through it."""


@dataclass(frozen=True)
class Ground:
    """What a worker must find where it runs. ``token`` is in the file ``mark``, which lies in the output folder."""

    folder: str
    mark: Path
    token: str
    code: str


def work_on_ray(
    tasks: Sequence[Task], work: Callable[[Task], str | None], out: Path, address: str, workers: int | None
) -> Iterator[tuple[Task, str | None]]:
    """(task, what ``work`` returned of it) as they come, in any order.

    ``address`` is that of a running cluster ("auto": of this machine's), or "local" to start a node here for as long as
    the run takes. ``workers`` is how many videos are worked on at once (None: one per CPU of the cluster).
    A video whose worker was lost :data:`ATTEMPTS` times has that for its reason. Raises ConfigError if there is no
    such cluster or a node cannot do the work; other exceptions are those of ``work``.
    """
    with _cluster(address, workers) as ray, _ground(out) as ground:
        # Ray's own retries would not tell which video it is that takes its workers down.
        attempt = ray.remote(num_cpus=1, max_retries=0)(_attempt)
        waiting = deque(tasks)
        lost: Counter[str] = Counter()
        running: dict[Any, Task] = {}
        most = MOST_SUBMITTED if workers is None else workers
        while waiting or running:
            while waiting and len(running) < most:
                task = waiting.popleft()
                running[attempt.remote(task, work, ground)] = task
            (reference,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(reference)
            try:
                yield task, ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (
                ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError
            ) as error:
                lost[task.video.name] += 1
                times = lost[task.video.name]
                log.warning("%s: its worker was lost (%d of %d times)", task.video, times, ATTEMPTS)
                if times < ATTEMPTS:
                    waiting.appendleft(task)
                    continue
                task.part.unlink(missing_ok=True)
                yield task, (
                    f"{task.video}: {ATTEMPTS} workers were lost while they worked on it; out of memory?"
                    f" ({first_line(error)})"
                )
            except ray.exceptions.RayError as error:
                raise ConfigError(
                    f"--ray {address}: {first_line(error)}; finished videos are kept: the same command again goes on"
                ) from error


def _attempt(task: Task, work: Callable[[Task], str | None], ground: Ground) -> str | None:
    """In a worker process of some node: make sure that it is fit for the work, and do it."""
    node = socket.gethostname()
    if code_digest() != ground.code:
        raise ConfigError(f"Ray node {node}: has another version of medllava; install the same on all nodes")
    with suppress(OSError):  # Relative paths are meant from where the command was given.
        os.chdir(ground.folder)
    seen = ground.mark.read_text() if ground.mark.is_file() else ""
    if seen != ground.token or not task.video.is_file():
        unseen = task.video if seen == ground.token else ground.mark.parent
        raise ConfigError(
            f"Ray node {node}: does not see {unseen}; videos, transcripts and --out must be on a file system that"
            " all nodes mount at the same path"
        )
    return work(task)


@contextmanager
def _ground(out: Path) -> Iterator[Ground]:
    """What workers are to find, for as long as they work."""
    mark = out.resolve() / "parts" / ".seen-by-all-nodes"
    mark.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    mark.write_text(token)
    try:
        yield Ground(str(Path.cwd()), mark, token, code_digest())
    finally:
        mark.unlink(missing_ok=True)


@contextmanager
def _cluster(address: str, workers: int | None) -> Iterator[Any]:
    """The module ``ray``, connected; reports of use and the dashboard are off in what is started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    starts_here = address == "local"
    if starts_here:
        # Despite its name this makes Ray listen on the loopback address alone, on Linux too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", error) from error
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        # Its own sockets and logs; the path of a socket may have some hundred characters.
        of_its_own = {
            "num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE_BYTES, "_temp_dir": folder,
        }
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level="error", **(of_its_own if starts_here else {})
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--ray {address}: no cluster could be reached or started ({first_line(error)}); expected HOST:PORT of"
                " a running one, auto, or local"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()
