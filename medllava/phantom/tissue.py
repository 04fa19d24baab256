"""Synthetic H&E: eosinophilic stroma with nuclei, and the eight findings of the grammar drawn inside known boxes.

A picture is built as three dye planes (haematoxylin, eosin, and the orange-red of keratin and haemoglobin) and turned
into colour by Beer-Lambert absorption, so that a case's stain is one small set of numbers, as in colour deconvolution
(Ruifrok and Johnston, 2001). Planes are bytes: 128 is one unit of dye.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from medllava.geometry import QUADRANTS
from medllava.phantom.grammar import FINDINGS

Plane = NDArray[np.uint8]
Pixels = NDArray[np.uint8]

REFERENCE_WIDTH = 320
"""Field width in pixels at which cells have their nominal size (``scale`` 1)."""

MARGIN = 0.02
"""Least distance of a finding's box from the field's edge and from another box, as a fraction of the side."""
MIDLINE = 0.07
"""Least distance of a finding's centre from either midline, as a fraction of the side."""
SIDES = (0.22, 0.38)
"""Range of a finding's side, as a fraction of the field's width."""

TRIES = 3000
"""Arrangements of boxes that are drawn before one of them is left away."""

_UNIT = 128
_SHIFT = 4
_FIXED = 1 << _SHIFT
"""cv2 draws at 1/16 pixel when coordinates are scaled by ``_FIXED`` and ``shift=_SHIFT``."""


@dataclass(frozen=True)
class Finding:
    """A finding and its rectangle (x0, y0, x1, y1) in pixels of the picture that holds it."""

    kind: str
    box_px: tuple[float, float, float, float]


@dataclass(frozen=True)
class Stain:
    """Colour of one slide: optical density per unit of dye for red, green and blue, and the light behind the slide."""

    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    light: tuple[float, float, float]


@dataclass
class _Dyes:
    """Dye planes of one rectangle of tissue, all (H, W) bytes; drawing on a view changes the slide."""

    hematoxylin: Plane
    eosin: Plane
    orange: Plane

    def view(self, box_px: tuple[float, float, float, float]) -> _Dyes:
        x0, y0, x1, y1 = (round(v) for v in box_px)
        rows, columns = slice(max(y0, 0), y1), slice(max(x0, 0), x1)
        return _Dyes(self.hematoxylin[rows, columns], self.eosin[rows, columns], self.orange[rows, columns])

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width = self.eosin.shape
        return width, height

    def fill(self, outline: NDArray[np.int32], hematoxylin: float, eosin: float, orange: float = 0.0) -> None:
        """Replace all dyes inside an outline from :func:`_blob`; amounts in units of dye."""
        amounts = (hematoxylin, eosin, orange)
        for plane, amount in zip((self.hematoxylin, self.eosin, self.orange), amounts, strict=True):
            cv2.fillPoly(plane, [outline], _byte(amount), cv2.LINE_AA, _SHIFT)

    def nucleus(
        self, x: float, y: float, radius: float, elongation: float, degrees: float, amount: float, eosin: float = 0.35
    ) -> None:
        """A filled ellipse of haematoxylin; ``radius`` is the geometric mean of its half axes, in pixels."""
        axes = (round(radius * elongation**0.5 * _FIXED), round(radius / elongation**0.5 * _FIXED))
        centre = (round(x * _FIXED), round(y * _FIXED))
        for plane, value in ((self.hematoxylin, amount), (self.eosin, eosin)):
            cv2.ellipse(plane, centre, axes, degrees, 0, 360, _byte(value), -1, cv2.LINE_AA, _SHIFT)


def sample_stain(rng: np.random.Generator) -> Stain:
    """The stain of one case: hue and strength of both dyes and the lamp vary as between laboratories."""
    hematoxylin = np.array([0.86, 0.98, 0.38]) * rng.uniform(0.85, 1.15) * rng.uniform(0.92, 1.08, 3)
    eosin = np.array([0.055, 0.62, 0.235]) * rng.uniform(0.80, 1.20) * rng.uniform(0.90, 1.10, 3)
    light = rng.uniform(236, 250) * rng.uniform(0.99, 1.01, 3)
    return Stain(_triple(hematoxylin), _triple(eosin), _triple(np.minimum(light, 252)))


