"""How each kind of sample is asked for and read: pure functions between captions, requests and drafts.

A sample is written down once, as a generator that yields requests, is sent the replies and returns a draft. Asking
drives it with calls; assembling drives it again with the replies kept on disk; ``--dry-run`` with made-up ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from medllava.conversation import Turn
from medllava.geometry import format_box
from medllava.instruct_gen.prompts import Prompt, load_prompt
from medllava.instruct_gen.recipe import REASONING_KINDS, GenerateRecipe, SampleKind
from medllava.instruct_gen.records import CaseFacts, Clue, GroundedCaption, Phrase
from medllava.jsonl import describe
from medllava.llm.base import Reply, Request

PROMPT_NAMES: dict[SampleKind, tuple[str, ...]] = {
    "caption": ("caption",),
    "conversation": ("conversation",),
    "description": ("description",),
    "complex_reasoning": ("complex_reasoning",),
    "iterative_abduction": ("abduction_student", "abduction_assistant"),
    "grounding": ("grounding",),
}
"""Which prompt files a kind uses; ``case_facts`` goes before the reasoning kinds."""


class _Form(BaseModel):
    """A reply's shape. All keys are required and no others allowed: what strict structured output asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QuestionReply(_Form):
    question: str
    answer: str


class TurnsReply(_Form):
    turns: list[QuestionReply]


class CaptionReply(_Form):
    caption: str


class DescriptionReply(_Form):
    description: str


class StudentReply(_Form):
    abduction: str
    facts_used: str


class AssistantReply(_Form):
    comments: str
    hint: str


class ClueReply(_Form):
    text: str
    time_s: float


class FactsReply(_Form):
    diagnosis: str | None
    single_case: bool
    clues: list[ClueReply]


Form = TypeVar("Form", bound=_Form)


