"""Quality gates: each looks at a draft and returns the reason to drop it, or None.

A reason starts with the gate's fixed name, a colon and the particulars, so that drops can be counted by gate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from medllava.conversation import IMAGE_TAG, Turn
from medllava.geometry import Box, malformed_boxes, parse_boxes
from medllava.instruct_gen.recipe import SampleKind

PATCH_KINDS = frozenset({"conversation", "description", "grounding"})
"""Kinds that speak of one image alone, which by itself does not show the diagnosis of the case."""

LEAST_BOX_OVERLAP = 0.5
"""Intersection over union that a box of a sample must have with some box of its caption."""

_NEAR_DUPLICATE = 0.9

_SOURCE = (
    r"caption|transcript|narrat(?:ion|or|ive)|remarks?|speaker|lecturer|video|audio|cursor|mouse pointer"
    r"|bounding box(?:es)?"
)
_READS_CAPTION = re.compile(
    rf"\b(?:the|this|your|a|provided|given)\s+(?:provided\s+|given\s+|accompanying\s+)?(?:{_SOURCE})\b"
    r"|\b(?:the|this|provided|given)\s+(?:description|text|information|context)\s+"
    r"(?:mentions?|says?|states?|notes?|describes?|provided|given|does|indicates?|refers?)\b"
    r"|\b(?:as|is|are|was|were|not)\s+(?:explicitly\s+)?(?:mentioned|described|stated|narrated)\s+(?:in|by)\s+the\b"
    r"|\baccording to the (?:description|text|information|context)\b",
    re.IGNORECASE,
)
_COORDINATES = re.compile(r"[\[(]\s*-?\d*\.\d+\s*(?:,\s*-?\d*\.?\d+\s*){1,3}[\])]|\b[xy][12]\s*=")
_WORD = re.compile(r"[a-z0-9.]+")


def first_fault(
    kind: SampleKind, turns: Sequence[Turn], caption_boxes: Sequence[Box], diagnosis: str | None
) -> str | None:
    """The first gate's reason to drop these turns, or None. ``caption_boxes`` are those that the teacher was given."""
    return (
        empty_answer(turns)
        or image_tag(turns)
        or reads_caption(turns)
        or (box_faults(turns, caption_boxes) if kind == "grounding" else coordinates_in_prose(turns))
        or (diagnosis_leaked(turns, diagnosis) if kind in PATCH_KINDS else None)
    )


def empty_answer(turns: Sequence[Turn]) -> str | None:
    for number, turn in enumerate(turns):
        if not any(sign.isalnum() for sign in turn.text):
            return f"empty answer: turn {number}"
    return None


def image_tag(turns: Sequence[Turn]) -> str | None:
    """The tag marks where pixels go; words that hold one would break the sample."""
    return f"malformed: {IMAGE_TAG} in the text" if any(IMAGE_TAG in turn.text for turn in turns) else None


def reads_caption(turns: Sequence[Turn]) -> str | None:
    """The teacher speaks of the text it was given, although it should speak as one who sees the image."""
    for turn in turns:
        match = _READS_CAPTION.search(turn.text)
        if match:
            return f"reads a caption: {match.group()!r}"
    return None


def coordinates_in_prose(turns: Sequence[Turn]) -> str | None:
    for turn in turns:
        match = _COORDINATES.search(turn.text)
        if match:
            return f"coordinates in prose: {match.group()!r}"
    return None


def box_faults(turns: Sequence[Turn], caption_boxes: Sequence[Box]) -> str | None:
    """Boxes outside the frame, question-answer pairs without one, and boxes that the caption does not have."""
    for turn in turns:
        wrong = malformed_boxes(turn.text)
        if wrong:
            return f"box outside the frame: {wrong[0]}"
    for number in range(0, len(turns), 2):
        boxes = [box for turn in turns[number : number + 2] for box in parse_boxes(turn.text)]
        if not boxes:
            return f"grounding without box: turn {number}"
        for box in boxes:
            if all(box.iou(known) < LEAST_BOX_OVERLAP for known in caption_boxes):
                return f"box not in the caption: {list(box.as_tuple())}"
    return None


def diagnosis_leaked(turns: Sequence[Turn], diagnosis: str | None) -> str | None:
    if diagnosis is None:
        return None
    pattern = re.compile(rf"\b{re.escape(diagnosis)}s?\b", re.IGNORECASE)
    return f"diagnosis leaked: {diagnosis}" if any(pattern.search(turn.text) for turn in turns) else None


class NearDuplicates:
    """Remembers what was kept for each image, and finds samples that say the same again."""

    def __init__(self) -> None:
        self._kept: dict[str, list[frozenset[int]]] = {}

    def fault(self, image: str, turns: Sequence[Turn]) -> str | None:
        """The reason to drop ``turns``, or None: then they are remembered."""
        shingles = _shingles(turns)
        for number, other in enumerate(self._kept.get(image, ())):
            overlap = len(shingles & other) / len(shingles | other)
            if overlap >= _NEAR_DUPLICATE:
                return f"near-duplicate: {overlap:.2f} like sample {number + 1} of this image"
        self._kept.setdefault(image, []).append(shingles)
        return None


def _shingles(turns: Sequence[Turn]) -> frozenset[int]:
    """Hashes of every three words in a row within a question with its answer, boxes kept."""
    found: set[int] = set()
    for number in range(0, len(turns), 2):
        words = _WORD.findall(" ".join(turn.text for turn in turns[number : number + 2]).lower())
        found |= {hash(tuple(words[at : at + 3])) for at in range(max(1, len(words) - 2))}
    return frozenset(found)
