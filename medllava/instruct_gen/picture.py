"""The picture of a stable chunk as it is kept: full size, without the cursor, without black bars."""

from __future__ import annotations

from collections.abc import Sequence

import av
import cv2
import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.background import median
from medllava.instruct_gen.cursor import Background
from medllava.instruct_gen.video import planes

KEPT = 13
"""Most full-size frames held for the median of a chunk."""

BLACK = 40
"""Luma up to which a border is a black bar."""

Crop = tuple[int, int, int, int]


def full_median(sources: Sequence[av.VideoFrame]) -> npt.NDArray[np.uint8]:
    """Median of full-size frames as RGB, height x width x 3, not yet rotated; colours as the source frames say."""
    stacks = list(zip(*(planes(source) for source in sources), strict=True))
    merged = [median(stack) for stack in stacks]
    height, width = merged[0].shape
    frame = av.VideoFrame(width, height, "yuvj420p" if sources[0].format.name == "yuvj420p" else "yuv420p")
    frame.colorspace, frame.color_range = sources[0].colorspace, sources[0].color_range
    for plane, values in zip(frame.planes, merged, strict=True):
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[: values.shape[0], : values.shape[1]] = values
        plane.update(padded)
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def encode_png(picture: npt.NDArray[np.uint8]) -> bytes:
    """RGB as PNG. Rows as differences to the row above, then run-length matching: on noisy pixels nearly as small as by
    the slow settings, at a sixth of their time."""
    done, data = cv2.imencode(
        ".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR),
        [
            cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP,
            cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE,
        ],
    )
    if not done:
        raise ValueError(f"a picture of shape {picture.shape} could not be encoded")
    return data.tobytes()


def find_crop(background: Background, width: int, height: int) -> Crop:
    """The frame rectangle [x0, y0, x1, y1) left when black bars are cut away; the whole frame if there are none."""
    lit = background.y > BLACK
    # A few lit pixels in a bar (compression, a logo's edge) do not make it part of the picture.
    rows, columns = lit.mean(1) > 0.02, lit.mean(0) > 0.02
    if not rows.any() or not columns.any():
        return 0, 0, width, height
    scale_y, scale_x = height / lit.shape[0], width / lit.shape[1]
    y0, y1 = _ends(rows, scale_y, height)
    x0, x1 = _ends(columns, scale_x, width)
    if (x1 - x0) * (y1 - y0) < 0.3 * width * height:
        return 0, 0, width, height
    return x0, y0, x1, y1


def _ends(lit: npt.NDArray[np.bool_], scale: float, length: int) -> tuple[int, int]:
    """First and last lit place in frame pixels; bars thinner than a hundredth are left on."""
    first, last = int(np.argmax(lit)), len(lit) - int(np.argmax(lit[::-1]))
    low = round(first * scale) if first > 0.01 * len(lit) else 0
    high = round(last * scale) if last < 0.99 * len(lit) else length
    return low, high
