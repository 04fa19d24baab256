"""How much tissue a picture shows, estimated from the size of its nuclei, and what the narrator says about it.

Nuclei of resting cells are about 7 micrometres across in nearly all tissues, which makes them a ruler in every picture.
Their dye is separated by colour deconvolution (Ruifrok and Johnston, 2001); compact spots of it are measured. This is
an estimate of micrometres per pixel of *this picture*: a recording is scaled, so the objective alone would not give it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import hypot
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

NUCLEUS_UM = 7.0
"""Usual diameter of a nucleus in a section, in micrometres."""

OBJECTIVES = (1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 100.0)

UM_AT_1X = 10.0
"""Micrometres per pixel times magnification, as slide scanners have it: 0.5 at 20x, 0.25 at 40x."""

FEWEST = 12
"""Nuclei below which there is no estimate."""

SMALLEST_PX, LARGEST = 3.0, 0.12
"""Diameters that are looked at: at least so many pixels, at most this share of the picture's shorter side."""

SOLID = 0.85
"""Area over that of the convex hull: less is a clump or a strand."""

LONGEST = 4.5
"""Ratio of axes above which a spot is a fibre."""

LEAST_CONFIDENCE = 0.4
"""Estimates below are not given."""

WORKED_ON_PX = 1280
"""Larger pictures are measured at this width."""

_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float64)
_HEMATOXYLIN = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True))[:, 0].astype(np.float32)

_NUMBER = {"two": 2, "four": 4, "five": 5, "ten": 10, "twenty": 20, "forty": 40, "sixty": 60, "hundred": 100}
_SAID = re.compile(
    r"\b(\d{1,3}(?:\.\d)?|" + "|".join(_NUMBER) + r")[\s-]*(?:x\b|power\b|×)", re.IGNORECASE
)
_POWER = re.compile(r"\b(low|medium|intermediate|high|scanning)[\s-]+(?:power|magnification)\b", re.IGNORECASE)
_POWERS = {"scanning": 2.5, "low": 4.0, "medium": 10.0, "intermediate": 10.0, "high": 40.0}


@dataclass(frozen=True)
class Scale:
    """``mpp``: micrometres per pixel of the picture; ``confidence`` 0..1; ``nuclei``: how many it rests on."""

    mpp: float
    confidence: float
    nuclei: int


@dataclass(frozen=True)
class Magnification:
    """An objective such as "20x", and whether the narrator named it or nuclei gave it."""

    objective: str
    source: Literal["transcript", "nuclei"]


def estimate_scale(picture: npt.NDArray[np.uint8]) -> Scale | None:
    """Micrometres per pixel of an RGB ``picture`` (height x width x 3) of H&E; None where too few nuclei tell."""
    enlarged = picture.shape[1] / WORKED_ON_PX
    if enlarged > 1:
        size = (WORKED_ON_PX, round(picture.shape[0] / enlarged))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    diameters = nucleus_diameters(picture) * max(enlarged, 1)
    if len(diameters) < FEWEST:
        return None
    low, middle, high = np.quantile(np.log(diameters), (0.25, 0.5, 0.75))
    # Many nuclei of one size are sure; few, or sizes all over, are not.
    confidence = (1 - np.exp(-len(diameters) / 40)) * np.exp(-max(high - low - 0.3, 0) / 0.4)
    if confidence < LEAST_CONFIDENCE:
        return None
    return Scale(round(NUCLEUS_UM / float(np.exp(middle)), 4), round(float(confidence), 3), len(diameters))


def nucleus_diameters(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Diameters in pixels (of circles of equal area) of the compact dark spots of haematoxylin in an RGB picture."""
    density = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
    dye = cv2.transform(cv2.LUT(picture, density), _HEMATOXYLIN[None])
    dye = cv2.GaussianBlur(dye, (3, 3), 0.7)
    levels = np.clip(dye * 100, 0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = np.asarray(levels > max(threshold, 25), np.uint8)
    largest = LARGEST * min(picture.shape[:2])
    found = []
    for outline in cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        if len(outline) < 6:
            continue
        x, y, width, height = cv2.boundingRect(outline)
        if x == 0 or y == 0 or x + width == mask.shape[1] or y + height == mask.shape[0]:
            continue
        # The polygon runs through the middles of the border's pixels; half a border belongs to the area as well.
        area = cv2.contourArea(outline) + len(outline) / 2 + 1
        diameter = 2 * (area / np.pi) ** 0.5
        if not SMALLEST_PX <= diameter <= largest:
            continue
        hull_area = cv2.contourArea(cv2.convexHull(outline))
        if area < SOLID * (hull_area + len(outline) / 2 + 1):
            continue
        # No side of the tightest rectangle is longer than the upright one's diagonal, nor its area smaller than the
        # hull's. For compact spots, which most are, that settles it; the fit takes longer than all else.
        across = hypot(width, height)
        if across + 1 <= 0.99 * LONGEST * (hull_area / across + 1) or _is_short(outline):
            found.append(diameter)
    return np.array(found)


def _is_short(outline: npt.NDArray[np.int32]) -> bool:
    _, axes, _ = cv2.minAreaRect(outline)
    return bool(max(axes) + 1 <= LONGEST * (min(axes) + 1))


def magnification_said(texts: Iterable[str]) -> str | None:
    """The last magnification that was named, "20x"; "high power" and its like count as their usual objectives."""
    said: str | None = None
    for text in texts:
        for match in sorted([*_SAID.finditer(text), *_POWER.finditer(text)], key=lambda match: match.start()):
            word = match.group(1).lower()
            number = _POWERS.get(word) or _NUMBER.get(word) or float(word)
            if 1 <= number <= 100:
                said = f"{number:g}x"
    return said


def magnification(scale: Scale | None, texts: Iterable[str]) -> Magnification | None:
    """What the narrator calls it, or else the objective at which a scanner would give this scale."""
    said = magnification_said(texts)
    if said is not None:
        return Magnification(said, "transcript")
    if scale is None:
        return None
    power = UM_AT_1X / scale.mpp
    nearest = min(OBJECTIVES, key=lambda objective: abs(np.log(objective / power)))
    return Magnification(f"{nearest:g}x", "nuclei")
