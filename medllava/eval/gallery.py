"""What the report's gallery shows: every answer as data, and small copies of the pictures, for the page to lay out.

Model text goes into the page as JSON in which no ``<`` is left and is put on the screen as text, never as markup.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import DataError

if TYPE_CHECKING:
    from medllava.eval.metrics import Row

SIDE = 288
"""Longest side in pixels of a picture in the page."""
QUALITY = 65
_RIGHT_AT = {"box": 0.5, "open": 0.5}


def outcome(row: Row) -> str:
    """right, wrong, unclear (no legal answer could be read) or unscored. An open answer is right from F1 0.5, a box
    from IoU 0.5."""
    if row.scores is None:
        return "unscored"
    if row.read is None:
        return "unclear"
    return "right" if next(iter(row.scores.values()), 0.0) >= _RIGHT_AT.get(row.question.kind, 1.0) else "wrong"


def items(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One item for each question, on its own picture; ``others`` are its answers without it, ``reply`` is what
    :class:`~medllava.eval.records.Replies` counts it as."""
    from medllava.eval.rotation import steps
    from medllava.eval.vqa import first_box

    others: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.answered and row.condition != "real" and not steps(row.condition):
            others.setdefault(row.question.id, {})[row.condition] = row.text
    found = []
    for row in rows:
        if row.condition != "real":
            continue
        question, text = row.question, row.text
        counted = {"empty": row.empty, "looping": row.looping, "cut off": row.cut_off}
        answered = first_box(text)
        item = {
            "id": question.id, "outcome": outcome(row), "kind": question.kind, "categories": question.categories,
            "question": question.question, "answer": text, "reference": question.answer, "picture": question.image,
            "reason": row.reason if row.read is None or question.kind in {"box", "open"} else "",
            "box": question.box and question.box.as_tuple(), "answered": answered and answered.as_tuple(),
            "sure": row.confidence and round(row.confidence, 3), "others": others.get(question.id),
            "reply": [name for name, so in counted.items() if so],
        }
        found.append({key: value for key, value in item.items() if value not in (None, "", {}, [])})
    return found


def small_pictures(names: Sequence[str], folder: Path, most_bytes: int) -> dict[str, str]:
    """Name -> data URI of a JPEG of at most :data:`SIDE` pixels, in the order of ``names``, until ``most_bytes`` are
    used up. A picture that is not there or damaged is left out."""
    from medllava.eval.pictures import Pictures

    pictures = Pictures(folder, ())
    found: dict[str, str] = {}
    used = 0
    with ThreadPoolExecutor(2) as threads:
        for start in range(0, len(names), 64):
            some = names[start : start + 64]
            for name, uri in zip(some, threads.map(lambda name: _small(pictures.path(name)), some), strict=True):
                used += len(uri)
                if used > most_bytes:
                    return found
                if uri:
                    found[name] = uri
    return found


def _small(path: Path) -> str:
    from medllava.images import load_image

    try:
        image = load_image(path)
    except DataError:
        # A report can be written where the pictures are not; the card then shows the words alone.
        return ""
    image.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def as_script(value: Any) -> str:
    """JSON for a ``<script type="application/json">``: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
