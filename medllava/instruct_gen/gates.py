"""Quality gates: each looks at a draft and returns the reason to drop it, or None.

A reason starts with the gate's fixed name, a colon and the particulars, so that drops can be counted by gate. Gates
that cost a call are in :mod:`medllava.instruct_gen.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from medllava.conversation import IMAGE_TAG, Turn
from medllava.geometry import Box, malformed_boxes, parse_boxes
from medllava.instruct_gen import patterns
from medllava.instruct_gen.contradictions import contradiction
from medllava.instruct_gen.diagnoses import named_in, names
from medllava.instruct_gen.recipe import SampleKind
from medllava.instruct_gen.records import CaseFacts, GroundedCaption

PATCH_KINDS = frozenset({"conversation", "description", "grounding"})
"""Kinds that speak of one image alone, which by itself does not show the diagnosis of the case."""

LEAST_BOX_OVERLAP = 0.5
"""Intersection over union that a box of a sample must have with some box of its caption."""


@dataclass(frozen=True)
class Background:
    """What a sample is judged against: the caption that its teacher was given, the facts of the case, and other names
    of diagnoses beside the built-in ones."""

    caption: GroundedCaption
    facts: CaseFacts | None = None
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def boxes(self) -> list[Box]:
        return [phrase.box for phrase in self.caption.phrases if phrase.box]

    @property
    def diagnosis(self) -> str | None:
        return self.facts.diagnosis if self.facts else None


def caption_fault(caption: GroundedCaption) -> str | None:
    """Why nothing is asked about a caption at all, or None: words that speak to a model, or no words of a talk."""
    for phrase in caption.phrases:
        if is_instruction(phrase.text):
            return f"instructions in the transcript: {phrase.text[:120]!r}"
    if caption.phrases and all(_is_noise(phrase.text) for phrase in caption.phrases):
        return f"speech recognition noise: {caption.phrases[0].text[:120]!r}"
    return None


def first_fault(kind: SampleKind, turns: Sequence[Turn], background: Background) -> str | None:
    """The first gate's reason to drop these turns, or None."""
    return (
        empty_answer(turns)
        or image_tag(turns)
        or refuses(turns)
        or text_in_image(turns)
        or reads_caption(turns)
        or (box_faults(turns, background.boxes) if kind == "grounding" else coordinates_in_prose(turns))
        or diagnosis_leaked(kind, turns, background)
        or contradiction(kind, turns, background.caption, background.facts, background.synonyms)
    )


def empty_answer(turns: Sequence[Turn]) -> str | None:
    for number, turn in enumerate(turns):
        if not any(sign.isalnum() for sign in turn.text):
            return f"empty answer: turn {number}"
    return None


def image_tag(turns: Sequence[Turn]) -> str | None:
    """The tag marks where pixels go; words that hold one would break the sample."""
    return f"malformed: {IMAGE_TAG} in the text" if any(IMAGE_TAG in turn.text for turn in turns) else None


def refuses(turns: Sequence[Turn]) -> str | None:
    """The teacher speaks as a program that cannot see, inside a reply of the right form."""
    return _found("refused", patterns.REFUSES, turns)


def reads_caption(turns: Sequence[Turn]) -> str | None:
    """The teacher speaks of the text it was given, although it should speak as one who sees the image."""
    return _found("reads a caption", patterns.READS_CAPTION, turns)


def coordinates_in_prose(turns: Sequence[Turn]) -> str | None:
    return _found("coordinates in prose", patterns.COORDINATES, turns)


def text_in_image(turns: Sequence[Turn]) -> str | None:
    """The sample asks for, or tells, something written in the image, which nobody but the transcript knows of; or it
    repeats what a recogniser hears in music and silence."""
    return _found("text in the image", patterns.TEXT_IN_IMAGE, turns) or _found(
        "speech recognition noise", patterns.SPEECH_NOISE, turns
    )


# All samples of a caption ask about the same phrases, one after the other.
@lru_cache(maxsize=4096)
def is_instruction(text: str) -> bool:
    """Whether words of a transcript look as if they were meant for a model that reads it."""
    return bool(patterns.INSTRUCTION.search(text))


@lru_cache(maxsize=4096)
def _is_noise(text: str) -> bool:
    return bool(patterns.SPEECH_NOISE.search(text))


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


def diagnosis_leaked(kind: SampleKind, turns: Sequence[Turn], background: Background) -> str | None:
    """The diagnosis is named, under any of its names, where it must not be: in kinds of one image; in the question of
    complex reasoning; by the assistant before the last round of a dialogue; in a narrator's question whose image was
    not on the screen when the diagnosis was said."""
    if background.diagnosis is None:
        return None
    wanted = names(background.diagnosis, background.synonyms)
    if kind in PATCH_KINDS:
        judged = list(turns)
    elif kind == "complex_reasoning":
        judged = [turn for turn in turns if turn.role == "user"]
    elif kind == "iterative_abduction":
        judged = [turn for turn in turns[:-1] if turn.role == "assistant"]
    elif kind == "question" and not any(named_in(phrase.text, wanted) for phrase in background.caption.phrases):
        judged = list(turns)
    else:
        return None
    for turn in judged:
        found = named_in(turn.text, wanted)
        if found:
            return f"diagnosis leaked: {found!r} ({background.diagnosis})"
    return None


def _found(reason: str, pattern: patterns.Wording, turns: Sequence[Turn]) -> str | None:
    for turn in turns:
        match = pattern.search(turn.text)
        if match:
            return f"{reason}: {match.group()!r}"
    return None
