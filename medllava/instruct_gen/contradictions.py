"""A sample against the talk it was made of: findings, sides and the diagnosis that it asserts although they were
denied, or denies although they were told.

Only plain statements are compared. What is hedged, said of one place, or told both ways proves nothing; a verifier
model (:mod:`medllava.instruct_gen.checks`) reads the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from medllava.conversation import Turn
from medllava.instruct_gen.diagnoses import are_same, known_in, named_in, names
from medllava.instruct_gen.recipe import REASONING_KINDS, SampleKind
from medllava.instruct_gen.records import CaseFacts, GroundedCaption
from medllava.instruct_gen.wording import (
    Denial,
    affirms,
    asked_for,
    denials,
    is_yes_no,
    sentences,
    stem,
    verdict,
)

_ORGAN = (
    r"breast|lung|kidney|ovary|testis|testicle|eye|ear|colon|adrenal(?:\s+gland)?|lobe|arm|leg|forearm|hand|foot|thigh|calf"
    r"|cheek|temple|shoulder|hip|knee|elbow|wrist|ankle|ventricle|atrium|(?:fallopian\s+)?tube|parotid(?:\s+gland)?|tonsil"
    r"|nipple|axilla|hemisphere|thyroid\s+lobe|nostril|heel|chest|flank|groin|forehead|eyelid|bronchus|ureter|femur|tibia"
    r"|humerus|scalp|neck|buttock"
)
_SIDE = re.compile(rf"\b(left|right)(?:[- ]sided)?\s+(?:(?!upper|lower|left|right)\w+\s+)?({_ORGAN})s?\b")
_CONCLUDES = re.compile(
    r"\b(?:(?:final\s+|correct\s+)?diagnosis\s+(?:here\s+|in\s+this\s+case\s+)?(?:is|must\s+be)(?:\s+therefore)?|(?:the|this)\s+case\s+is"
    r"|this\s+is|it\s+is|represents?|confirms?(?:\s+the\s+diagnosis\s+of)?|establish(?:es)?(?:\s+the\s+diagnosis\s+of)?"
    r"|diagnostic\s+of|pathognomonic\s+(?:of|for)|proves?)\s+(?:clearly\s+|indeed\s+|definitely\s+|thus\s+)?(?:an?\s+|the\s+)?"
    r"(?P<name>[^.,;:()?!]{3,70})"
)
_DENIES = re.compile(
    r"\b(?:this|it|the\s+case|the\s+diagnosis|the\s+lesion|the\s+tumor)\s+(?:is\s+not|isn't|cannot\s+be|can't\s+be)\s+(?:an?\s+|the\s+)?"
    r"(?P<one>[^.,;:()?!]{3,60})"
    r"|\b(?:rules?\s+out|excludes?|argues?\s+against\s+a\s+diagnosis\s+of)\s+(?:an?\s+|the\s+)?(?P<two>[^.,;:()?!]{3,60})"
)
_UNSURE = re.compile(
    r"\b(?:if|whether|could|may|might|possibl[ey]|perhaps|suggests?|suggestive|compatible|consistent|favou?rs?|likely|differential"
    r"|would|consider|not|no|isn't|instead|unlike|versus|mimics?|other\s+(?:fields|areas)|alone|by\s+itself)\b"
)

_TAKES_BACK = re.compile(r"\b(?:not|cannot|can't|doesn't|don't|no|if|whether|could|may|might|before|until|to)\b")


def contradiction(
    kind: SampleKind, turns: Sequence[Turn], caption: GroundedCaption, facts: CaseFacts | None,
    synonyms: Mapping[str, Sequence[str]],
) -> str | None:
    """What in a sample is contrary to the talk or the case, as a reason to drop it, or None."""
    said = " ".join(_stopped(phrase.text) for phrase in caption.phrases)
    clues = " ".join(_stopped(clue.text) for clue in facts.clues) if facts and kind in REASONING_KINDS else ""
    return (
        _finding_fault(kind, turns, said, clues)
        or _side_fault(turns, f"{said} {clues}")
        or (_diagnosis_fault(turns, said, facts.diagnosis, synonyms) if facts and facts.diagnosis else None)
    )


def _finding_fault(kind: SampleKind, turns: Sequence[Turn], said: str, clues: str) -> str | None:
    told_absent = denials(said)
    for denial in told_absent:
        if denial.local or affirms(said, denial.words) or affirms(clues, denial.words):
            continue
        if _is_affirmed(kind, turns, denial.words):
            return f"contradicts the talk: it says that there is no {' '.join(denial.words)}"
    for denial in _denied(kind, turns):
        if denial.local or any(_ends_alike(denial.words, other.words) for other in told_absent):
            continue
        if affirms(said, denial.words):
            return f"contradicts the talk: it says that there is {' '.join(denial.words)}"
    return None


def _is_affirmed(kind: SampleKind, turns: Sequence[Turn], words: Sequence[str]) -> bool:
    for question, answer in _exchanges(kind, turns):
        if affirms(answer, words):
            return True
        if verdict(answer) is True and is_yes_no(question):
            return any(asked.words == tuple(words) for asked in asked_for(question))
    return False


def _denied(kind: SampleKind, turns: Sequence[Turn]) -> Iterable[Denial]:
    for question, answer in _exchanges(kind, turns):
        # "No, there is none in the lower left" denies what the question asks for, where it asks for it.
        if verdict(answer) is False:
            asked = asked_for(question) if is_yes_no(question) else []
            yield from asked
            local = any(one.local for one in asked)
            yield from (Denial(one.words, one.local or local) for one in denials(answer))
        else:
            yield from denials(answer)


def _exchanges(kind: SampleKind, turns: Sequence[Turn]) -> Iterable[tuple[str, str]]:
    """(question, answer) pairs; in a dialogue of two roles each message stands for itself."""
    if kind == "iterative_abduction":
        yield from (("", turn.text) for turn in turns)
        return
    for at in range(0, len(turns) - 1, 2):
        yield turns[at].text, turns[at + 1].text


def _side_fault(turns: Sequence[Turn], said: str) -> str | None:
    told = _sides(said)
    for turn in turns:
        if turn.role != "assistant":
            continue
        for organ, sides in _sides(turn.text).items():
            if organ in told and not sides & told[organ]:
                return f"contradicts the talk: {' and '.join(sorted(told[organ]))} {organ} was said"
    return None


def _sides(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    plain = text.lower()
    if "left" not in plain and "right" not in plain:
        return found
    for match in _SIDE.finditer(plain):
        found.setdefault(stem(match.group(2)), set()).add(match.group(1))
    return found


def _diagnosis_fault(
    turns: Sequence[Turn], said: str, diagnosis: str, synonyms: Mapping[str, Sequence[str]]
) -> str | None:
    own = names(diagnosis, synonyms)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    for text in answers:
        for match in _DENIES.finditer(text.lower().replace("tumour", "tumor")):
            name = match.group("one") or match.group("two")
            if named_in(name, own) and not _hedges(text.lower(), match):
                return f"contradicts the case facts: the diagnosis is {diagnosis}"
    for sentence in sentences(answers[-1]) if answers else []:
        plain = sentence.lower()
        for match in _CONCLUDES.finditer(plain):
            name = match.group("name")
            other = known_in(name)
            if (
                other and not _UNSURE.search(plain) and not are_same(diagnosis, name, synonyms)
                and not named_in(name, own) and not are_same(diagnosis, other, synonyms) and not named_in(said, [other])
            ):
                return f"contradicts the case facts: {other!r} is named, the diagnosis is {diagnosis}"
    return None


def _hedges(text: str, match: re.Match[str]) -> bool:
    """Whether the sentence of a denial takes it back: "does not by itself rule out"."""
    start = max(text.rfind(sign, 0, match.start()) for sign in ".?!;") + 1
    return bool(_TAKES_BACK.search(text, start, match.start()))


def _ends_alike(one: Sequence[str], other: Sequence[str]) -> bool:
    return one[-1] == other[-1]


def _stopped(text: str) -> str:
    return text if text.rstrip().endswith((".", "?", "!")) else f"{text.rstrip()}."
