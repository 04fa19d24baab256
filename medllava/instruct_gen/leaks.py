"""Does a validation set hold what was trained on? By video, by picture, and by pictures that look the same.

A split by row leaks: the same picture has several samples, and the published Quilt-Instruct repeats its ids over kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from medllava.instruct_gen.image_index import LOOK_BITS, ImageFacts, look_bits
from medllava.instruct_gen.narrate import ENDINGS

LeakKind = Literal["leak: video", "leak: image", "near-duplicate image"]

NEAR = 0.2
"""Pictures whose looks differ in at most this part of the bits are near-duplicates. Measured on 101 rendered fields:
re-encoded, resized, brightened, noisy or 2 % cropped copies differ in up to 0.18, different fields in 0.38 or more."""

_QUILT_NAME = re.compile(r"^([\w-]{11})_(?:image|roi|key|frame)_")
"""Quilt-1M's picture names begin with the id of the YouTube video."""

_BLOCK = 2048


@dataclass(frozen=True)
class Member:
    """What the check looks at of a row: its number, id, video (None: unknown) and picture names."""

    row: int
    id: str
    video: str | None
    images: tuple[str, ...]


@dataclass(frozen=True)
class Leak:
    """A row that shares something with ``other_row`` of the other part."""

    row: int
    id: str
    kind: LeakKind
    detail: str
    other_row: int
    image: str | None = None
    other_image: str | None = None


def member(row: int, id: str, values: Mapping[str, Any], images: Sequence[str]) -> Member:
    """A row of LLaVA JSON as a Member; the video is told by its provenance, or by a Quilt-1M picture name."""
    provenance = values.get("provenance")
    told = provenance.get("video") if isinstance(provenance, Mapping) else None
    told = told or values.get("video") or values.get("video_id")
    if told:
        path = PurePosixPath(str(told).replace("\\", "/"))
        return Member(row, id, path.stem if path.suffix.lower() in ENDINGS else path.name, tuple(images))
    names = (PurePosixPath(name.replace("\\", "/")).name for name in images)
    matches = (match.group(1) for match in map(_QUILT_NAME.match, names) if match)
    return Member(row, id, next(matches, None), tuple(images))


def members(rows: Iterable[Any]) -> list[Member]:
    """The readable rows of a LLaVA JSON file as Members; a row whose image names cannot be read is left out."""
    found: list[Member] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            continue
        image = row.get("image") or []
        names = [image] if isinstance(image, str) else image
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found.append(member(number, str(row.get("id", "")), row, [name.replace("\\", "/") for name in names]))
    return found


def find_leaks(
    members: Iterable[Member],
    others: Iterable[Member],
    images: Mapping[str, ImageFacts],
    other_images: Mapping[str, ImageFacts],
) -> list[Leak]:
    """What ``members`` share with ``others``: at most one leak of each kind per row, in order of rows.

    ``images`` and ``other_images`` map the two sides' picture names to their facts (pictures that do not open are left
    out of account). A near-duplicate is told only of pictures that are in no other leak, since pictures of one video
    often look the same.
    """
    videos: dict[str, Member] = {}
    pixels: dict[str, tuple[Member, str]] = {}
    looks: dict[str, tuple[Member, str]] = {}
    for other in others:
        if other.video is not None:
            videos.setdefault(other.video, other)
        for name in other.images:
            facts = other_images.get(name)
            if facts and facts.pixels:
                pixels.setdefault(facts.pixels, (other, name))
            if facts and facts.look:
                looks.setdefault(facts.look, (other, name))
    leaks: list[Leak] = []
    unsuspected: list[tuple[Member, str, str]] = []
    for one in members:
        twin = videos.get(one.video) if one.video is not None else None
        if twin:
            leaks.append(Leak(one.row, one.id, "leak: video", f"{one.video}, also of row {twin.row}", twin.row))
        known = [(name, images[name]) for name in one.images if name in images and images[name].pixels]
        same = next(((name, *pixels[facts.pixels]) for name, facts in known if facts.pixels in pixels), None)
        if same:
            name, twin, other_name = same
            detail = f"{name} shows what {other_name} of row {twin.row} shows"
            leaks.append(Leak(one.row, one.id, "leak: image", detail, twin.row, name, other_name))
        elif not twin:
            unsuspected += [(one, name, facts.look) for name, facts in known if facts.look]
    leaks += _near(unsuspected, looks)
    order: dict[str, int] = {"leak: video": 0, "leak: image": 1, "near-duplicate image": 2}
    return sorted(leaks, key=lambda leak: (leak.row, order[leak.kind]))


def _near(suspects: Sequence[tuple[Member, str, str]], looks: Mapping[str, tuple[Member, str]]) -> list[Leak]:
    """Near-duplicates among pictures, by the bits in which their looks differ."""
    wanted = list(dict.fromkeys(look for *_, look in suspects))
    if not wanted or not looks:
        return []
    twins = list(looks)
    theirs = look_bits(twins)
    closest: dict[str, tuple[str, float]] = {}
    for start in range(0, len(wanted), _BLOCK):
        part = wanted[start : start + _BLOCK]
        ours = look_bits(part)
        best = np.full(len(part), LOOK_BITS + 1, np.int64)
        where = np.zeros(len(part), np.int64)
        for first in range(0, len(twins), _BLOCK):
            block = theirs[first : first + _BLOCK]
            apart = np.zeros((len(part), len(block)), np.uint16)
            for word in range(ours.shape[1]):
                apart += np.bitwise_count(ours[:, word, None] ^ block[None, :, word])
            nearest = apart.argmin(axis=1)
            distance = apart[np.arange(len(part)), nearest].astype(np.int64)
            better = distance < best
            best[better], where[better] = distance[better], nearest[better] + first
        for look, bits, at in zip(part, best.tolist(), where.tolist(), strict=True):
            if bits <= NEAR * LOOK_BITS:
                closest[look] = (twins[at], bits / LOOK_BITS)
    leaks: list[Leak] = []
    told: set[int] = set()
    for one, name, look in suspects:
        if look in closest and one.row not in told:
            told.add(one.row)
            twin, part_apart = closest[look]
            other, other_name = looks[twin]
            detail = f"{name} looks like {other_name} of row {other.row} ({1 - part_apart:.0%} alike)"
            leaks.append(Leak(one.row, one.id, "near-duplicate image", detail, other.row, name, other_name))
    return leaks
