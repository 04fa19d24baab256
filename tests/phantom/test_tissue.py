from __future__ import annotations

import time
from collections import Counter

import cv2
import numpy as np
import pytest

from medllava.geometry import QUADRANTS, Point
from medllava.phantom.grammar import FINDINGS
from medllava.phantom.tissue import MARGIN, MIDLINE, Finding, render_tissue, sample_field, sample_stain


def quadrant(finding: Finding, width: float, height: float) -> str:
    x0, y0, x1, y1 = finding.box_px
    return Point(x=(x0 + x1) / 2 / width, y=(y0 + y1) / 2 / height).quadrant()


def assert_even(counts: Counter[object], cells: int) -> None:
    """Chi-square against equal counts, five standard deviations wide."""
    assert len(counts) == cells
    expected = sum(counts.values()) / cells
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    assert statistic < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def test_same_seed_same_picture() -> None:
    pictures = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        stain, findings = sample_stain(rng), sample_field(rng)
        pictures.append(render_tissue(rng, 320, 240, findings, stain))
    assert pictures[0].shape == (240, 320, 3)
    assert pictures[0].dtype == np.uint8
    assert np.array_equal(*pictures)


def test_boxes_lie_inside_apart_and_away_from_the_midlines() -> None:
    rng = np.random.default_rng(0)
    for width, height in ((320, 240), (1280, 720)):
        for _ in range(300):
            findings = sample_field(rng, width, height)
            assert 1 <= len(findings) <= 4
            assert len({f.kind for f in findings}) == len(findings)
            assert len({quadrant(f, width, height) for f in findings}) == len(findings)
            for number, finding in enumerate(findings):
                x0, y0, x1, y1 = finding.box_px
                assert x0 >= MARGIN * width - 1e-6
                assert y0 >= MARGIN * height - 1e-6
                assert x1 <= (1 - MARGIN) * width + 1e-6
                assert y1 <= (1 - MARGIN) * height + 1e-6
                assert abs((x0 + x1) / 2 / width - 0.5) >= MIDLINE - 1e-6
                assert abs((y0 + y1) / 2 / height - 0.5) >= MIDLINE - 1e-6
                for other in findings[:number]:
                    a, b = finding.box_px, other.box_px
                    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_an_inset_stays_free() -> None:
    rng = np.random.default_rng(1)
    inset = (262.0, 0.0, 320.0, 48.0)
    for _ in range(200):
        for finding in sample_field(rng, 320, 240, keep_out=inset):
            assert finding.box_px[2] < inset[0] or finding.box_px[1] > inset[3]


def test_kinds_quadrants_and_counts_are_uniform_and_independent() -> None:
    rng = np.random.default_rng(2)
    fields = [sample_field(rng) for _ in range(4000)]
    assert_even(Counter(len(findings) for findings in fields), 4)
    # Findings of one field exclude one another; one finding of each field makes independent draws.
    firsts = [(findings[0].kind, quadrant(findings[0], 320, 240)) for findings in fields]
    assert_even(Counter(kind for kind, _ in firsts), len(FINDINGS))
    assert_even(Counter(firsts), len(FINDINGS) * len(QUADRANTS))
    for count in (1, 2, 3, 4):
        assert_even(Counter(kind for (kind, _), f in zip(firsts, fields, strict=True) if len(f) == count), 8)
    pairs = Counter((f[0].kind, f[1].kind) for f in fields if len(f) > 1)
    assert_even(pairs, 8 * 7)
    layouts = {tuple(round(v) for f in findings for v in f.box_px) for findings in fields}
    assert len(layouts) > 3990


def test_findings_are_told_apart_at_the_size_a_small_model_sees() -> None:
    """A plain nearest-neighbour classifier on a field reduced to 96 x 96 names the finding, whatever the stain."""

    def look(rng: np.random.Generator, kind: str) -> np.ndarray:
        finding = Finding(kind, sample_field(rng)[0].box_px)
        picture = render_tissue(rng, 320, 240, [finding], sample_stain(rng))
        padded = np.full((320, 320, 3), 255, np.uint8)
        padded[40:280] = picture
        small = cv2.resize(padded, (96, 96), interpolation=cv2.INTER_AREA)
        x0, y0, x1, y1 = (np.array(finding.box_px) + (0, 40, 0, 40)) * 0.3
        part = small[round(y0) : round(y1), round(x0) : round(x1)]
        return cv2.resize(part, (10, 10), interpolation=cv2.INTER_LINEAR).astype(float).ravel()

    rng = np.random.default_rng(4)
    known = [(kind, look(rng, kind)) for kind in FINDINGS for _ in range(12)]
    trials = [(kind, look(rng, kind)) for kind in FINDINGS for _ in range(5)]
    right = sum(
        min(known, key=lambda pair: float(np.abs(pair[1] - pixels).sum()))[0] == kind for kind, pixels in trials
    )
    assert right >= 0.92 * len(trials)


def test_a_finding_changes_nothing_outside_its_box() -> None:
    stain = sample_stain(np.random.default_rng(0))
    plain = render_tissue(np.random.default_rng(9), 320, 240, [], stain).astype(int)
    for kind in FINDINGS:
        box = (40.0, 30.0, 130.0, 115.0)
        changed = render_tissue(np.random.default_rng(9), 320, 240, [Finding(kind, box)], stain) != plain
        rows, columns = np.nonzero(changed.any(axis=2))
        # The soft edge of the 3 x 3 blur reaches one pixel out.
        assert rows.min() >= 29
        assert rows.max() <= 115
        assert columns.min() >= 39
        assert columns.max() <= 130
        covered = (columns.max() - columns.min()) * (rows.max() - rows.min()) / (90 * 85)
        assert covered > 0.88, kind


def test_rendering_is_fast_enough_for_the_demo() -> None:
    rng = np.random.default_rng(0)
    findings, stain = sample_field(rng, 1280, 960), sample_stain(rng)
    start = time.process_time()
    render_tissue(rng, 1280, 960, findings, stain, scale=4)
    # 0.06 microseconds a pixel on one quiet core; the limit leaves room for a busy one.
    assert (time.process_time() - start) / (1280 * 960) < 0.4e-6


@pytest.mark.parametrize("scale", [1.3, 2.0, 5.0])
def test_larger_findings_are_fewer_and_still_inside(scale: float) -> None:
    fields = [sample_field(np.random.default_rng(seed), 320, 240, scale) for seed in range(3)]
    for finding in (finding for field in fields for finding in field):
        x0, y0, x1, y1 = finding.box_px
        assert 0 <= x0 < x1 <= 320 and 0 <= y0 < y1 <= 240
    assert max(map(len, fields)) <= (4 if scale < 2 else 2)


def test_a_field_that_is_all_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="no finding"):
        sample_field(np.random.default_rng(0), 320, 240, keep_out=(0, 0, 320, 240))
