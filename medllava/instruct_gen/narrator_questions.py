"""The narrator's own questions, as in Quilt-VQA: asked aloud while an image was shown, and answered in the talk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz

from medllava.instruct_gen.patterns import SOCIAL
from medllava.instruct_gen.records import GroundedCaption, Phrase
from medllava.instruct_gen.wording import is_said, normalised, verdict

NEAR_S = 45.0
"""A question belongs to an image if it was asked while the image was shown or this many seconds from it (Quilt-VQA)."""

BEFORE_S = 15.0
"""Seconds of talk before a question that are given with it."""

SAME_QUESTION = 70.0
"""Least likeness (0..100) of a written question with the one that was asked, in words whatever their order."""

_JOIN_GAP_S = 2.0
_PIECE = re.compile(r"[^.?!]*(?:[.?!](?!\s|$|[\"'”’)])[^.?!]*)*(?:[.?!]+[\"'”’)]*|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|dr|fig|approx|etc|no|mr|ms|prof)\.$", re.IGNORECASE)


@dataclass(frozen=True)
class NarratorQuestion:
    """A question as it was asked, when, and the ``talk`` around it in which its answer is looked for."""

    text: str
    start_s: float
    end_s: float
    talk: tuple[Phrase, ...]


def narrator_questions(captions: Sequence[GroundedCaption]) -> dict[str, tuple[NarratorQuestion, ...]]:
    """Per caption id the questions asked during its image or within NEAR_S of it, in order of time.

    Each question goes to one image: the one on the screen, else the nearest in time. Only what the captions hold is
    known of a talk: what was said between stable images is not.
    """
    by_video: dict[str, list[GroundedCaption]] = {}
    for caption in captions:
        if caption.phrases:
            by_video.setdefault(caption.video, []).append(caption)
    found: dict[str, list[NarratorQuestion]] = {}
    for shown in by_video.values():
        talk = sorted({phrase for caption in shown for phrase in caption.phrases}, key=_in_time)
        for text, start_s, end_s in _asked(talk):
            nearest = min(shown, key=lambda caption: (_distance_s(caption, start_s, end_s), caption.phrases[0].start_s))
            if _distance_s(nearest, start_s, end_s) > NEAR_S:
                continue
            mine = found.setdefault(nearest.id, [])
            if any(normalised(other.text) == normalised(text) for other in mine):
                continue
            last_s = max(end_s, nearest.phrases[-1].end_s) + NEAR_S
            around = tuple(phrase for phrase in talk if start_s - BEFORE_S <= phrase.start_s <= last_s)
            mine.append(NarratorQuestion(text, start_s, end_s, around))
    return {id: tuple(mine) for id, mine in found.items()}


def answer_fault(asked: NarratorQuestion, question: str, answer: str, answer_type: str, quote: str) -> str | None:
    """Why a written question with its answer is not the narrator's, or None."""
    if not question.strip() or not answer.strip():
        return "question not answered: the talk does not answer it"
    alike = fuzz.token_set_ratio(normalised(question), normalised(asked.text))
    if not question.rstrip().endswith("?") or alike < SAME_QUESTION:
        return f"not the narrator's question: {asked.text!r} was asked"
    rest = " ".join(phrase.text for phrase in asked.talk).replace(asked.text, " ")
    if len(normalised(quote)) < 2 or not is_said(quote, rest):
        return f"answer not in the talk: {quote.strip()[:80]!r}"
    if answer_type == "closed" and verdict(answer) is None:
        return "closed answer without yes or no"
    return None


def _in_time(phrase: Phrase) -> tuple[float, float, str]:
    return phrase.start_s, phrase.end_s, phrase.text


def _distance_s(caption: GroundedCaption, start_s: float, end_s: float) -> float:
    first_s, last_s = caption.phrases[0].start_s, max(phrase.end_s for phrase in caption.phrases)
    return max(0.0, first_s - end_s, start_s - last_s)


def _asked(talk: Sequence[Phrase]) -> Iterable[tuple[str, float, float]]:
    """Whole sentences that end in a question mark, with the times of the phrases that they lie in. A sentence that a
    transcript breaks over phrases is joined again; decimals and abbreviations end none."""
    begun: list[tuple[str, Phrase]] = []
    for phrase in talk:
        if begun and phrase.start_s - begun[-1][1].end_s > _JOIN_GAP_S:
            begun = []
        for match in _PIECE.finditer(phrase.text):
            piece = match.group().strip()
            if not piece:
                continue
            begun.append((piece, phrase))
            if not piece.rstrip("\"'”’)").endswith((".", "?", "!")) or _ABBREVIATION.search(piece):
                continue
            text = " ".join(part for part, _ in begun)
            if text.rstrip("\"'”’)").endswith("?") and not is_social(text):
                yield text, begun[0][1].start_s, phrase.end_s
            begun = []


def is_social(question: str) -> bool:
    """Whether a question asks nothing about a case: "okay?", "any questions?", "can you see my screen?"."""
    plain = normalised(question)
    return len(plain.split()) < 3 or bool(SOCIAL.fullmatch(plain))
