"""Chunks of one video that show the same view: the lecturer goes back, or a cut parts what goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from medllava.instruct_gen.picture import Crop
from medllava.instruct_gen.video import Plane

HASH_ROWS, HASH_COLUMNS = 8, 8
FARTHEST = 10
"""Bits, of 64, by which the perceptual hashes of one view may differ (compression, a talking head)."""

ROWS, COLUMNS = 72, 128
"""Size of the thumbnails that are correlated: fine enough for a view that moved by 2 % to be another one."""

SAME = 0.9
"""Least correlation of the thumbnails of one view."""

CROP_TOLERANCE = 0.02
"""Share of the frame's longer side by which the pictures' rectangles may differ."""


@dataclass(frozen=True)
class _View:
    identity: str
    crop: Crop
    hash: npt.NDArray[np.bool_]
    small: Plane


@dataclass
class Views:
    """The views of a video so far, some 9 KB each."""

    _seen: list[_View] = field(default_factory=list)

    def find_or_add(self, identity: str, luma: Plane, crop: Crop) -> str | None:
        """The id of the first chunk that shows the view ``luma`` (its background), else None; then it is a new one.

        Boxes can be carried over between chunks of one view: the pictures lie on each other to about 1 % of a side.
        """
        view = _View(identity, crop, _hash(luma), _small(luma))
        thumbnail: npt.NDArray[np.float32] | None = None
        tolerance = CROP_TOLERANCE * max(crop[2] - crop[0], crop[3] - crop[1])
        for other in self._seen:
            if max(abs(a - b) for a, b in zip(crop, other.crop, strict=True)) > tolerance:
                continue
            if np.count_nonzero(view.hash != other.hash) > FARTHEST:
                continue
            thumbnail = _thumbnail(view.small) if thumbnail is None else thumbnail
            if float((thumbnail * _thumbnail(other.small)).mean()) >= SAME:
                return other.identity
        self._seen.append(view)
        return None


def _hash(luma: Plane) -> npt.NDArray[np.bool_]:
    """Difference hash: is a place brighter than the one right of it?"""
    small = cv2.resize(luma, (HASH_COLUMNS + 1, HASH_ROWS), interpolation=cv2.INTER_AREA).astype(np.int16)
    return np.asarray(small[:, 1:] > small[:, :-1])


def _small(luma: Plane) -> Plane:
    return np.asarray(cv2.resize(luma, (COLUMNS, ROWS), interpolation=cv2.INTER_AREA), np.uint8)


def _thumbnail(small: Plane) -> npt.NDArray[np.float32]:
    """What is correlated: made when it is needed, because it is four times as large as what it is made of."""
    fine = small.astype(np.float32)
    # Fine structure only: two fields of one slide share their broad shading.
    fine -= cv2.GaussianBlur(fine, (0, 0), 8)
    return np.asarray((fine - fine.mean()) / (fine.std() + 1e-3), np.float32)
