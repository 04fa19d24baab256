from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from medllava.errors import ConfigError
from medllava.phantom.__main__ import main

ENDINGS = (".mp4", ".srt", ".words.json", ".truth.json")


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def clock(text: str) -> float:
    hours, minutes, seconds = text.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_files_of_each_video(videos: Path) -> None:
    assert sorted(p.name for p in videos.iterdir()) == sorted(
        f"phantom-5-{number:04d}{ending}" for number in range(1, 5) for ending in ENDINGS
    )


def test_video_decodes_to_the_stated_frames(videos: Path, truths: list[dict[str, Any]]) -> None:
    for truth in truths:
        with av.open(str(videos / truth["video"])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == truth["fps"]
            times = [frame.time for frame in container.decode(stream)]
        assert len(times) == truth["frames"] == len(truth["cursor_xy_px"])
        assert times[-1] == pytest.approx((truth["frames"] - 1) / truth["fps"])
        assert truth["static"][-1][1] == truth["frames"] / truth["fps"]


def test_background_holds_still_where_the_truth_says_and_moves_between(
    videos: Path, truths: list[dict[str, Any]]
) -> None:
    truth = truths[0]
    frames = decode(videos / truth["video"])
    assert frames[0].shape == (truth["height"], truth["width"], 3)
    spans = [(round(a * truth["fps"]), round(b * truth["fps"])) for a, b, _ in truth["static"]]
    for start, end in spans:
        change = np.abs(frames[start].astype(int) - frames[end - 1]).max(axis=2)
        # Only the pointer, and what compression makes of it, differ.
        assert (change > 40).mean() < 0.03
    for (_, end), (start, _) in zip(spans[1:], spans[2:], strict=False):
        assert start - end >= 2
        assert (np.abs(frames[end - 1].astype(int) - frames[end]).max(axis=2) > 12).mean() > 0.05


def test_pointer_is_drawn_where_the_truth_says(videos: Path, truths: list[dict[str, Any]]) -> None:
    """Against the median of its dwell, a frame differs near the pointer and nowhere else."""
    for truth in truths:
        if truth["webcam_px"]:
            continue
        frames = decode(videos / truth["video"])
        start, end, _ = truth["static"][1]
        first, last = round(start * truth["fps"]), round(end * truth["fps"])
        background = np.median(np.stack(frames[first:last]), axis=0)
        near = 0
        for number in range(first, last):
            position = truth["cursor_xy_px"][number]
            difference = np.abs(frames[number] - background).max(axis=2)
            if position is None or difference.max() < 80:
                continue
            rows, columns = np.nonzero(difference > 0.6 * difference.max())
            reach = truth["cursor_size_px"] + 3
            assert np.abs(columns.mean() - position[0]) < reach
            assert np.abs(rows.mean() - position[1]) < reach
            near += 1
        assert near > 5


def test_transcripts_agree(videos: Path, truths: list[dict[str, Any]]) -> None:
    for truth in truths:
        stem = truth["video"].removesuffix(".mp4")
        segments = json.loads((videos / f"{stem}.words.json").read_text())["segments"]
        blocks = (videos / f"{stem}.srt").read_text().strip().split("\n\n")
        assert len(blocks) == len(segments) == len(truth["utterances"])
        for number, (block, segment, utterance) in enumerate(
            zip(blocks, segments, truth["utterances"], strict=True), start=1
        ):
            index, times, text = block.split("\n")
            start, end = (clock(part) for part in times.split(" --> "))
            assert index == str(number)
            assert text == segment["text"] == utterance["text"]
            assert start == pytest.approx(segment["start"], abs=1e-6) == pytest.approx(utterance["start"])
            assert end == pytest.approx(segment["end"], abs=1e-6) == pytest.approx(utterance["end"])
            assert [w["word"] for w in segment["words"]] == re.findall(r"[\w'-]+", text)
            edges = [t for w in segment["words"] for t in (w["start"], w["end"])]
            assert edges == sorted(edges)
            assert edges[0] == segment["start"]
            assert edges[-1] <= segment["end"]


def test_truth_has_the_boxes_of_what_is_said(truths: list[dict[str, Any]]) -> None:
    for truth in truths:
        shown = [(f["start_s"], f["end_s"], g["kind"], g["box"]) for f in truth["fields"] for g in f["findings"]]
        for utterance in truth["utterances"]:
            assert utterance["grounded"] == (utterance["box"] is not None) == (utterance["kind"] is not None)
            if utterance["grounded"]:
                assert any(
                    start <= utterance["start"] and utterance["end"] <= end and kind == utterance["kind"]
                    and box == utterance["box"]
                    for start, end, kind, box in shown
                )
        assert [field["start_s"] for field in truth["fields"]] == [s[0] for s in truth["static"] if s[2] == "tissue"]


def test_same_bytes_whatever_the_number_of_workers(videos: Path, flags: list[str], tmp_path: Path) -> None:
    # Two processes, and only the later half of the videos: neither may matter.
    assert main(["--out", str(tmp_path), "--videos", "2", "--first", "3", "--workers", "2", *flags]) == 0
    made = read_all(tmp_path)
    assert len(made) == 2 * len(ENDINGS)
    first = read_all(videos)
    assert all(made[name] == first[name] for name in made)


def test_a_killed_run_goes_on(videos: Path, flags: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "medllava.phantom", "--out", str(tmp_path), "--videos", "4", "--workers", "1", *flags
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*.truth.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.truth.json")}
    assert finished
    # What a kill in the middle of a video leaves behind.
    (tmp_path / "phantom-5-0004.mp4").write_bytes(b"half a video")
    (tmp_path / "phantom-5-0004.truth.json").unlink(missing_ok=True)
    finished.pop("phantom-5-0004.truth.json", None)
    assert main(["--out", str(tmp_path), "--videos", "4", "--workers", "1", *flags]) == 0
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert read_all(tmp_path) == read_all(videos)


def test_other_settings_are_refused_not_mixed(videos: Path) -> None:
    with pytest.raises(ConfigError, match="other"):
        main(["--out", str(videos), "--videos", "1", "--seed", "5", "--fields", "4"])


@pytest.mark.parametrize("wrong", [["--width", "321"], ["--videos", "0"], ["--fps", "1"], ["--noise", "-1"]])
def test_impossible_settings_are_refused(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match=wrong[0]):
        main(["--out", str(tmp_path / "new"), "--videos", "1", "--seed", "0", *wrong])
    assert not (tmp_path / "new").exists()


def test_large_noisy_video_with_a_talking_head(tmp_path: Path) -> None:
    large = ["--width", "1280", "--height", "720", "--fps", "30", "--fields", "1", "--webcam", "--noise", "3"]
    assert main(["--out", str(tmp_path), "--videos", "1", "--seed", "0", "--workers", "1", *large]) == 0
    truth = json.loads((tmp_path / "phantom-0-0001.truth.json").read_text())
    frames = decode(tmp_path / "phantom-0-0001.mp4")
    assert len(frames) == truth["frames"]
    assert frames[0].shape == (720, 1280, 3)
    x0, y0, x1, y1 = truth["webcam_px"]
    start, end = (round(t * truth["fps"]) for t in truth["static"][1][:2])
    middle = np.stack(frames[start : start + 24 : 4]).astype(int)
    moving = np.abs(np.diff(middle, axis=0)).max(axis=(0, 3)) > 25
    assert moving[y0:y1, x0:x1].mean() > 0.05
    assert end - start >= 3 * truth["fps"]
    noise = np.std(frames[start + 1][300:310, 600:640].astype(int) - frames[start + 2][300:310, 600:640])
    assert noise > 1


def test_help_is_quick_and_clean_of_heavy_imports() -> None:
    code = "import sys; from medllava.phantom.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('cv2', 'av', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
