"""narrate on Ray: real clusters on this machine, workers and nodes killed while they work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from medllava.errors import ConfigError, MissingExtraError, run_cli
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.narrate import Task, narrate_one
from medllava.instruct_gen.narrator import Options

NAMES = ("a", "b", "c", "d", "e", "f")
WAIT_S = 180.0


@pytest.fixture(scope="module")
def ray():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.fixture(scope="module")
def videos(lecture, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray-videos")
    for name in NAMES:
        shutil.copy(lecture.path, folder / f"{name}.mp4")
        shutil.copy(lecture.path.with_suffix(".srt"), folder / f"{name}.srt")
    (folder / "f.srt").unlink()  # a video that cannot be used is told of in the same words
    return folder


@pytest.fixture(scope="module")
def locally(videos, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("locally")
    assert narrated("--videos", videos, "--out", out, "--workers", 2) == 0
    return everything(out)


@pytest.fixture(scope="module")
def cluster(ray) -> Iterator:
    from ray.cluster_utils import Cluster

    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20},
    )
    yield started
    ray.shutdown()
    started.shutdown()


def narrated(*arguments: object) -> int:
    return run_cli(lambda: main(["narrate", *map(str, arguments)]))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medllava.instruct_gen", "narrate", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from descendants(child)


def at_work(pid: int) -> list[int]:
    """Ray workers below process ``pid`` that hold a video."""

    def title(child: int) -> str:
        try:
            return Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            return ""

    return [child for child in descendants(pid) if title(child).startswith("ray::_attempt")]


def listening(pid: int) -> set[str]:
    """Addresses on which processes below ``pid`` take connections, as the kernel's hexadecimal."""
    sockets = set()
    for child in descendants(pid):
        with suppress(OSError):
            sockets |= {str(held.readlink()) for held in Path(f"/proc/{child}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def tasks_of(videos: Path, out: Path) -> list[Task]:
    return [Task(video, None, out, Options()) for video in sorted(videos.glob("*.mp4"))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_killed_half_way_changes_no_byte(ray, videos, locally, tmp_path):
    out = tmp_path / "out"
    run = started("--videos", videos, "--out", out, "--ray", "local", "--workers", 2)
    try:
        wait_for(lambda: list((out / "parts").glob("*.jsonl")))
        busy: list[int] = []
        wait_for(lambda: busy.extend(at_work(run.pid)) or busy)
        os.kill(busy[0], signal.SIGKILL)
        on = listening(run.pid)
        _, said = run.communicate(timeout=WAIT_S)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert said.count("its worker was lost (1 of 3 times)") == 1
    assert "6 of 6 videos" in said
    assert everything(out) == locally
    # What was started for the run took connections from this machine alone.
    assert on and all(address in {"0100007F", "0000000000000000FFFF00000100007F"} for address in on), on


def test_a_lost_node_repeats_only_its_videos(ray, cluster, videos, locally, tmp_path, caplog):
    from medllava.instruct_gen.on_ray import work_on_ray

    begun = tmp_path / "begun"
    begun.mkdir()
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    doomed = second.node_id

    def noted(task: Task) -> str | None:
        import ray as there

        node = there.get_runtime_context().get_node_id()
        (begun / f"{task.video.stem}-{node}-{time.time_ns()}").touch()
        if node == doomed:
            time.sleep(WAIT_S)
        # The other node waits for its turn, or it might be done with all before this one's worker has started.
        until = time.monotonic() + WAIT_S
        while not list(begun.glob(f"*-{doomed}-*")) and time.monotonic() < until:
            time.sleep(0.05)
        return narrate_one(task)

    out = tmp_path / "out"
    reasons = {}
    for task, reason in work_on_ray(tasks_of(videos, out), noted, out, cluster.address, None):
        reasons[task.video.name] = reason
        if second is not None:
            wait_for(lambda: list(begun.glob(f"*-{doomed}-*")))
            cluster.remove_node(second, allow_graceful=False)
            second = None
    assert [name for name, reason in reasons.items() if reason] == ["f.mp4"]
    (lost,) = begun.glob(f"*-{doomed}-*")
    times = {name: len(list(begun.glob(f"{name}-*"))) for name in NAMES}
    assert times == dict.fromkeys(NAMES, 1) | {lost.name[0]: 2}
    assert caplog.text.count("its worker was lost (1 of 3 times)") == 1
    # The same folder, gone on with by local processes: nothing is left to do, and the files are the same.
    before = {path: path.stat().st_mtime_ns for path in (out / "frames").iterdir()}
    assert narrated("--videos", videos, "--out", out, "--workers", 1) == 0
    assert everything(out) == locally
    assert {path: path.stat().st_mtime_ns for path in (out / "frames").iterdir()} == before


def test_a_video_that_kills_its_workers_is_named_and_does_not_sink_the_rest(ray, cluster, videos, tmp_path):
    from medllava.instruct_gen.on_ray import ATTEMPTS, work_on_ray

    attempts = tmp_path / "attempts"
    attempts.mkdir()

    def deadly(task: Task) -> str | None:
        if task.video.name == "c.mp4":
            (attempts / str(time.time_ns())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    tasks = tasks_of(videos, tmp_path / "out")
    reasons = {
        task.video.name: reason
        for task, reason in work_on_ray(tasks, deadly, tmp_path / "out", cluster.address, None)
    }
    assert len(list(attempts.iterdir())) == ATTEMPTS
    assert reasons.keys() == {task.video.name for task in tasks}
    assert [name for name, reason in reasons.items() if reason is not None] == ["c.mp4"]
    assert "c.mp4: 3 workers were lost while they worked on it" in reasons["c.mp4"]


def test_a_killed_run_goes_on_with_the_unfinished_videos(ray, cluster, videos, locally, tmp_path):
    out = tmp_path / "out"
    run = started("--videos", videos, "--out", out, "--ray", cluster.address)
    parts = out / "parts"
    try:
        wait_for(lambda: len(list(parts.glob("*.jsonl"))) >= 2)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
    # A worker that was finishing a video when the run was killed may do so.
    time.sleep(1)
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")}
    assert 2 <= len(finished) < len(NAMES) - 1
    assert narrated("--videos", videos, "--out", out, "--ray", cluster.address) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert everything(out) == locally


def test_faults_of_the_work_and_of_nodes_are_told_in_one_line(ray, cluster, videos, tmp_path, monkeypatch):
    from medllava.instruct_gen import on_ray

    def full(task: Task) -> str | None:
        raise OSError(28, "No space left on device", str(task.part))

    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left") as caught:
        list(on_ray.work_on_ray(tasks_of(videos, out), full, out, cluster.address, None))
    assert caught.value.errno == 28
    missing = [Task(tmp_path / "elsewhere.mp4", None, out, Options())]
    with pytest.raises(ConfigError, match=r"Ray node \S+: does not see .*elsewhere.mp4; videos, transcripts and --out"):
        list(on_ray.work_on_ray(missing, narrate_one, out, cluster.address, None))
    monkeypatch.setattr(on_ray, "code_digest", lambda: "other")
    with pytest.raises(ConfigError, match="another version of medllava; install the same on all nodes"):
        list(on_ray.work_on_ray(missing, narrate_one, out, cluster.address, None))


def test_without_ray_the_command_says_what_to_install(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medllava\[ray\]'"):
        main(["narrate", "--videos", str(videos), "--out", str(tmp_path), "--ray", "local"])
