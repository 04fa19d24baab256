"""Case facts: what a whole video says about its case, asked of the teacher and then looked up in the talk.

Nothing is believed that was not said: a diagnosis must occur in the talk, a clue must have been said about when the
model says it was. What does not hold is dropped, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence

from medllava.instruct_gen.diagnoses import are_same, named_in, names
from medllava.instruct_gen.gates import is_instruction
from medllava.instruct_gen.kinds import MADE_UP, Form, make_request, read_reply, remark_lines
from medllava.instruct_gen.prompts import Prompt
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.instruct_gen.records import CaseFacts, Clue, Phrase
from medllava.instruct_gen.wording import affirms, is_said, normalised, sentences, shared_words, stems
from medllava.llm.base import Reply, Request, estimate_tokens

NEAR_S = 15.0
"""A clue must have been said within so many seconds of the time that is given for it."""

LEAST_SHARED = 0.34
"""Share of a clue's content words that must be among what was said near then."""

_NEXT_CASE = re.compile(
    r"\b(?:(?:next|another|second|third|fourth|fifth|following|last|different)\s+(?:case|patient)"
    r"|case\s+(?:number\s+)?(?:two|three|four|five|six|2|3|4|5|6))\b"
)
_NOT_SHOWN = re.compile(r"\b(?:like|similar|remember|saw|seen|had|from|in|will|later|week|time|video|lecture)\b")
_OPENING_S = 60.0

FactsSteps = Generator[Request, Reply, CaseFacts]


class ClueReply(Form):
    text: str
    time_s: float
    quote: str


class FactsReply(Form):
    diagnosis: str | None
    single_case: bool
    clues: list[ClueReply]


def facts_steps(
    video: str, phrases: Sequence[Phrase], recipe: GenerateRecipe, prompts: dict[str, Prompt]
) -> FactsSteps:
    """Ask what a whole video says about its case, in parts if it is long. Raises UnusableReplyError."""
    prompt = prompts["case_facts"]
    talk = [phrase for phrase in phrases if not is_instruction(phrase.text)]
    told: list[FactsReply] = []
    teacher, made_up = recipe.model, False
    for part in talk_parts(talk, recipe.facts_prompt_tokens, recipe.facts_overlap_s):
        reply = yield make_request(recipe, prompt.fill(remarks=remark_lines(part)), FactsReply)
        told.append(read_reply(reply, FactsReply))
        teacher, made_up = reply.model, made_up or reply.finish_reason == MADE_UP
    if made_up:
        clues = tuple(Clue(text=clue.text, time_s=clue.time_s) for part in told for clue in part.clues)
        return CaseFacts(video=video, diagnosis="some diagnosis", clues=clues)
    diagnosis, single_case, rejected = _diagnosis(told, talk, recipe)
    found, absent = check_clues([clue for part in told for clue in part.clues], talk)
    announced = _other_case(talk)
    if announced and single_case:
        single_case, rejected = False, [*rejected, f"several cases: {announced!r} was said"]
    return CaseFacts(
        video=video, diagnosis=diagnosis, single_case=single_case, clues=found, rejected=(*rejected, *absent),
        prompt_hash=prompt.hash, teacher=teacher,
    )


