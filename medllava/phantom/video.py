"""H.264 in MP4 through PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

KEY_FRAME_S = 4
"""Seconds between key frames, as in web video."""


def write_h264(path: Path, frames: Iterable[NDArray[np.uint8]], width: int, height: int, fps: int) -> None:
    """Encode I420 frames, (height * 3 / 2, width) bytes each, into an MP4 without sound.

    One thread and fixed settings: the same frames give the same bytes on one build of x264.
    """
    options = {"preset": "ultrafast", "crf": "22", "threads": "1"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.gop_size = KEY_FRAME_S * fps
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
