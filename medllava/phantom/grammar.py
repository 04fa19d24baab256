"""The phantom's small world in words: findings, diagnoses, and how questions about them are put and answered.

The narrator (video), the teacher (training data) and the question writer (evaluation) all speak from this file, so a
model of under a million parameters can be measured on grounding instead of on vocabulary.
"""

from __future__ import annotations

import re
from typing import Protocol

from medllava.geometry import QUADRANTS, Box, format_box

FINDINGS: dict[str, tuple[str, ...]] = {
    "gland": ("gland", "glandular structure", "gland with a lumen"),
    "lymphocyte aggregate": ("lymphocyte aggregate", "aggregate of lymphocytes", "lymphoid aggregate"),
    "mitotic figure": ("mitotic figure", "mitosis", "dividing cell"),
    "necrosis": ("necrosis", "area of necrosis", "necrotic focus"),
    "keratin pearl": ("keratin pearl", "squamous pearl", "whorl of keratin"),
    "blood vessel": ("blood vessel", "vessel", "vessel with red cells"),
    "adipose": ("adipose", "adipose tissue", "cluster of fat cells"),
    "psammoma body": ("psammoma body", "psammomatous calcification", "laminated calcification"),
}
"""Finding kind -> the names that narrators use for it; the kind itself is the name used in answers."""

DIAGNOSES: dict[str, tuple[str, ...]] = {
    "adenocarcinoma": ("gland", "mitotic figure", "necrosis"),
    "squamous cell carcinoma": ("keratin pearl", "mitotic figure", "necrosis"),
    "papillary carcinoma": ("psammoma body", "gland", "blood vessel"),
    "meningioma": ("psammoma body", "blood vessel", "lymphocyte aggregate"),
    "lymphocytic thyroiditis": ("lymphocyte aggregate", "gland", "blood vessel"),
    "angiolipoma": ("adipose", "blood vessel", "lymphocyte aggregate"),
}
"""Diagnosis of a phantom case -> the finding kinds that are its clues."""

_NAMES = sorted(((name, kind) for kind, names in FINDINGS.items() for name in names), key=lambda pair: -len(pair[0]))
_PATTERN = re.compile(r"\b(" + "|".join(re.escape(name) for name, _ in _NAMES) + r")s?\b", re.IGNORECASE)
_KIND_OF = dict(_NAMES)


class Chooser(Protocol):
    """What this file needs of ``random.Random``."""

    def choice(self, options: tuple[str, ...]) -> str: ...


def find_kinds(text: str) -> list[str]:
    """Finding kinds named in ``text``, in order of first mention."""
    kinds = [_KIND_OF[match.group(1).lower()] for match in _PATTERN.finditer(text)]
    return list(dict.fromkeys(kinds))


def find_quadrants(text: str) -> list[str]:
    """Quadrants named in ``text``, in order of first mention; ``top`` and ``bottom`` are understood."""
    plain = text.lower().replace("top", "upper").replace("bottom", "lower").replace("-", " ")
    return sorted((q for q in QUADRANTS if q in plain), key=plain.index)


def article(noun: str) -> str:
    return noun if noun == "necrosis" or noun.startswith("adipose") else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ask_where(kind: str, rng: Chooser) -> str:
    return rng.choice(
        ("Where is the {}?", "In which part of the image is the {}?", "Where do you see the {}?")
    ).format(kind)


def tell_where(quadrant: str) -> str:
    return f"In the {quadrant}."


def ask_yes_no(kind: str, rng: Chooser) -> str:
    return rng.choice(
        ("Is there {} in this image?", "Can you see {} here?", "Does this field show {}?")
    ).format(article(kind))


def tell_yes_no(present: bool, kind: str) -> str:
    return f"Yes, there is {article(kind)}." if present else f"No, there is no {kind}."


def ask_what(quadrant: str, rng: Chooser) -> str:
    return rng.choice(
        ("What is in the {} of this image?", "What do you see in the {}?", "What does the {} show?")
    ).format(quadrant)


def tell_what(kind: str | None) -> str:
    return f"{article(kind).capitalize()}." if kind else "Only stroma."


def ask_count(rng: Chooser) -> str:
    return rng.choice(
        ("How many findings are in this image?", "How many findings can you count here?")
    )


def tell_count(number: int) -> str:
    return f"{number} findings." if number != 1 else "1 finding."


def ask_box(kind: str, rng: Chooser) -> str:
    return rng.choice(
        ("Give the box of the {}.", "Outline the {} with a box.", "Mark the {} in this image.")
    ).format(kind)


def tell_box(box: Box) -> str:
    """The place in words before the numbers: a reader gets both, and a small model commits to the place first."""
    return f"In the {box.centre.quadrant()}: {format_box(box)}."


def ask_region(box: Box, rng: Chooser) -> str:
    return rng.choice(
        ("What is in the region {}?", "What does the box {} show?", "Describe the region {}.")
    ).format(format_box(box))