def sample_field(
    rng: np.random.Generator,
    width: float = REFERENCE_WIDTH,
    height: float = 240,
    scale: float = 1.0,
    keep_out: tuple[float, float, float, float] | None = None,
) -> list[Finding]:
    """1 to 4 findings for one field: distinct kinds, each in its own quadrant, in an order that tells nothing.

    Count, kinds, quadrants, sizes and places are drawn independently of one another; boxes keep a margin to the
    edge and to each other, and centres keep away from the midlines, so that the quadrant is never in doubt.
    ``scale`` multiplies the findings' sides; above about 1, a field shows the fewer of them the larger they are. No box
    touches the rectangle ``keep_out`` (pixels; a talking-head inset in a corner).
    """
    count = int(rng.integers(1, 5))
    kinds = rng.permutation(list(FINDINGS))[:count]
    quadrants = rng.permutation(len(QUADRANTS))[:count]
    # A wide screen shows more tissue, not broader findings: sizes follow the 4:3 part of the field.
    reference = min(width, height * 4 / 3) * scale
    gap = MARGIN * height
    while len(kinds):
        for _ in range(TRIES):
            boxes = [_sample_box(rng, int(quadrant), width, height, reference) for quadrant in quadrants]
            taken = boxes if keep_out is None else [*boxes, keep_out]
            if all(_apart(a, b, gap) for i, a in enumerate(taken) for b in taken[:i]):
                return [Finding(str(kind), box) for kind, box in zip(kinds, boxes, strict=True)]
        # So many of this size do not fit.
        kinds, quadrants = kinds[:-1], quadrants[:-1]
    raise ValueError(f"no finding of scale {scale} fits a field of {width} x {height} beside {keep_out}")


def render_tissue(
    rng: np.random.Generator,
    width: int,
    height: int,
    findings: Sequence[Finding],
    stain: Stain,
    scale: float = 1.0,
) -> Pixels:
    """An RGB picture (height, width, 3) of stroma with ``findings`` drawn inside their boxes.

    ``scale`` is the size of the background's cells relative to a field of 320 pixels; findings follow their boxes.
    """
    dyes, grain = _stroma(rng, width, height, scale)
    for finding in findings:
        _PAINTERS[finding.kind](rng, dyes.view(finding.box_px))
    return _absorb(dyes, grain, stain)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _byte(amount: float) -> int:
    return min(round(amount * _UNIT), 255)


def _sample_box(
    rng: np.random.Generator, quadrant: int, width: float, height: float, reference: float
) -> tuple[float, float, float, float]:
    side, stretch = rng.uniform(*SIDES) * reference, np.exp(rng.uniform(-0.12, 0.12))
    # However large, it leaves its margin on one side and has its centre in its quadrant.
    largest = 1 - 2 * (MIDLINE + MARGIN)
    w, h = min(float(side * stretch), largest * width), min(float(side / stretch), largest * height)
    # Centre in the upper left quadrant, then mirrored.
    x = rng.uniform(MARGIN * width + w / 2, max((0.5 - MIDLINE) * width, MARGIN * width + w / 2))
    y = rng.uniform(MARGIN * height + h / 2, max((0.5 - MIDLINE) * height, MARGIN * height + h / 2))
    if quadrant % 2:
        x = width - x
    if quadrant >= 2:
        y = height - y
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def _apart(a: tuple[float, ...], b: tuple[float, ...], gap: float) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def _clouds(rng: np.random.Generator, width: int, height: int, period: float) -> NDArray[np.float32]:
    """Smooth noise of about unit variance whose hills are ``period`` pixels apart."""
    coarse = rng.standard_normal((int(height / period) + 4, int(width / period) + 4), dtype=np.float32)
    enlarged = cv2.resize(coarse, None, fx=period, fy=period, interpolation=cv2.INTER_CUBIC)
    return np.asarray(enlarged[:height, :width])


def _stroma(rng: np.random.Generator, width: int, height: int, scale: float) -> tuple[_Dyes, Plane]:
    """Wavy collagen with spindle nuclei, and a fine grain (bytes around 128) for all tissue."""
    bend, swell, loose = (_clouds(rng, width, height, period * scale) for period in (56, 20, 34))
    angle = rng.uniform(0, np.pi)
    x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle) * 0.34 / scale)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(np.sin(angle) * 0.34 / scale)
    phase = x + y + 2.6 * bend + 0.9 * swell
    fibres = np.sin(phase)
    strands = np.sin(2.7 * phase + 2.0 * loose)
    grain = rng.integers(0, 256, (height, width), dtype=np.uint8)
    grain = cv2.GaussianBlur(grain, (3, 3), 0)
    amount = 0.62 + 0.09 * fibres + 0.08 * strands + 0.07 * swell + 0.10 * loose
    # Clefts between bundles: the lowest valleys of the fibres let the light through.
    amount -= np.maximum(-0.5 - fibres - 0.7 * loose, 0) * 0.36
    eosin = np.clip(amount * _UNIT, 12, 255).astype(np.uint8)
    hematoxylin = np.clip((0.045 + 0.03 * bend) * _UNIT, 0, 255).astype(np.uint8)
    dyes = _Dyes(hematoxylin, eosin, np.zeros_like(eosin))
    _scatter_nuclei(rng, dyes, phase, scale)
    return dyes, grain