def talk_parts(talk: Sequence[Phrase], most_tokens: int, overlap_s: float) -> Iterator[list[Phrase]]:
    """The talk in parts of at most ``most_tokens`` (a longer phrase is a part of its own), each beginning ``overlap_s``
    before the end of the one before it."""
    if len(remark_lines(talk).encode()) <= most_tokens:  # A token is a byte at least: no need to count them.
        yield list(talk)
        return
    costs = [estimate_tokens(remark_lines([phrase])) for phrase in talk]
    first = 0
    while True:
        last, total = first, 0
        while last < len(talk) and (total + costs[last] <= most_tokens or last == first):
            total += costs[last]
            last += 1
        yield list(talk[first:last])
        if last >= len(talk):
            return
        # The overlap may take half of a part at most, so that each part goes on.
        start_s, after = talk[last].start_s - overlap_s, first + max(1, (last - first) // 2)
        first = next(at for at in range(after, last + 1) if at == last or talk[at].start_s >= start_s)


def check_clues(clues: Sequence[ClueReply], talk: Sequence[Phrase]) -> tuple[tuple[Clue, ...], list[str]]:
    """The clues that were said, at the time of the phrase that they quote, and the reasons to drop the others."""
    end_s = max((phrase.end_s for phrase in talk), default=0.0)
    kept: dict[tuple[str, float], Clue] = {}
    rejected: list[str] = []
    for clue in clues:
        named = f"{clue.text.strip()!r} at {clue.time_s:g} s"
        if not 0 <= clue.time_s <= end_s + NEAR_S:
            rejected.append(f"clue outside the video: {named}")
            continue
        near = [
            phrase for phrase in talk
            if phrase.start_s - NEAR_S <= clue.time_s <= phrase.end_s + NEAR_S
        ]
        said = " ".join(phrase.text for phrase in near)
        if not clue.text.strip() or not is_said(clue.quote, said) or shared_words(clue.text, said) < LEAST_SHARED:
            rejected.append(f"clue not said: {named}")
            continue
        # The words may lie across phrases; then the time is that of the model.
        holding = [phrase for phrase in near if is_said(clue.quote, phrase.text)]
        nearest = min(holding, key=lambda phrase: abs(phrase.start_s - clue.time_s), default=None)
        time_s = nearest.start_s if nearest else clue.time_s
        kept.setdefault((normalised(clue.quote), time_s), Clue(text=clue.text, time_s=time_s, quote=clue.quote))
    return tuple(sorted(kept.values(), key=lambda clue: clue.time_s)), rejected


def _diagnosis(
    told: Sequence[FactsReply], talk: Sequence[Phrase], recipe: GenerateRecipe
) -> tuple[str | None, bool, list[str]]:
    """The one diagnosis that is said, whether the video is of one case, and the reasons to drop what was told."""
    single_case = all(part.single_case for part in told)
    text = " ".join(phrase.text for phrase in talk)
    said: list[str] = []
    rejected: list[str] = []
    for part in told:
        diagnosis = (part.diagnosis or "").strip()
        if not diagnosis or any(are_same(diagnosis, other, recipe.synonyms) for other in said):
            continue
        fault = _diagnosis_fault(diagnosis, text, recipe)
        if fault:
            rejected.append(fault)
        else:
            said.append(diagnosis)
    if len(said) > 1:
        rejected.append(f"several diagnoses: {', '.join(said)}")
        return None, False, rejected
    return (said[0] if said else None), single_case, rejected


def _diagnosis_fault(diagnosis: str, text: str, recipe: GenerateRecipe) -> str | None:
    known = names(diagnosis, recipe.synonyms)
    found = named_in(text, known) or any(is_said(name, text) for name in known) or shared_words(diagnosis, text) == 1
    if not found:
        return f"diagnosis not said: {json.dumps(diagnosis, ensure_ascii=False)}"
    holding = [sentence for sentence in sentences(text) if named_in(sentence, known)]
    words = [stems(name) for name in known]
    denied = [s for s in holding if _DENIED.search(s.lower()) and not any(affirms(s, name) for name in words)]
    if holding and len(denied) == len(holding):
        return f"diagnosis denied: {denied[-1]!r} was said"
    return None


_DENIED = re.compile(r"\b(?:not|no|isn't|rules? out|ruled out|excluded?s?|without|never)\b")


def _other_case(talk: Sequence[Phrase]) -> str | None:
    """Words after the opening that take up another case, or None."""
    begin_s = talk[0].start_s if talk else 0.0
    for phrase in talk:
        if phrase.start_s < begin_s + _OPENING_S:
            continue
        for sentence in sentences(phrase.text):
            match = _NEXT_CASE.search(sentence.lower())
            if match and not _NOT_SHOWN.search(sentence.lower()[: match.start()]):
                return match.group()
    return None
