from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medllava.errors import DataError
from medllava.instruct_gen.video import LARGEST_GAP_S, VideoReader


def test_frames_are_sampled_in_order_without_long_gaps(lecture):
    reader = VideoReader(lecture.path)
    frames = list(reader.frames())
    times = np.array([frame.t_s for frame in frames])
    assert (reader.video.width, reader.video.height, reader.reduction) == (320, 240, 1)
    assert reader.video.fps == pytest.approx(15)
    assert reader.video.duration_s == pytest.approx(14, abs=0.1)
    assert (np.diff(times) > 0).all()
    assert np.quantile(np.diff(times), 0.9) <= LARGEST_GAP_S + 0.04
    assert times[-1] > 13.7
    assert frames[0].y.shape == (240, 320)
    assert frames[0].u.shape == frames[0].v.shape == (120, 160)


def test_a_low_frame_rate_keeps_all_frames(tmp_path: Path):
    from fractions import Fraction

    import av

    path = tmp_path / "slow.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(80):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(list(VideoReader(path).frames())) == 80


def test_empty_and_foreign_files_are_refused(tmp_path: Path):
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.mp4: the file is empty"):
        VideoReader(empty)
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(b"not a video" * 100)
    with pytest.raises(DataError, match=r"noise\.mp4: not a video"):
        VideoReader(noise)


def test_a_cut_file_is_refused(lecture, tmp_path: Path):
    data = lecture.path.read_bytes()
    cut = tmp_path / "cut.mp4"
    # The index (moov) is at the end: without it nothing can be read.
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.mp4"):
        list(VideoReader(cut).frames())


def test_a_damaged_tail_is_refused(lecture, tmp_path: Path):
    data = bytearray(lecture.path.read_bytes())
    at = data.index(b"mdat")
    end = data.index(b"moov", at)
    middle = (at + end) // 2
    data[middle : end - 8] = bytes(end - 8 - middle)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.mp4: the file is damaged"):
        list(VideoReader(broken).frames())


def test_a_rotated_video_is_turned_upright(tmp_path: Path):
    import av

    path = tmp_path / "portrait.mp4"
    page = np.zeros((48, 96, 3), np.uint8)
    page[:, :48] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    # The display matrix of the track header: a quarter turn clockwise.
    matrix = data.index(b"tkhd") + 4 + 40
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(int(v).to_bytes(4, "big", signed=True) for v in turned)
    path.write_bytes(data)
    reader = VideoReader(path)
    frame = next(iter(reader.frames()))
    assert (reader.video.width, reader.video.height) == (48, 96)
    assert frame.y.shape == (96, 48)
    # What was on the left is on top after a clockwise turn.
    assert frame.y[:40].mean() > 200 > 60 > frame.y[-40:].mean()