def _scatter_nuclei(rng: np.random.Generator, dyes: _Dyes, phase: NDArray[np.float32], scale: float) -> None:
    width, height = dyes.size
    count = int(width * height / (900 * scale * scale))
    places = rng.random((count, 2)) * (width - 3, height - 3) + 1
    radii = rng.uniform(1.9, 3.1, count) * scale
    longer = rng.uniform(1.3, 4.0, count)
    amounts = rng.uniform(0.55, 1.05, count)
    turns = rng.normal(90, 14, count)
    for (x, y), radius, elongation, amount, turn in zip(places, radii, longer, amounts, turns, strict=True):
        row, column = int(y), int(x)
        # Fibroblasts lie along the fibres: at a right angle to the slope of the phase.
        slope = np.arctan2(
            phase[row + 1, column] - phase[row - 1, column], phase[row, column + 1] - phase[row, column - 1]
        )
        dyes.nucleus(x, y, radius, elongation, float(np.degrees(slope)) + turn, amount, 0.5)


def _blob(
    rng: np.random.Generator, x: float, y: float, rx: float, ry: float, roughness: float = 0.08, points: int = 40
) -> NDArray[np.int32]:
    """An irregular closed outline in 1/16 pixels for cv2 that just fills the rectangle (x, y) -+ (rx, ry)."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = np.ones(points)
    for wave in range(2, 6):
        radius += roughness / wave**0.5 * rng.uniform(-1, 1) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
    outline = radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    low, high = outline.min(axis=0), outline.max(axis=0)
    unit = (outline - (low + high) / 2) / ((high - low) / 2)
    return np.asarray(np.round((unit * (rx, ry) + (x, y)) * _FIXED), np.int32)


def _paint_gland(rng: np.random.Generator, dyes: _Dyes) -> None:
    """Columnar cells with basal nuclei round a pale lumen."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    outer = _blob(rng, x, y, x - 1, y - 1, 0.06)
    dyes.fill(outer, 0.22, 0.70)
    centre = np.array([x, y]) * _FIXED
    lumen = (centre + (outer - centre) * 0.52).astype(np.int32)
    dyes.fill(lumen, 0.0, 0.03)
    secretion = _blob(rng, x + rng.uniform(-0.1, 0.1) * x, y, x * 0.22, y * 0.18, 0.3)
    dyes.fill(secretion, 0.0, 0.22)
    radius = min(x, y) * 0.135
    ring = 0.81
    count = int(2 * np.pi * min(x, y) * ring / (radius * 1.55))
    outline = (outer / _FIXED - (x, y)) * ring
    for index in range(count):
        at = outline[int(index * len(outline) / count)] * rng.uniform(0.94, 1.05)
        degrees = float(np.degrees(np.arctan2(at[1], at[0])))
        dyes.nucleus(x + at[0], y + at[1], radius * rng.uniform(0.85, 1.1), 1.7, degrees, rng.uniform(0.95, 1.3))


def _paint_lymphocytes(rng: np.random.Generator, dyes: _Dyes) -> None:
    """A crowd of small round dark nuclei with next to no cytoplasm."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    dyes.fill(_blob(rng, x, y, x - 2, y - 2, 0.10), 0.30, 0.42)
    radius = min(x, y) * 0.075
    count = int(0.62 * width * height / (np.pi * radius * radius))
    far = rng.random(count) ** 0.5
    turn = rng.uniform(0, 2 * np.pi, count)
    for distance, angle, amount in zip(far, turn, rng.uniform(1.05, 1.5, count), strict=True):
        reach = distance * 0.93
        dyes.nucleus(
            x + (x - radius) * reach * np.cos(angle), y + (y - radius) * reach * np.sin(angle), radius, 1.1, 0.0, amount
        )


def _paint_mitosis(rng: np.random.Generator, dyes: _Dyes) -> None:
    """One large pale cell with a clear halo and clumped dark chromatin: a metaphase plate or a crossed figure."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    dyes.fill(_blob(rng, x, y, x - 1, y - 1, 0.05), 0.0, 0.06)
    dyes.fill(_blob(rng, x, y, x * 0.80, y * 0.80, 0.06), 0.16, 0.34)
    dyes.fill(_blob(rng, x, y, x * 0.56, y * 0.56, 0.06), 0.06, 0.16)
    degrees = rng.uniform(0, 180)
    crossed = rng.random() < 0.4
    length, thickness = min(x, y) * 0.46, min(x, y) * (0.115 if crossed else 0.16)
    for turn in ((0.0, 80.0) if crossed else (0.0,)):
        for step in np.linspace(-1, 1, 7):
            angle = np.radians(degrees + turn)
            at = np.array([np.cos(angle), np.sin(angle)]) * step * length + rng.normal(0, thickness * 0.12, 2)
            dyes.nucleus(
                x + at[0], y + at[1], thickness * rng.uniform(0.85, 1.25), 1.5, degrees + turn + 90, 1.75, 0.3
            )


