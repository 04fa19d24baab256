from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from medllava.errors import run_cli
from medllava.geometry import Box
from medllava.images import load_image
from medllava.instruct_gen import narrate
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.records import GroundedCaption, Narrative, Video
from medllava.jsonl import read_json, read_records, read_rows

CLIPS = Path(os.environ.get("MEDLLAVA_CLIPS", Path(__file__).parents[3] / "shared" / "clips"))


def narrated(*arguments: object) -> int:
    return run_cli(lambda: main(["narrate", *map(str, arguments)]))


def copied(lecture, folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(lecture.path, folder / f"{name}.mp4")
        shutil.copy(lecture.path.with_suffix(".srt"), folder / f"{name}.srt")
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def out(lecture, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("narrated")
    assert narrated("--videos", lecture.path.parent, "--out", where, "--workers", 1) == 0
    return where


def test_records_of_a_lecture(lecture, out):
    (video,) = read_records(out / "videos.jsonl", Video)
    assert (video.name, video.width, video.height) == ("case7.mp4", 320, 240)
    first, second = read_records(out / "narratives.jsonl", Narrative)
    assert (first.id, second.id) == ("case7-000", "case7-001")
    # The title is no chunk; the fields are, with their times.
    assert (first.start_s, first.end_s) == (pytest.approx(2.6, abs=0.25), pytest.approx(9.0, abs=0.25))
    assert second.start_s == pytest.approx(9.8, abs=0.25)
    assert first.crop_px == (0, 0, 320, 240)
    assert [u.text for u in first.utterances] == ["Here is a gland with a lumen."]
    assert second.trace == ()
    assert list(read_rows(out / "failed.jsonl")) == []


def test_the_trace_follows_the_cursor(lecture, out):
    first, _ = read_records(out / "narratives.jsonl", Narrative)
    errors = []
    for point in first.trace:
        place = lecture.cursor(point.t_s)
        if place is not None:
            errors.append(np.hypot(point.x * 320 - place[0], point.y * 240 - place[1]))
    assert len(errors) > 30
    assert np.median(errors) < 1.5
    assert np.mean(np.array(errors) < 8) > 0.95
    assert all(0 <= point.confidence <= 1 for point in first.trace)


def test_the_phrase_gets_the_box_and_the_aside_none(lecture, out):
    first, second = read_records(out / "captions.jsonl", GroundedCaption)
    box = first.phrases[0].box
    assert box is not None
    assert box.iou(Box(x1=90 / 320, y1=70 / 240, x2=170 / 320, y2=150 / 240)) > 0.7
    assert [phrase.box for phrase in second.phrases] == [None]


def test_the_picture_shows_the_field_without_the_cursor(lecture, out):
    first, _ = read_records(out / "narratives.jsonl", Narrative)
    picture = np.asarray(load_image(out / first.image)).astype(int)
    assert picture.shape == (240, 320, 3)
    difference = np.abs(picture - lecture.first_field).mean(2)
    assert difference.mean() < 8
    # The crosshair is black: where it was would differ by more than 100.
    assert difference.max() < 60


def test_workers_change_no_byte(lecture, tmp_path):
    videos = copied(lecture, tmp_path / "videos", "b", "a", "c")
    for workers in (1, 3):
        assert narrated("--videos", videos, "--out", tmp_path / f"out{workers}", "--workers", workers) == 0
    one, three = everything(tmp_path / "out1"), everything(tmp_path / "out3")
    assert one == three
    names = [row["video"] for _, row in read_rows(tmp_path / "out1" / "narratives.jsonl")]
    assert names == ["a.mp4", "a.mp4", "b.mp4", "b.mp4", "c.mp4", "c.mp4"]


def test_a_second_run_reuses_what_is_finished(lecture, tmp_path, monkeypatch):
    videos = copied(lecture, tmp_path / "videos", "a", "b")
    where = tmp_path / "out"
    assert narrated("--videos", videos, "--out", where, "--workers", 1) == 0
    before = everything(where)
    worked = []
    from medllava.instruct_gen import narrator

    whole = narrator.narrate
    monkeypatch.setattr(narrator, "narrate", lambda video, *rest: worked.append(video.name) or whole(video, *rest))
    (where / "captions.jsonl").unlink()
    (where / "parts" / "b.mp4.jsonl").write_text('{"half')
    assert narrated("--videos", videos, "--out", where, "--workers", 1) == 0
    assert worked == ["b.mp4"]
    assert everything(where) == before
    (videos / "a.srt").write_text("1\n00:00:04,000 --> 00:00:06,000\nOther words.\n")
    assert narrated("--videos", videos, "--out", where, "--workers", 1) == 0
    assert worked == ["b.mp4", "a.mp4"]


def test_bad_videos_are_named_while_the_rest_goes_on(lecture, tmp_path, capsys):
    videos = copied(lecture, tmp_path / "videos", "good", "silent", "late")
    (videos / "silent.srt").unlink()
    (videos / "late.srt").write_text("1\n00:01:00,000 --> 00:01:02,000\nToo late.\n")
    (videos / "empty.mp4").touch()
    (videos / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    where = tmp_path / "out"
    assert narrated("--videos", videos, "--out", where, "--workers", 1) == 0
    failed = {row["video"]: row["reason"] for _, row in read_rows(where / "failed.jsonl")}
    assert list(failed) == ["empty.mp4", "late.mp4", "noise.mp4", "silent.mp4"]
    assert "0 bytes" in failed["empty.mp4"] and "no transcript" in failed["silent.mp4"]
    assert "62.0 s, but the video is 14.0 s" in failed["late.mp4"]
    assert all("\n" not in reason and name.removesuffix(".mp4") in reason for name, reason in failed.items())
    assert {row["video"] for _, row in read_rows(where / "narratives.jsonl")} == {"good.mp4"}
    assert "warning: 4 of 5 videos failed" in capsys.readouterr().out


def test_no_usable_video_is_an_error(tmp_path, capsys):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "empty.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHi.\n")
    assert narrated("--videos", tmp_path / "empty.mp4", "--out", tmp_path / "out") == 1
    assert "empty.mp4: the file is empty" in capsys.readouterr().err
    assert narrated("--videos", tmp_path / "absent", "--out", tmp_path / "out") == 1
    (tmp_path / "nothing").mkdir()
    assert narrated("--videos", tmp_path / "nothing", "--out", tmp_path / "out") == 1
    assert not (tmp_path / "out" / "narratives.jsonl").exists()


def test_a_video_damaged_half_way_leaves_nothing(lecture, tmp_path):
    videos = copied(lecture, tmp_path / "videos", "broken")
    data = bytearray((videos / "broken.mp4").read_bytes())
    at, end = data.index(b"mdat"), data.index(b"moov")
    cut = at + (end - at) * 9 // 10
    data[cut : end - 8] = bytes(end - 8 - cut)
    (videos / "broken.mp4").write_bytes(data)
    assert narrated("--videos", videos, "--out", tmp_path / "out") == 1
    assert list(everything(tmp_path / "out")) == ["failed.jsonl"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(lecture, tmp_path, monkeypatch, capsys):
    videos = copied(lecture, tmp_path / "videos", "a")
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert narrated("--videos", videos, "--out", tmp_path / "out", "--workers", 1) == 1
    assert "No space left" in capsys.readouterr().err
    assert everything(tmp_path / "out") == {}


def test_videos_that_would_share_ids_are_refused(lecture, tmp_path, capsys):
    videos = copied(lecture, tmp_path / "videos", "a")
    shutil.copy(videos / "a.mp4", videos / "a.mkv")
    assert narrated("--videos", videos, "--out", tmp_path / "out") == 1
    assert "two videos are named a" in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, medllava.instruct_gen.narrate as n, argparse; n.configure(argparse.ArgumentParser());"
        "sys.exit(bool({'av', 'cv2', 'numpy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert narrate.HELP


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the clips with known truth are not here (set MEDLLAVA_CLIPS)")
def test_clips_with_known_truth(tmp_path):
    spec = importlib.util.spec_from_file_location("score", CLIPS / "score.py")
    assert spec is not None and spec.loader is not None
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    videos = tmp_path / "clips"
    videos.mkdir()
    for name in ("clip2", "clip4"):
        for ending in (".mp4", ".words.json", ".truth.json"):
            (videos / (name + ending)).symlink_to(CLIPS / (name + ending))
    assert narrated("--videos", videos, "--out", tmp_path / "out", "--workers", 1) == 0
    figures = scorer.score(str(videos), str(tmp_path / "out"))
    assert figures["static_precision"] >= 0.97 and figures["static_recall"] >= 0.97
    assert figures["cursor_recall_2pct"] >= 0.93 and figures["cursor_precision_2pct"] >= 0.91
    assert figures["cursor_median_px_at_720p"] <= 2.5
    assert figures["phrase_box_mean_iou"] >= 0.5 and figures["phrase_box_centre_in_truth"] >= 0.85
    assert figures["asides_given_a_box"] <= 0.1


def test_a_seed_that_cannot_be_one(lecture, tmp_path, capsys):
    assert narrated("--videos", lecture.path.parent, "--out", tmp_path, "--seed", -1) == 1
    assert "--seed -1: expected 0 to" in capsys.readouterr().err


def test_the_published_rule_can_be_chosen_and_is_recorded(lecture, out, tmp_path):
    videos = copied(lecture, tmp_path / "videos", "case7")
    assert narrated("--videos", videos, "--out", tmp_path, "--grounding", "paper", "--seed", 3) == 0
    summary = read_json(tmp_path / "narrate.json")
    assert (summary["options"]["grounding"], summary["options"]["seed"]) == ("paper", 3)
    published = next(read_records(tmp_path / "captions.jsonl", GroundedCaption))
    ours = next(read_records(out / "captions.jsonl", GroundedCaption))
    assert [phrase.text for phrase in published.phrases] == [phrase.text for phrase in ours.phrases]
    assert published.phrases[0].box != ours.phrases[0].box and published.phrases[0].confidence is None
    assert read_json(out / "narrate.json")["no_box"] == {"no cursor": 1}
    assert 0 < ours.phrases[0].confidence <= 1
