"""The plots of a data card as SVG text: bars, histograms, a heat map, and a picture's overlay of trace and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from medllava.geometry import Box
from medllava.instruct_gen.card_figures import Boxes, Spread
from medllava.instruct_gen.records import TracePoint

INK, SOFT, LINE, BLUE = "#1c2530", "#59616d", "#e3e6ea", "#1f4e9c"
CAPTION_COLOUR, SAMPLE_COLOUR, TRACE_COLOUR = "#1f4e9c", "#b3261e", "#ffd83d"

_FONT = 'font-family="system-ui, -apple-system, Segoe UI, sans-serif"'
_GAP_S = 1.0
"""Seconds without a point after which the cursor counts as not seen: the trace is not drawn through."""

# From white to dark blue; luminance falls evenly, so that it can be read without colour too.
_HEAT = ((255, 255, 255), (214, 228, 245), (150, 190, 230), (80, 140, 205), (31, 78, 156), (12, 36, 84))


def histogram(found: Spread, title: str, unit: str) -> str:
    """Bars of a histogram with the median and the 90th percentile marked; ``unit`` names the axis."""
    width, height, left, top, bottom = 420, 190, 44, 22, 40
    plot_width, plot_height = width - left - 12, height - top - bottom
    most = max(found.counts, default=0) or 1
    edges = found.edges or (0.0, 1.0)
    last = edges[-1]
    parts = [f'<line x1="{left}" y1="{height - bottom}" x2="{width - 12}" y2="{height - bottom}" stroke="{SOFT}"/>']
    for number, count in enumerate(found.counts):
        x0, x1 = (left + plot_width * edge / last for edge in edges[number : number + 2])
        tall = plot_height * count / most
        open_end = number == len(found.counts) - 1 and found.most > last
        span = f"{edges[number]:g} or more" if open_end else f"{edges[number]:g} to {edges[number + 1]:g}"
        parts.append(
            f'<rect x="{x0 + 0.5:.1f}" y="{height - bottom - tall:.1f}" width="{max(x1 - x0 - 1, 0.5):.1f}"'
            f' height="{tall:.1f}" fill="{BLUE}"><title>{span} {escape(unit)}: {count:,}</title></rect>'
        )
    every = next(step for step in (1, 2, 5, 10, 20, 50) if (len(edges) - 1) / step <= 8)
    for value in edges[::every]:
        x = left + plot_width * value / last
        label = f"{value:g}" + ("+" if value == last and found.most > last else "")
        parts.append(_text(x, height - bottom + 16, label, anchor="middle", colour=SOFT))
    parts.append(_text(left - 6, top + 8, f"{most:,}", anchor="end", colour=SOFT))
    parts.append(_text(left - 6, height - bottom, "0", anchor="end", colour=SOFT))
    parts.append(_text(left + plot_width / 2, height - 6, unit, anchor="middle", colour=SOFT))
    for value, name, dash in ((found.median, "median", ""), (found.p90, "90 %", ' stroke-dasharray="4 3"')):
        x = left + plot_width * min(value, last) / last
        parts.append(
            f'<line x1="{x:.1f}" y1="{top - 2}" x2="{x:.1f}" y2="{height - bottom}" stroke="#b3261e"'
            f' stroke-width="1.5"{dash}><title>{name}: {value:g}</title></line>'
        )
    told = f"median {found.median:g}, 90th percentile {found.p90:g}"
    return _svg(width, height, f"{title}: {told}", "".join(parts))


def bars(counts: Sequence[tuple[str, int]], title: str) -> str:
    """Horizontal bars with their names and numbers."""
    left, plot_width, right, row = 170, 240, 60, 24
    most = max((count for _, count in counts), default=0) or 1
    parts = []
    for number, (name, count) in enumerate(counts):
        y = 4 + number * row
        long = plot_width * count / most
        shown = name if len(name) <= 26 else name[:25] + "\N{HORIZONTAL ELLIPSIS}"
        parts.append(_text(left - 8, y + 15, shown, anchor="end", colour=INK))
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{max(long, 1):.1f}" height="16" rx="2" fill="{BLUE}"/>')
        parts.append(_text(left + long + 6, y + 15, f"{count:,}", anchor="start", colour=INK))
    return _svg(left + plot_width + right, 8 + row * len(counts), title, "".join(parts))


def heat_map(boxes: Boxes, title: str) -> str:
    """Which part of the boxes covers each place of the picture, with its scale."""
    side, cells = 256, len(boxes.heat)
    most = max((value for row in boxes.heat for value in row), default=0.0)
    size = side / cells
    parts = []
    for y, row in enumerate(boxes.heat):
        start = 0
        while start < cells:
            # Neighbours of one colour are one rectangle: the file stays small.
            colour = _heat_colour(row[start] / most if most else 0)
            end = start
            while end < cells and _heat_colour(row[end] / most if most else 0) == colour:
                end += 1
            place = f'x="{start * size + 1:g}" y="{y * size + 1:g}" width="{(end - start) * size:g}" height="{size:g}"'
            parts.append(f'<rect {place} fill="{colour}"/>')
            start = end
    parts.append(f'<rect x="1" y="1" width="{side}" height="{side}" fill="none" stroke="{SOFT}"/>')
    for step in range(5):
        share = 1 - step / 4
        top = 1 + (side - 20) * step / 4
        parts.append(
            f'<rect x="{side + 16}" y="{top:g}" width="18" height="20" fill="{_heat_colour(share)}" stroke="{LINE}"/>'
        )
        parts.append(_text(side + 40, top + 14, f"{100 * most * share:.0f}%", anchor="start", colour=SOFT))
    told = f"{title}; the darkest place is covered by {most:.0%} of the boxes"
    return _svg(side + 90, side + 2, told, "".join(parts))


def overlay(
    width: int, height: int, trace: Sequence[TracePoint], caption_boxes: Sequence[tuple[int, Box]],
    sample_boxes: Sequence[Box],
) -> str:
    """What is drawn over a picture of that size: the cursor's path, numbered boxes of the caption, boxes of the
    sample's own words (dashed)."""
    unit = max(width, height) / 480
    parts = []
    for piece in _pieces(trace):
        points = " ".join(f"{point.x * width:.1f},{point.y * height:.1f}" for point in piece)
        for colour, thick in (("#000", 3.6), (TRACE_COLOUR, 1.8)):
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{thick * unit:.1f}"'
                ' stroke-linejoin="round" stroke-linecap="round" opacity="0.85"/>'
            )
    if trace:
        first = trace[0]
        parts.append(
            f'<circle cx="{first.x * width:.1f}" cy="{first.y * height:.1f}" r="{5 * unit:.1f}" fill="{TRACE_COLOUR}"'
            f' stroke="#000" stroke-width="{1.2 * unit:.1f}"><title>the cursor\'s first place</title></circle>'
        )
    for number, box in caption_boxes:
        parts.append(_box(box, width, height, unit, CAPTION_COLOUR, ""))
        x, y = box.x1 * width, box.y1 * height
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{18 * unit:.1f}" height="{18 * unit:.1f}" fill="{CAPTION_COLOUR}"/>'
            f'<text x="{x + 9 * unit:.1f}" y="{y + 13.5 * unit:.1f}" text-anchor="middle" fill="#fff" {_FONT}'
            f' font-weight="700" font-size="{13 * unit:.1f}">{number}</text>'
        )
    for box in sample_boxes:
        dash = f' stroke-dasharray="{7 * unit:.1f} {4 * unit:.1f}"'
        parts.append(_box(box, width, height, unit, SAMPLE_COLOUR, dash))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" preserveAspectRatio="none"'
        f' aria-hidden="true">{"".join(parts)}</svg>'
    )


def _box(box: Box, width: int, height: int, unit: float, colour: str, dash: str) -> str:
    x0, y0, x1, y1 = box.to_pixels(width, height)
    place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" fill="none"'
    return (
        f'<rect {place} stroke="#fff" stroke-width="{5 * unit:.1f}" opacity="0.7"/>'
        f'<rect {place} stroke="{colour}" stroke-width="{2.5 * unit:.1f}"{dash}/>'
    )


def _pieces(trace: Sequence[TracePoint]) -> list[list[TracePoint]]:
    pieces: list[list[TracePoint]] = []
    for point in trace:
        if not pieces or point.t_s - pieces[-1][-1].t_s > _GAP_S:
            pieces.append([])
        pieces[-1].append(point)
    return [piece for piece in pieces if len(piece) > 1]


def _heat_colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(place), len(_HEAT) - 2)
    part = place - low
    mixed = (round(a + (b - a) * part) for a, b in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _text(x: float, y: float, text: str, *, anchor: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, inside: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
        f' style="max-width:{width:g}px" {_FONT} font-size="12"><title>{escape(title)}</title>{inside}</svg>'
    )
