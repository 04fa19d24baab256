"""Reading a video once, at low cost: frames in YUV, about eight a second, with their own presentation times.

Detection never needs RGB, full resolution or every frame. Frames that no other frame depends on are not even decoded
where enough others remain, which more than halves the work on ordinary H.264.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from medllava.errors import DataError
from medllava.instruct_gen.records import Video

Plane = npt.NDArray[np.uint8]

LINES = 360
"""Luma is worked on at about this many lines (a whole-number reduction of the frame)."""

STEP_S = 0.1
"""Frames closer together than this are not looked at."""

LARGEST_GAP_S = 0.17
"""Undecoded frames may leave gaps of at most this: a cursor is lost in longer ones."""

LOOK_AHEAD = 40
LOOK_AHEAD_BYTES = 150e6
"""Frames decoded before the choice of what to leave undecoded is confirmed; fewer of very large ones."""

CUT_SHORT_S = 1.5
"""A stream that ends this much before its header says is damaged."""

WIDEST_PIXEL = 4.0
"""Pixels more oblong than this are a mistake in the header and are taken for squares."""


@dataclass(frozen=True)
class Frame:
    """One sampled frame. ``y`` is luma reduced to about 360 lines, ``u`` and ``v`` half as large; all are upright, in
    square pixels.

    ``source`` is the decoded frame, full size, as it is stored; None once it has been let go of to save memory.
    """

    t_s: float
    y: Plane
    u: Plane
    v: Plane
    source: av.VideoFrame | None


class VideoReader:
    """``path`` opened for reading. Raises DataError in one line where it is not a video that can be decoded.

    Frames are seen as a player shows them: turned as the file's display matrix asks, oblong pixels stretched to squares
    (the frame grows), all at the size of the first. Interlaced frames are not parted into fields: what holds
    still looks the same without it. Nothing of the file's metadata (title, author, place, device) is read.

    Attributes: ``video`` (as probed), ``reduction`` (frame pixels per pixel of ``Frame.y``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes); expected a video")
        with self._open() as container:
            stream = self._stream(container)
            first = self._first_frame(container)
            self._turns = round(first.rotation / 90) % 4
            self._stored = first.width, first.height
            self._has_times = first.time is not None
            self._shown = _in_square_pixels(first.width, first.height, stream.sample_aspect_ratio)
            width, height = reversed(self._shown) if self._turns % 2 else self._shown
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            self.duration_s = _duration_s(container, stream)
            if not self.duration_s:
                # Streamed recordings (MKV, WebM) are often without.
                self.duration_s = self._last_packet_s()
            self.video = Video(
                name=path.name,
                width=width,
                height=height,
                fps=round(rate, 3) or 1.0,
                duration_s=round(self.duration_s or 1e-3, 3),
            )
        self.reduction = max(1, round(height / LINES))

    def frames(self) -> Iterator[Frame]:
        """Every frame that is worth a look, in order of time. Raises DataError where decoding stops before the end."""
        last_s = -1.0
        for source, t_s in self._decoded():
            if t_s - last_s >= STEP_S - 1e-4:
                last_s = t_s
                yield self._reduced(source, t_s)

    def upright(self, picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A whole stored frame (rows first) as a player shows it."""
        if self._shown != self._stored:
            picture = cv2.resize(picture, self._shown, interpolation=cv2.INTER_CUBIC)
        return self._turned(picture)

    def _turned(self, picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(np.rot90(picture, self._turns)) if self._turns else picture

    # -- decoding ------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        try:
            return av.open(str(self.path), metadata_errors="ignore")
        except (av.error.FFmpegError, ValueError) as error:
            raise DataError(f"{self.path}: not a video that can be read ({_reason(error)})") from error

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise DataError(f"{self.path}: holds no video stream")
        moving = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not moving:
            raise DataError(f"{self.path}: holds a cover picture and no video")
        stream = moving[0]
        if stream.codec_context is None:
            raise DataError(f"{self.path}: no decoder for this video's codec; convert it to H.264 first")
        # Videos are shared out over processes; threads inside one of them would only add overhead.
        stream.thread_type = "NONE"
        return stream

    def _first_frame(self, container: Any) -> av.VideoFrame:
        try:
            for frame in container.decode(self._stream(container)):
                return frame
        except av.error.FFmpegError as error:
            raise DataError(f"{self.path}: the video cannot be decoded ({_reason(error)})") from error
        raise DataError(f"{self.path}: holds no video frame")

    def _decoded(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """(frame, seconds), without the frames that no other depends on if that leaves no gap above LARGEST_GAP_S.

        All bidirectional frames would be cheaper to leave out, but others may depend on some of them: the picture then
        keeps a cursor where it no longer is.
        """
        # Without time stamps (raw streams) frames can only be counted, and all of them have to be.
        if self._has_times:
            frames = self._decode("NONREF")
            held_bytes = 1.5 * self.video.width * self.video.height
            count = max(10, min(LOOK_AHEAD, int(LOOK_AHEAD_BYTES / held_bytes)))
            head = deque(islice(frames, count))
            gaps = np.diff([t_s for _, t_s in head])
            if len(head) == count and np.quantile(gaps, 0.95) <= LARGEST_GAP_S:
                while head:  # each is let go of once it has been looked at
                    yield head.popleft()
                yield from frames
                return
            frames.close()
        yield from self._decode("DEFAULT")

    def _decode(self, skip: str) -> Any:
        with self._open() as container:
            stream = self._stream(container)
            stream.codec_context.skip_frame = skip
            only(container, stream)
            tick_s = float(stream.time_base)
            start_s = (container.start_time or 0) / av.time_base
            last_s = newest_s = 0.0
            try:
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise DataError(f"{self.path}: the file is damaged after {newest_s:.1f} s")
                    if packet.pts is not None:
                        newest_s = max(newest_s, packet.pts * tick_s - start_s)
                    for frame in packet.decode():
                        time_s = frame.time - start_s if frame.time is not None else last_s + 1 / self.video.fps
                        last_s = max(time_s, last_s)
                        yield frame, last_s
            except av.error.FFmpegError as error:
                raise DataError(
                    f"{self.path}: the file is damaged: cannot be decoded after {last_s:.1f} s ({_reason(error)})"
                ) from error
            ends_s = max(self.duration_s, newest_s)
            if last_s < ends_s - CUT_SHORT_S - 1 / self.video.fps and not self._goes_on_without_pictures(newest_s):
                raise DataError(f"{self.path}: the file is damaged: decoding ends at {last_s:.1f} s of {ends_s:.1f} s")

    def _goes_on_without_pictures(self, newest_s: float) -> bool:
        """Is the file whole, its last picture shown until the sound ends, rather than cut?"""
        last_s = self._last_packet_s()
        return newest_s < last_s - CUT_SHORT_S and last_s > self.duration_s - CUT_SHORT_S

    def _last_packet_s(self) -> float:
        """When the file's last packet of any kind ends, seconds from its start. Cheap: nothing is decoded."""
        with self._open() as container:
            start_s = (container.start_time or 0) / av.time_base
            ends = (
                float((packet.pts + (packet.duration or 0)) * packet.time_base) - start_s
                for packet in container.demux()
                if packet.pts is not None
            )
            return max(ends, default=0.0)

    # -- planes --------------------------------------------------------------------------------------------------

    def _reduced(self, source: av.VideoFrame, t_s: float) -> Frame:
        if (source.width, source.height) != self._stored:
            # Recordings of video calls change their size on the way.
            source = source.reformat(width=self._stored[0], height=self._stored[1])
        width, height = (max(4, size // (2 * self.reduction) * 2) for size in self._shown)
        square = self._shown == self._stored
        y, u, v = planes(source)
        return Frame(
            t_s,
            self._turned(_shrunk(y, width, height, square and self.reduction == 1)),
            self._turned(_shrunk(u, width // 2, height // 2, square and self.reduction == 1)),
            self._turned(_shrunk(v, width // 2, height // 2, square and self.reduction == 1)),
            source,
        )


def only(container: Any, wanted: Any) -> None:
    """Let the container read the packets of no other stream than ``wanted``."""
    for stream in container.streams:
        if stream.index != wanted.index:
            stream.discard = av.stream.Discard.all


def planes(source: av.VideoFrame) -> tuple[Plane, Plane, Plane]:
    """Y, U, V of a frame as arrays (4:2:0), without a copy where the frame already is 8 bit 4:2:0."""
    if source.format.name not in {"yuv420p", "yuvj420p"}:
        source = source.reformat(format="yuv420p")
    found = []
    for plane in source.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        found.append(rows[: plane.height, : plane.width])
    return found[0], found[1], found[2]


def _shrunk(plane: Plane, width: int, height: int, by_cutting: bool) -> Plane:
    if plane.shape == (height, width):
        return plane
    if by_cutting:
        return np.ascontiguousarray(plane[:height, :width])
    return np.asarray(cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _duration_s(container: Any, stream: Any) -> float:
    """Length as the file's header gives it; 0 if it gives none."""
    length_s = container.duration / av.time_base if container.duration else 0.0
    return float(stream.duration * stream.time_base if stream.duration is not None else length_s)


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _in_square_pixels(width: int, height: int, aspect: Any) -> tuple[int, int]:
    """Width and height with which a frame of oblong pixels looks as it should; it grows along their longer side."""
    ratio = float(aspect or 1)
    if ratio == 1 or not 1 / WIDEST_PIXEL <= ratio <= WIDEST_PIXEL:
        return width, height
    return (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip()
