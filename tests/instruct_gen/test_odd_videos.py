"""Videos as they are found: whatever the codec, container or camera, a file gives what a plain one of the same lecture
gives, or is reported once, by name, while the rest of the folder goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from medllava.errors import run_cli
from medllava.images import load_image
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.records import GroundedCaption, Narrative, Video
from medllava.instruct_gen.video import VideoReader
from medllava.jsonl import read_records, read_rows

from .conftest import END_S, FINDING, FPS, HEIGHT, TRANSCRIPT, WIDTH, cursor_at, picture_at, tissue

TICKS = 1000


@dataclass(frozen=True)
class Kind:
    """How a file is made. ``times``: seconds of each picture shown; ``audio_s``: length of its sound."""

    name: str
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (WIDTH, HEIGHT)
    options: dict[str, str] = field(default_factory=lambda: {"crf": "23", "preset": "veryfast"})
    container: dict[str, str] = field(default_factory=dict)
    times: tuple[float, ...] = tuple(n / FPS for n in range(round(END_S * FPS)))
    aspect: Fraction | None = None
    turn: int = 0
    audio_s: float = 0.0
    metadata: dict[str, str] = field(default_factory=dict)


def irregular() -> tuple[float, ...]:
    """5 to 30 pictures a second, as phones and screen recorders give; the title is one picture for 2.5 s."""
    rng = np.random.default_rng(0)
    times = [0.0]
    while times[-1] < END_S:
        times.append(times[-1] + (2.5 if times[-1] == 0 else float(rng.choice([1 / 30, 1 / 15, 1 / 8, 1 / 5]))))
    return tuple(times[:-1])


VP9 = {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "8"}
AV1 = {"crf": "35", "preset": "12", "svtav1-params": "lp=1"}
GOOD = [
    Kind("plain.mp4"),
    Kind("with_sound.mp4", audio_s=END_S),
    Kind("variable_rate.mp4", times=irregular()),
    Kind("turned_right.mp4", size=(240, 320), turn=90),
    Kind("turned_left.mp4", size=(240, 320), turn=270),
    Kind("upside_down.mov", turn=180),
    Kind("vp9.webm", "libvpx-vp9", options=VP9),
    Kind("av1.mp4", "libsvtav1", options=AV1),
    Kind("av1_10_bit.mkv", "libsvtav1", "yuv420p10le", options=AV1),
    Kind("h264_10_bit.mp4", pix_fmt="yuv420p10le"),
    Kind("h264_444.mkv", pix_fmt="yuv444p"),
    Kind("hevc_10_bit.mp4", "libx265", "yuv420p10le", options={"preset": "ultrafast", "x265-params": "log-level=none"}),
    Kind("mpeg4.avi", "mpeg4", options={"qscale": "3", "flags": "qscale"}),
    Kind("odd_size.webm", "libvpx-vp9", size=(321, 241), options=VP9),
    Kind("oblong_pixels.mp4", size=(160, 240), aspect=Fraction(2, 1)),
    Kind("tall_pixels.mp4", size=(320, 120), aspect=Fraction(1, 2)),
    Kind("oblong_and_turned.mp4", size=(240, 160), aspect=Fraction(1, 2), turn=90),
    Kind("interlaced.mp4", options={"crf": "23", "x264-params": "tff=1"}),
    Kind("no_length.mkv", container={"live": "1"}),
    Kind("late_start.ts"),
    Kind("sound_goes_on.mkv", audio_s=END_S + 6),
]


def make(path: Path, kind: Kind) -> None:
    slide = tissue(WIDTH + 300, HEIGHT)
    with av.open(str(path), "w", options=kind.container) as container:
        container.metadata.update(kind.metadata)
        stream = container.add_stream(kind.codec, rate=30, options=kind.options)
        stream.width, stream.height, stream.pix_fmt = *kind.size, kind.pix_fmt
        stream.codec_context.time_base = Fraction(1, TICKS)
        if kind.codec == "mpeg4":
            stream.codec_context.time_base = Fraction(1, FPS)
        if kind.aspect is not None:
            stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = kind.aspect
        if kind.turn:
            # The angle by which a player turns counter-clockwise.
            stream.set_display_rotation(kind.turn)
        sound = container.add_stream("aac", rate=8000) if kind.audio_s else None
        for time_s in kind.times:
            picture = np.rot90(picture_at(slide, time_s), -kind.turn // 90)
            picture = cv2.resize(np.ascontiguousarray(picture), kind.size, interpolation=cv2.INTER_AREA)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time_s / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for number in range(round(kind.audio_s * 8000 / 1024)):
                wave = (0.3 * np.sin(0.2 * np.arange(1024))).astype(np.float32)[None]
                samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 8000, number * 1024
                container.mux(sound.encode(samples))
            container.mux(sound.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("odd")
    for kind in GOOD:
        make(where / kind.name, kind)
        (where / kind.name).with_suffix(".srt").write_text(TRANSCRIPT)
    # Run as root, SVT-AV1 puts the thread that opens it, and with it all that is started later, browsers of other tests
    # included, on a real-time priority that leaves the rest of the machine no time.
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    damaged(where)
    return where


def damaged(where: Path) -> None:
    """Files that cannot be used, each with a transcript."""
    whole = (where / "plain.mp4").read_bytes()
    files: dict[str, bytes] = {
        "bad_cut.mp4": whole[: len(whole) // 2], "bad_empty.mp4": b"", "bad_noise.mkv": bytes(range(256)) * 20,
        "bad_end_missing.webm": (where / "vp9.webm").read_bytes()[:-20_000],
    }
    for name, data in files.items():
        (where / name).write_bytes(data)
    make(where / "bad_one_frame.mp4", Kind("", times=(0.0,)))
    make(where / "bad_two_seconds.mp4", Kind("", times=tuple(n / 8 for n in range(16))))
    make(where / "bad_sound_only.mp4", Kind("", times=(), audio_s=4.0))
    for path in where.glob("bad_*"):
        (where / f"{path.stem}.srt").write_text(TRANSCRIPT)


BAD = {
    "bad_cut.mp4": "not a video that can be read",
    "bad_empty.mp4": "the file is empty (0 bytes)",
    "bad_end_missing.webm": "the file is damaged",
    "bad_noise.mkv": "not a video that can be read",
    "bad_one_frame.mp4": "lasts 0.",
    "bad_sound_only.mp4": "holds no video",
    "bad_two_seconds.mp4": "lasts 1.9 s",
}


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("narrated")
    assert run_cli(lambda: main(["narrate", "--videos", str(folder), "--out", str(where), "--workers", "2"])) == 0
    return where


def test_what_cannot_be_used_is_named_once(out: Path) -> None:
    failed = [(row["video"], row["reason"]) for _, row in read_rows(out / "failed.jsonl")]
    assert [name for name, _ in failed] == sorted(BAD)
    for name, reason in failed:
        assert BAD[name] in reason and name in reason and "\n" not in reason


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.name)
def test_an_odd_file_gives_what_a_plain_one_gives(kind: Kind, folder: Path, out: Path) -> None:
    (video,) = (row for row in read_records(out / "videos.jsonl", Video) if row.name == kind.name)
    shown = (321, 241) if kind.size == (321, 241) else (WIDTH, HEIGHT)
    assert (video.width, video.height) == shown
    assert video.duration_s == pytest.approx(max(END_S, kind.audio_s), abs=0.3)
    first, second = (row for row in read_records(out / "narratives.jsonl", Narrative) if row.video == kind.name)
    assert (first.start_s, first.end_s) == (pytest.approx(2.6, abs=0.25), pytest.approx(9.0, abs=0.25))
    assert (second.start_s, second.end_s) == (pytest.approx(9.8, abs=0.3), pytest.approx(14.0, abs=0.3))
    assert load_image(out / first.image).size == shown
    errors = [
        np.hypot(point.x * WIDTH - place[0], point.y * HEIGHT - place[1])
        for point in first.trace
        if (place := cursor_at(point.t_s)) is not None
    ]
    assert len(errors) > 20 and np.median(errors) < 2.5
    (caption,) = (
        row for row in read_records(out / "captions.jsonl", GroundedCaption) if row.id == first.id
    )
    box = caption.phrases[0].box
    assert box is not None
    x0, y0, x1, y1 = FINDING
    assert abs(box.x1 * WIDTH - x0) < 16 and abs(box.x2 * WIDTH - x1) < 16
    assert abs(box.y1 * HEIGHT - y0) < 16 and abs(box.y2 * HEIGHT - y1) < 16


def test_the_picture_is_the_same_whatever_the_file(out: Path) -> None:
    plain = np.asarray(load_image(out / "frames" / "plain-000.png")).astype(float)
    for kind in GOOD:
        picture = load_image(out / "frames" / f"{Path(kind.name).stem}-000.png").resize((WIDTH, HEIGHT))
        # Half the pixels in one direction leave less detail.
        assert np.abs(np.asarray(picture) - plain).mean() < (9 if kind.aspect else 5), kind.name


def test_a_change_of_size_on_the_way_is_followed(tmp_path: Path) -> None:
    """As in recordings of video calls: the same raw stream goes on with smaller pictures."""
    make(tmp_path / "large.h264", Kind(""))
    make(tmp_path / "small.h264", Kind("", size=(160, 120)))
    path = tmp_path / "call.h264"
    path.write_bytes((tmp_path / "large.h264").read_bytes() + (tmp_path / "small.h264").read_bytes())
    reader = VideoReader(path)
    frames = list(reader.frames())
    assert frames[-1].t_s == pytest.approx(2 * END_S * FPS / reader.video.fps, abs=0.3)
    assert {frame.y.shape for frame in frames} == {(HEIGHT, WIDTH)}
    assert {(frame.source.width, frame.source.height) for frame in frames if frame.source} == {(WIDTH, HEIGHT)}


MEMORY = r"""
import re, sys
from pathlib import Path
from medllava.instruct_gen.narrator import narrate
video, out = map(Path, sys.argv[1:])
(out / "frames").mkdir(parents=True)
chunks = list(narrate(video, video.with_suffix(".srt"), out).records)
# Not getrusage(): a process inherits the peak of the one that started it.
peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1))
print(len(chunks), peak // 1024)
"""


def test_4k_takes_less_than_a_gibibyte(tmp_path: Path) -> None:
    video = tmp_path / "large.mp4"
    options = {"crf": "28", "preset": "ultrafast"}
    make(video, Kind("", size=(3840, 2160), times=tuple(3 + n / 10 for n in range(50)), options=options))
    video.with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:04,000\nHere is a gland with a lumen.\n")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(video), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chunks, mebibytes = map(int, done.stdout.split())
    assert chunks == 1
    assert mebibytes < 1024
