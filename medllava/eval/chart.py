"""The report's chart as SVG text: every metric under every condition, with its interval."""

from __future__ import annotations

from html import escape

from medllava.eval.records import Metric, Report

COLOURS = {"real": "#1f4e9c", "no_image": "#b9bec7", "blank": "#98a0ad", "noise": "#79828f", "mismatched": "#e08a2e"}
LABELS = {
    "real": "the picture", "no_image": "no picture", "blank": "blank picture", "noise": "noise",
    "mismatched": "another picture",
}

_LEFT, _PLOT, _RIGHT = 150, 520, 70
_BAR, _GAP, _TOP = 13, 18, 40


def bar_chart(report: Report) -> str:
    """Horizontal bars grouped by metric, whiskers for the 95 % intervals, a dashed line at the constant answer."""
    shown = {"real": report.metrics, **report.ablations}
    blocks = []
    y = float(_TOP)
    for name in report.metrics:
        bars = [(condition, found[name]) for condition, found in shown.items() if name in found]
        blocks.append(_group(name, bars, report.baselines.get(name, {}).get("constant"), y))
        y += len(bars) * _BAR + _GAP
    bottom = y - _GAP + 6
    width = _LEFT + _PLOT + _RIGHT
    grid = [
        f'<line x1="{_x(tick)}" y1="{_TOP - 6}" x2="{_x(tick)}" y2="{bottom}" stroke="#e3e6ea"/>'
        f'<text x="{_x(tick)}" y="{bottom + 16}" text-anchor="middle" fill="#59616d">{tick:.1f}</text>'
        for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 24}" role="img"'
        ' font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="12">'
        "<title>Scores with the picture and without it</title>"
        + "".join(grid) + _legend(list(shown), any("constant" in found for found in report.baselines.values()))
        + "".join(blocks) + "</svg>"
    )


def _x(value: float) -> float:
    return round(_LEFT + _PLOT * min(max(value, 0.0), 1.0), 1)


def _group(name: str, bars: list[tuple[str, Metric]], constant: float | None, y: float) -> str:
    height = len(bars) * _BAR
    parts = [
        f'<text x="{_LEFT - 12}" y="{y + height / 2 + 4}" text-anchor="end" font-weight="600" fill="#1c2530">'
        f"{escape(name)}</text>"
    ]
    for number, (condition, found) in enumerate(bars):
        if found.value is None:
            continue
        top = y + number * _BAR
        middle = top + _BAR / 2 - 1
        end = _x(found.value)
        parts.append(
            f'<rect x="{_LEFT}" y="{top}" width="{max(end - _LEFT, 1):.1f}" height="{_BAR - 2}" rx="1.5"'
            f' fill="{COLOURS[condition]}"><title>{escape(LABELS[condition])}: {found.value:.3f}</title></rect>'
        )
        edge = end
        if found.low is not None and found.high is not None:
            low, high = _x(found.low), _x(found.high)
            edge = max(end, high)
            parts.append(
                f'<path d="M{low} {middle}H{high}M{low} {middle - 3}V{middle + 3}M{high} {middle - 3}V{middle + 3}"'
                ' stroke="#11161d" stroke-width="1.1" fill="none"/>'
            )
        weight = "700" if condition == "real" else "400"
        parts.append(
            f'<text x="{edge + 6:.1f}" y="{middle + 4}" font-size="11" font-weight="{weight}" fill="#333c48"'
            ' stroke="#fff" stroke-width="3" paint-order="stroke">'
            f"{found.value:.2f}</text>"
        )
    if constant is not None:
        parts.insert(
            1,
            f'<line x1="{_x(constant)}" y1="{y - 3}" x2="{_x(constant)}" y2="{y + height + 1}" stroke="#c1272d"'
            ' stroke-width="1.3" stroke-dasharray="3 2"/>'
        )
    return "".join(parts)


def _legend(conditions: list[str], constant: bool) -> str:
    parts, x = [], 24.0
    for condition in conditions:
        label = LABELS[condition]
        parts.append(
            f'<rect x="{x}" y="10" width="11" height="11" rx="1.5" fill="{COLOURS[condition]}"/>'
            f'<text x="{x + 16}" y="20" fill="#333c48">{escape(label)}</text>'
        )
        x += 30 + 6.4 * len(label)
    if constant:
        parts.append(
            f'<line x1="{x}" y1="9" x2="{x}" y2="22" stroke="#c1272d" stroke-width="1.3" stroke-dasharray="3 2"/>'
            f'<text x="{x + 7}" y="20" fill="#333c48">best constant answer</text>'
        )
    return "".join(parts)
