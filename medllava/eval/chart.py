"""The report's chart as SVG text: every metric under every condition, with its interval."""

from __future__ import annotations

from html import escape

from medllava.eval.records import Calibration, Metric, Report
from medllava.eval.vqa import FIRST_METRICS

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
    return (
        _head(width, bottom + 24, "Scores with the picture and without it")
        + _grid(bottom) + _legend(list(shown), any("constant" in found for found in report.baselines.values()))
        + "".join(blocks) + "</svg>"
    )


def _head(width: float, height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="12"><title>{escape(title)}</title>'
    )


PALETTE = ("#1f4e9c", "#e08a2e", "#1a7f45", "#8a4fa8", "#c1272d", "#4d8fac", "#7a6a3a")
"""Colours of runs and metrics, in turn."""


def category_chart(values: dict[str, dict[str, Metric]]) -> str:
    """One line per value of a category, a point with its interval for each metric that is a verdict of its own."""
    metrics = [name for name in dict.fromkeys(name for found in values.values() for name in found)
               if name in FIRST_METRICS] or list(next(iter(values.values()), {}))
    return dot_chart({value: {name: found[name] for name in metrics if name in found}
                      for value, found in values.items()}, "Scores by category")


def dot_chart(lines: dict[str, dict[str, Metric]], title: str) -> str:
    """Lines of points with 95 % intervals on the scale 0..1, one colour per name, and how many questions each has."""
    names = list(dict.fromkeys(name for found in lines.values() for name in found))
    parts, y = [], float(_TOP)
    for line, found in lines.items():
        height = max(len(found), 1) * _BAR
        parts.append(
            f'<text x="{_LEFT - 12}" y="{y + height / 2 + 4}" text-anchor="end" fill="#1c2530">'
            f"{escape(_short(line))}<title>{escape(line)}</title></text>"
        )
        for number, (name, metric) in enumerate(found.items()):
            if metric.value is None:
                continue
            middle, colour = y + number * _BAR + _BAR / 2, PALETTE[names.index(name) % len(PALETTE)]
            end = _x(metric.value)
            if metric.low is not None and metric.high is not None:
                end = max(end, _x(metric.high))
                parts.append(
                    f'<path d="M{_x(metric.low)} {middle}H{_x(metric.high)}" stroke="{colour}" stroke-width="1.6"/>'
                )
            told = f"{line}, {name}: {metric.value:.3f}, {metric.n} questions"
            parts.append(
                f'<circle cx="{_x(metric.value)}" cy="{middle}" r="4" fill="{colour}"><title>{escape(told)}</title>'
                f'</circle><text x="{end + 9}" y="{middle + 4}" font-size="11" fill="#333c48">{metric.value:.2f}'
                f'<tspan fill="#8a919c"> n {metric.n}</tspan></text>'
            )
        y += height + 8
    legend, x = [], 24.0
    for number, name in enumerate(names):
        legend.append(
            f'<circle cx="{x + 4}" cy="16" r="4" fill="{PALETTE[number % len(PALETTE)]}"/>'
            f'<text x="{x + 13}" y="20" fill="#333c48">{escape(name)}</text>'
        )
        x += 34 + 6.6 * len(name)
    return _head(_LEFT + _PLOT + _RIGHT, y + 22, title) + _grid(y) + "".join(legend) + "".join(parts) + "</svg>"


def calibration_chart(found: Calibration) -> str:
    """Share of right answers over the probability told, with intervals; on the diagonal a model knows what it knows."""
    side, left, top = 300, 54, 14

    def place(x: float, y: float) -> str:
        return f"{left + side * x:.1f} {top + side * (1 - y):.1f}"

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + side * tick, top + side * (1 - tick)
        parts.append(
            f'<path d="M{place(tick, 0)}L{place(tick, 1)}M{place(0, tick)}L{place(1, tick)}" stroke="#e3e6ea"/>'
            f'<text x="{x:.1f}" y="{top + side + 16}" text-anchor="middle" fill="#59616d">{tick:g}</text>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#59616d">{tick:g}</text>'
        )
    parts.append(f'<path d="M{place(0, 0)}L{place(1, 1)}" stroke="#98a0ad" stroke-dasharray="4 3"/>')
    points = [(each.confidence, each.right.value or 0.0, each) for each in found.bins]
    line = "L".join(place(x, y) for x, y, _ in points)
    parts.append(f'<path d="M{line}" stroke="#1f4e9c" stroke-width="1.6" fill="none"/>')
    for x, y, each in points:
        if each.right.low is not None and each.right.high is not None:
            parts.append(f'<path d="M{place(x, each.right.low)}L{place(x, each.right.high)}" stroke="#1f4e9c"/>')
        centre = place(x, y).split()
        radius = 3 + 6 * (each.n / found.n) ** 0.5
        parts.append(
            f'<circle cx="{centre[0]}" cy="{centre[1]}" r="{radius:.1f}" fill="#1f4e9c" fill-opacity=".75">'
            f"<title>{each.n} answers: probability {x:.2f}, right {y:.2f}</title></circle>"
        )
    parts.append(
        f'<text x="{left + side / 2}" y="{top + side + 36}" text-anchor="middle" fill="#333c48">probability told</text>'
        f'<text transform="translate(14 {top + side / 2}) rotate(-90)" text-anchor="middle" fill="#333c48">'
        "share right</text>"
    )
    return _head(left + side + 16, top + side + 46, "Calibration") + "".join(parts) + "</svg>"


def _grid(bottom: float) -> str:
    return "".join(
        f'<line x1="{_x(tick)}" y1="{_TOP - 6}" x2="{_x(tick)}" y2="{bottom}" stroke="#e3e6ea"/>'
        f'<text x="{_x(tick)}" y="{bottom + 16}" text-anchor="middle" fill="#59616d">{tick:.1f}</text>'
        for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    )


def _short(text: str, most: int = 19) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


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