def _paint_necrosis(rng: np.random.Generator, dyes: _Dyes) -> None:
    """Smudged, granular, faded tissue with dark nuclear dust."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    dyes.fill(_blob(rng, x, y, x - 1, y - 1, 0.30, 60), 0.22, 0.24, 0.16)
    inside = dyes.orange > 8
    smudge = _clouds(rng, width, height, max(width / 9, 2)) * 0.09
    for plane, share in ((dyes.hematoxylin, 1.0), (dyes.eosin, -0.9)):
        plane[inside] = np.clip(plane[inside] + share * smudge[inside] * _UNIT, 0, 255).astype(np.uint8)
    count = 70
    for distance, angle, size in zip(
        rng.random(count) ** 0.5, rng.uniform(0, 2 * np.pi, count), rng.exponential(1.0, count), strict=True
    ):
        at_x, at_y = x + x * 0.74 * distance * np.cos(angle), y + y * 0.74 * distance * np.sin(angle)
        dyes.nucleus(at_x, at_y, min(x, y) * (0.016 + 0.016 * min(size, 2.5)), 1.3, np.degrees(angle), 1.15)


def _paint_keratin(rng: np.random.Generator, dyes: _Dyes) -> None:
    """Concentric lamellae of bright orange-pink keratin."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    outer = _blob(rng, x, y, x - 1, y - 1, 0.06)
    dyes.fill(outer, 0.24, 0.80, 0.20)
    for index, lamella in enumerate(_lamellae(rng, outer, (x, y), int(rng.integers(9, 13)), 0.03)):
        dense = rng.uniform(0.8, 1.0) if index % 2 == 0 else rng.uniform(0.45, 0.65)
        dyes.fill(lamella, 0.0, dense, dense * 0.85)
    for _ in range(10):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.92)
        dyes.nucleus(
            x + x * distance * np.cos(angle), y + y * distance * np.sin(angle), min(x, y) * 0.05, 2.6,
            float(np.degrees(angle)) + 90, 0.8, 0.8,
        )


def _paint_vessel(rng: np.random.Generator, dyes: _Dyes) -> None:
    """A muscular wall with flat nuclei round a lumen full of red cells."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    outer = _blob(rng, x, y, x - 1, y - 1, 0.05)
    centre = np.array([x, y]) * _FIXED
    dyes.fill(outer, 0.10, 1.05)
    dyes.fill((centre + (outer - centre) * 0.86).astype(np.int32), 0.16, 0.72)
    lumen = (centre + (outer - centre) * 0.68).astype(np.int32)
    dyes.fill(lumen, 0.0, 0.10)
    for index in range(14):
        angle = 2 * np.pi * (index + rng.uniform(-0.3, 0.3)) / 14
        at = 0.78 * np.array([x * np.cos(angle), y * np.sin(angle)])
        dyes.nucleus(
            x + at[0], y + at[1], min(x, y) * 0.06, 3.0, float(np.degrees(np.arctan2(at[1], at[0]))) + 90, 1.0, 0.7
        )
    radius = min(x, y) * 0.10
    count = 46
    for distance, angle, amount in zip(
        rng.random(count) ** 0.5, rng.uniform(0, 2 * np.pi, count), rng.uniform(0.75, 1.15, count), strict=True
    ):
        at_x, at_y = x + x * 0.56 * distance * np.cos(angle), y + y * 0.56 * distance * np.sin(angle)
        disc = _disc(at_x, at_y, radius)
        dyes.fill(disc, 0.0, amount * 1.05, amount * 0.9)


def _paint_adipose(rng: np.random.Generator, dyes: _Dyes) -> None:
    """Several large empty vacuoles with thin walls and nuclei pressed to the rim."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    dyes.fill(_blob(rng, x, y, x - 1, y - 1, 0.08), 0.08, 0.62)
    turn = rng.uniform(0, 2 * np.pi)
    cells = [(0.0, 0.0, 0.30), *((0.66, turn + np.pi * (i / 3 + rng.uniform(-0.02, 0.02)), 0.31) for i in range(6))]
    for distance, angle, radius in cells:
        at_x, at_y = x + x * distance * np.cos(angle), y + y * distance * np.sin(angle)
        dyes.fill(_blob(rng, at_x, at_y, x * radius, y * radius, 0.07, 24), 0.0, 0.0)
        rim = rng.uniform(0, 2 * np.pi)
        dyes.nucleus(
            at_x + x * radius * np.cos(rim), at_y + y * radius * np.sin(rim), min(x, y) * 0.045, 2.5,
            float(np.degrees(rim)) + 90, 1.0, 0.5,
        )


