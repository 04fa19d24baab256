"""From a task to a draft that has passed every gate of its own: the free gates, then those that cost a call.

The steps go on from those of :mod:`medllava.instruct_gen.kinds` in the same generator, so the checks are asked, kept,
paid, limited and replayed like everything else. Near-duplicates are looked for later, among all samples.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Literal

from rapidfuzz import fuzz

from medllava.conversation import Turn
from medllava.instruct_gen.gates import Background, caption_fault, first_fault
from medllava.instruct_gen.kinds import (
    Draft,
    DraftSteps,
    Form,
    Task,
    UnusableReplyError,
    draft_steps,
    make_request,
    phrase_lines,
    read_reply,
    remark_lines,
)
from medllava.instruct_gen.prompts import Prompt
from medllava.instruct_gen.recipe import REASONING_KINDS, BlindCheck, GenerateRecipe, VerifyCheck
from medllava.instruct_gen.wording import content_words, normalised, sentences, verdict
from medllava.llm.base import Reply, Request

SAME_ANSWER = 0.6
"""Token F1 from which a blind answer is the sample's answer."""


class BlindReply(Form):
    needs_image: bool
    answer: str


class SentenceVerdict(Form):
    number: int
    verdict: Literal["supported", "unsupported", "contradicted", "no_claim"]
    reason: str


class VerifyReply(Form):
    sentences: list[SentenceVerdict]


def sample_steps(
    task: Task, recipe: GenerateRecipe, prompts: dict[str, Prompt], *, judge: bool = True
) -> DraftSteps:
    """Ask for one sample and put it through the gates. Raises UnusableReplyError with the gate's reason.

    ``judge``: False where only the requests are wanted; then gates are left out after which none would follow.
    """
    reason = caption_fault(task.caption)
    if reason:
        raise UnusableReplyError(reason, "")
    draft = yield from draft_steps(task, recipe, prompts)
    checks = (recipe.checks.answerable_without_image, recipe.checks.verify)
    if not judge and not any(check and task.kind in check.kinds for check in checks):
        return draft
    # What a dry run makes up is judged by nothing: it counts the calls of a sample that passes.
    if not draft.made_up:
        reason = first_fault(task.kind, draft.turns, Background(task.caption, task.facts, recipe.synonyms))
        if reason:
            raise UnusableReplyError(reason, draft.raw)
    blind, verify = checks
    if blind and task.kind in blind.kinds:
        draft = yield from _without_image(task, draft, blind, recipe, prompts["without_image"])
    if verify and task.kind in verify.kinds:
        yield from _verified(task, draft, verify, recipe, prompts["verify"])
    return draft


def _without_image(
    task: Task, draft: Draft, check: BlindCheck, recipe: GenerateRecipe, prompt: Prompt
) -> Generator[Request, Reply, Draft]:
    """The draft without the pairs that can be answered blindly, or marked. Raises UnusableReplyError if none is
    left."""
    if draft.image_dependent is False:
        return draft  # A question of general knowledge, and known as one.
    pairs = list(zip(draft.turns[::2], draft.turns[1::2], strict=True))
    kept: list[Turn] = []
    raw = [draft.raw]
    for question, answer in pairs:
        answerable = True
        for time in range(1, check.times + 1):
            reply = yield make_request(
                recipe, prompt.fill(question=json.dumps(question.text, ensure_ascii=False), variant=time), BlindReply,
                check.model,
            )
            raw.append(reply.text)
            answerable = answerable and _answers(reply, answer.text)
            if not answerable:
                break
        if not answerable or draft.made_up:
            kept += [question, answer]
    if check.action == "mark":
        return replace(draft, image_dependent=len(kept) > 0)
    if not kept:
        raise UnusableReplyError(f"answerable without the image: {pairs[0][0].text!r}", "\n".join(raw))
    return replace(draft, turns=tuple(kept))


def _answers(reply: Reply, expected: str) -> bool:
    """Whether a blind reply gives the expected answer. One that cannot be read has not found it."""
    try:
        told = read_reply(reply, BlindReply)
    except UnusableReplyError:
        return False
    if told.needs_image or not told.answer.strip():
        return False
    wanted, given = verdict(expected), verdict(told.answer)
    if wanted is not None:
        return given is wanted
    words, others = content_words(expected), content_words(told.answer)
    shared = len(words & others)
    f1 = 2 * shared / (len(words) + len(others)) if words or others else 0.0
    return f1 >= SAME_ANSWER or fuzz.ratio(normalised(expected), normalised(told.answer)) >= 90


def _verified(
    task: Task, draft: Draft, check: VerifyCheck, recipe: GenerateRecipe, prompt: Prompt
) -> Generator[Request, Reply, None]:
    """Raises UnusableReplyError for the first sentence that the talk does not bear out."""
    claims = [sentence for turn in draft.turns if turn.role == "assistant" for sentence in sentences(turn.text)]
    reply = yield make_request(
        recipe,
        prompt.fill(
            phrases=phrase_lines(task.caption.phrases), talk=_talk(task), case=_case(task), questions=_questions(draft),
            sentences="\n".join(f"{n}. {json.dumps(text, ensure_ascii=False)}" for n, text in enumerate(claims, 1)),
        ),
        VerifyReply,
        check.model,
    )
    if draft.made_up:
        return
    raw = f"{draft.raw}\n{reply.text}"
    try:
        found = {row.number: row for row in read_reply(reply, VerifyReply).sentences}
    except UnusableReplyError as error:
        raise UnusableReplyError(f"not verified: {error.reason}", raw) from error
    if found.keys() != set(range(1, len(claims) + 1)):
        raise UnusableReplyError(f"not verified: {len(found)} verdicts for {len(claims)} sentences", raw)
    for number, text in enumerate(claims, 1):
        row = found[number]
        if row.verdict == "contradicted":
            raise UnusableReplyError(f"contradicts the talk: {text!r} ({row.reason})", raw)
        if row.verdict == "unsupported":
            raise UnusableReplyError(f"unsupported claim: {text!r} ({row.reason})", raw)


def _talk(task: Task) -> str:
    return remark_lines(task.asked.talk) if task.asked else "(nothing else)"


def _case(task: Task) -> str:
    """What the verifier may take as known beside the image's own remarks."""
    if task.kind not in REASONING_KINDS or task.facts is None:
        return "(not given)"
    clues = "; ".join(json.dumps(clue.text, ensure_ascii=False) for clue in task.facts.clues)
    return f"{task.facts.diagnosis}; seen elsewhere on the slide: {clues or 'nothing named'}"


def _questions(draft: Draft) -> str:
    asked: Sequence[Turn] = [turn for turn in draft.turns if turn.role == "user"]
    return "\n".join(f"{n}. {json.dumps(turn.text, ensure_ascii=False)}" for n, turn in enumerate(asked, 1))