class UnusableReplyError(Exception):
    """A reply that no sample can be made of: the reason, and the reply as it came."""

    def __init__(self, reason: str, raw: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.raw = raw


@dataclass(frozen=True)
class Task:
    """One sample to be made. ``number`` counts from 1 within the caption and kind."""

    caption: GroundedCaption
    kind: SampleKind
    number: int
    facts: CaseFacts | None = None

    @property
    def id(self) -> str:
        return f"{self.caption.id}-{self.kind}-{self.number}"


@dataclass(frozen=True)
class Draft:
    """Turns without the image tag, before the gates; ``raw`` holds the replies they were made of."""

    turns: tuple[Turn, ...]
    raw: str
    teacher: str
    prompt_hash: str


DraftSteps = Generator[Request, Reply, Draft]
FactsSteps = Generator[Request, Reply, CaseFacts]


def seeded_fraction(seed: int, *names: str) -> float:
    """A number in 0..1 that depends on nothing but its arguments: the project's coin for splits and choices."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def phrase_lines(phrases: Iterable[Phrase]) -> str:
    """Phrases as the prompts carry them: ``- "text" [x1, y1, x2, y2]`` or ``- "text" (no region)``.

    The text is quoted as JSON, so that nothing said in it can look like another line of the prompt.
    """
    return "\n".join(
        f"- {json.dumps(phrase.text, ensure_ascii=False)} {format_box(phrase.box) if phrase.box else '(no region)'}"
        for phrase in phrases
    )


def remark_lines(phrases: Iterable[Phrase]) -> str:
    """Phrases with their times, for the facts of a whole video: ``- 12.5 s: "text"``."""
    return "\n".join(
        f"- {phrase.start_s:.1f} s: {json.dumps(phrase.text, ensure_ascii=False)}" for phrase in phrases
    )


def load_prompts(recipe: GenerateRecipe) -> dict[str, Prompt]:
    """Every prompt that the recipe's kinds use, by name. Raises ConfigError for one that is absent or broken."""
    names = [name for kind in recipe.plans for name in PROMPT_NAMES[kind]]
    if REASONING_KINDS & recipe.plans.keys():
        names.append("case_facts")
    return {name: load_prompt(recipe.prompts, name) for name in names}


def facts_steps(
    video: str, phrases: Sequence[Phrase], recipe: GenerateRecipe, prompts: dict[str, Prompt]
) -> FactsSteps:
    """Ask what a whole video says about its case. Raises UnusableReplyError."""
    prompt = prompts["case_facts"]
    reply = yield _request(recipe, prompt.fill(remarks=remark_lines(phrases)), FactsReply)
    facts = _read(reply, FactsReply)
    return CaseFacts(
        video=video, diagnosis=(facts.diagnosis or "").strip() or None, single_case=facts.single_case,
        clues=tuple(Clue(text=clue.text, time_s=clue.time_s) for clue in facts.clues),
        prompt_hash=prompt.hash, teacher=reply.model,
    )


def draft_steps(task: Task, recipe: GenerateRecipe, prompts: dict[str, Prompt]) -> DraftSteps:
    """Ask for one sample. Raises UnusableReplyError."""
    if task.kind == "iterative_abduction":
        return (yield from _dialogue_steps(task, recipe, prompts))
    prompt = prompts[task.kind]
    values: dict[str, object] = {"phrases": phrase_lines(task.caption.phrases), "variant": task.number}
    if task.kind in REASONING_KINDS:
        values |= _case(task)
    reply = yield _request(recipe, prompt.fill(**values), _FORMS[task.kind])
    pairs = _pairs(task, reply, _own_question(task, recipe, prompt))
    turns = [turn for question, answer in pairs for turn in (_turn("user", question), _turn("assistant", answer))]
    return Draft(tuple(turns), reply.text, reply.model, prompt.hash)


_FORMS: dict[SampleKind, type[_Form]] = {
    "caption": CaptionReply,
    "conversation": TurnsReply,
    "description": DescriptionReply,
    "complex_reasoning": QuestionReply,
    "grounding": TurnsReply,
}


def _pairs(task: Task, reply: Reply, own_question: str) -> list[tuple[str, str]]:
    if task.kind == "caption":
        return [(own_question, _read(reply, CaptionReply).caption)]
    if task.kind == "description":
        return [(own_question, _read(reply, DescriptionReply).description)]
    if task.kind == "complex_reasoning":
        single = _read(reply, QuestionReply)
        return [(single.question, single.answer)]
    pairs = [(turn.question, turn.answer) for turn in _read(reply, TurnsReply).turns]
    if not pairs:
        raise UnusableReplyError("empty answer: no turns", reply.text)
    return pairs


def _dialogue_steps(task: Task, recipe: GenerateRecipe, prompts: dict[str, Prompt]) -> DraftSteps:
    """A student who does not know the diagnosis and an assistant who does take turns: 4 turns, or 6 in some
    (Quilt-LLaVA's iterative abductive reasoning)."""
    student, assistant = (prompts[name] for name in PROMPT_NAMES["iterative_abduction"])
    long = seeded_fraction(recipe.seed, "rounds", task.id) < recipe.long_dialogue_fraction
    rounds = 3 if long else 2
    phrases = phrase_lines(task.caption.phrases)
    turns: list[Turn] = []
    raw: list[str] = []
    teacher = recipe.model
    for number in range(1, rounds + 1):
        shared: dict[str, object] = {"phrases": phrases, "round": number, "rounds": rounds, "variant": task.number}
        reply = yield _request(recipe, student.fill(**shared, dialogue=_dialogue_lines(turns)), StudentReply)
        raw.append(reply.text)
        thought = _read(reply, StudentReply)
        if not thought.abduction.strip():
            raise UnusableReplyError("empty answer: the student sees nothing", "\n".join(raw))
        turns.append(_turn("user", f"{thought.abduction.strip()} {thought.facts_used.strip()}"))
        reply = yield _request(
            recipe, assistant.fill(**shared, **_case(task), dialogue=_dialogue_lines(turns)), AssistantReply
        )
        raw.append(reply.text)
        comment = _read(reply, AssistantReply)
        turns.append(_turn("assistant", f"{comment.comments.strip()} {comment.hint.strip()}"))
        teacher = reply.model
    both = hashlib.sha256((student.hash + assistant.hash).encode()).hexdigest()[:16]
    return Draft(tuple(turns), "\n".join(raw), teacher, both)


def _dialogue_lines(turns: Sequence[Turn]) -> str:
    if not turns:
        return "(nothing yet)"
    names = {"user": "Student", "assistant": "Teacher"}
    return "\n".join(f"{names[turn.role]}: {json.dumps(turn.text, ensure_ascii=False)}" for turn in turns)


def _case(task: Task) -> dict[str, object]:
    assert task.facts is not None and task.facts.diagnosis is not None, f"{task.id}: no case facts"
    clues = "\n".join(f"- {json.dumps(clue.text, ensure_ascii=False)}" for clue in task.facts.clues)
    return {"diagnosis": task.facts.diagnosis, "clues": clues or "(none named)"}


def _own_question(task: Task, recipe: GenerateRecipe, prompt: Prompt) -> str:
    if task.kind not in {"caption", "description"}:
        return ""
    questions = prompt.questions or ("Describe this image.",)
    return questions[int(seeded_fraction(recipe.seed, "question", task.id) * len(questions))]


def _turn(role: Any, text: str) -> Turn:
    return Turn(role=role, text=text.strip())


def _request(recipe: GenerateRecipe, messages: tuple[dict[str, Any], ...], form: type[_Form]) -> Request:
    return Request(
        model=recipe.model, messages=messages, schema=_schema(form), schema_name=form.__name__, sampling=recipe.sampling
    )


@cache
def _schema(form: type[_Form]) -> dict[str, Any]:
    return form.model_json_schema()


def _read(reply: Reply, form: type[Form]) -> Form:
    """The reply as a ``form``; also out of a code fence or from among prose, which endpoints without structured
    output write. Raises UnusableReplyError."""
    if reply.finish_reason in {"refusal", "content_filter"}:
        raise UnusableReplyError(f"refused: {reply.finish_reason}", reply.text)
    if reply.finish_reason == "length":
        raise UnusableReplyError("truncated: the reply ran into max_tokens", reply.text)
    start, end = reply.text.find("{"), reply.text.rfind("}")
    if start < 0 or end < start:
        raise UnusableReplyError("malformed: no JSON object in the reply", reply.text)
    try:
        return form.model_validate_json(reply.text[start : end + 1])
    except ValidationError as error:
        raise UnusableReplyError(f"malformed: not a {form.__name__}: {describe(error)}", reply.text) from error