def _paint_psammoma(rng: np.random.Generator, dyes: _Dyes) -> None:
    """A laminated ball of calcium, dark blue-purple, in a narrow cleft."""
    width, height = dyes.size
    x, y = width / 2, height / 2
    outer = _blob(rng, x, y, x - 1, y - 1, 0.05)
    dyes.fill(outer, 0.02, 0.12)
    for index, ring in enumerate(_lamellae(rng, outer, (x, y), 9, 0.015)):
        dense = rng.uniform(1.45, 1.7) if index % 2 == 0 else rng.uniform(0.95, 1.15)
        dyes.fill(ring, dense, dense * 0.3)


def _lamellae(
    rng: np.random.Generator, outer: NDArray[np.int32], centre: tuple[float, float], count: int, wobble: float
) -> list[NDArray[np.int32]]:
    """Outlines inside ``outer``, from the outside in: uneven in thickness, wavy, and drawn towards one side."""
    middle = np.array(centre) * _FIXED
    angles = np.linspace(0, 2 * np.pi, len(outer), endpoint=False)
    shares = 0.90 * (1 - (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count)
    drift = rng.uniform(-0.12, 0.12, 2) * (outer.max(axis=0) - outer.min(axis=0)) / 2
    outlines = []
    for share in np.minimum(shares, 0.92):
        wave = 1 + wobble * np.cos(rng.integers(3, 8) * angles + rng.uniform(0, 2 * np.pi)) / max(share, 0.3)
        points = middle + drift * (1 - share) + (outer - middle) * (share * wave)[:, None]
        outlines.append(points.astype(np.int32))
    return outlines


def _disc(x: float, y: float, radius: float) -> NDArray[np.int32]:
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    return np.round(np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1) * _FIXED).astype(
        np.int32
    )


_PAINTERS: dict[str, Callable[[np.random.Generator, _Dyes], None]] = {
    "gland": _paint_gland,
    "lymphocyte aggregate": _paint_lymphocytes,
    "mitotic figure": _paint_mitosis,
    "necrosis": _paint_necrosis,
    "keratin pearl": _paint_keratin,
    "blood vessel": _paint_vessel,
    "adipose": _paint_adipose,
    "psammoma body": _paint_psammoma,
}

_ORANGE = (0.02, 0.36, 0.62)


def _absorb(dyes: _Dyes, grain: Plane, stain: Stain) -> Pixels:
    """Light through the dyes, as bytes (H, W, 3): Beer-Lambert with one table per dye and colour."""
    hematoxylin = _grainy(dyes.hematoxylin, grain, 0.35)
    eosin = _grainy(dyes.eosin, grain, 0.25)
    orange = cv2.GaussianBlur(dyes.orange, (3, 3), 0.7)
    amounts = np.arange(256) / _UNIT
    channels = []
    for channel in range(3):
        through = cv2.LUT(hematoxylin, _table(amounts, stain.hematoxylin[channel]))
        through = cv2.multiply(through, cv2.LUT(eosin, _table(amounts, stain.eosin[channel])), scale=1 / 255)
        through = cv2.multiply(through, cv2.LUT(orange, _table(amounts, _ORANGE[channel])), scale=1 / 255)
        channels.append(cv2.convertScaleAbs(through, alpha=stain.light[channel] / 255))
    return np.asarray(cv2.merge(channels))


def _grainy(dye: Plane, grain: Plane, share: float) -> Plane:
    """The plane with soft edges, a ``share`` of it multiplied by the grain."""
    soft = cv2.GaussianBlur(dye, (3, 3), 0.7)
    # cv2.add saturates at 255 where numpy would wrap round to clear glass.
    return np.asarray(cv2.add(cv2.multiply(soft, grain, scale=share / 128), cv2.convertScaleAbs(soft, alpha=1 - share)))


def _table(amounts: NDArray[np.float64], density: float) -> Plane:
    return np.round(255 * np.exp(-amounts * density)).astype(np.uint8)
