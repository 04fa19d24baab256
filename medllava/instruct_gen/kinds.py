"""How each kind of sample is asked for and read: pure functions between captions, requests and drafts.

A sample is written down once, as a generator that yields requests, is sent the replies and returns a draft. Asking
drives it with calls; assembling drives it again with the replies kept on disk; ``--dry-run`` with made-up ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from json.encoder import encode_basestring
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from medllava.conversation import Turn
from medllava.geometry import format_box
from medllava.instruct_gen.diagnoses import is_named
from medllava.instruct_gen.narrator_questions import NarratorQuestion, answer_fault
from medllava.instruct_gen.prompts import Prompt, load_prompt
from medllava.instruct_gen.recipe import REASONING_KINDS, GenerateRecipe, SampleKind
from medllava.instruct_gen.records import CaseFacts, GroundedCaption, Phrase
from medllava.jsonl import describe
from medllava.llm.base import Reply, Request

PROMPT_NAMES: dict[SampleKind, tuple[str, ...]] = {
    "caption": ("caption",),
    "conversation": ("conversation",),
    "description": ("description",),
    "complex_reasoning": ("complex_reasoning",),
    "iterative_abduction": ("abduction_student", "abduction_assistant"),
    "grounding": ("grounding",),
    "question": ("question",),
}
"""Which prompt files a kind uses; ``case_facts`` goes before the reasoning kinds."""


MADE_UP = "made up"
"""The ``finish_reason`` of replies that ``--dry-run`` makes up: their content is judged by no gate."""


class Form(BaseModel):
    """A reply's shape. All keys are required and no others allowed: what strict structured output asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QuestionReply(Form):
    question: str
    answer: str


class TurnsReply(Form):
    turns: list[QuestionReply]


class CaptionReply(Form):
    caption: str


class DescriptionReply(Form):
    description: str


class StudentReply(Form):
    abduction: str
    facts_used: str


class AssistantReply(Form):
    comments: str
    hint: str


class NarratorReply(Form):
    question: str
    answer: str
    type: Literal["open", "closed"]
    image_dependent: bool
    quote: str


AnyForm = TypeVar("AnyForm", bound=Form)


class UnusableReplyError(Exception):
    """A reply that no sample can be made of: the reason, and the reply as it came."""

    def __init__(self, reason: str, raw: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.raw = raw


@dataclass(frozen=True)
class Task:
    """One sample to be made. ``number`` counts from 1 within the caption and kind; ``asked`` is the narrator's question
    of a ``question``."""

    caption: GroundedCaption
    kind: SampleKind
    number: int
    facts: CaseFacts | None = None
    asked: NarratorQuestion | None = None

    @property
    def id(self) -> str:
        return f"{self.caption.id}-{self.kind}-{self.number}"


@dataclass(frozen=True)
class Draft:
    """Turns without the image tag, before the gates; ``raw`` holds the replies they were made of. ``made_up``: they
    come from a dry run. The rest is known of some kinds only."""

    turns: tuple[Turn, ...]
    raw: str
    teacher: str
    prompt_hash: str
    made_up: bool = False
    answer_type: Literal["open", "closed"] | None = None
    image_dependent: bool | None = None
    quote: str | None = None


DraftSteps = Generator[Request, Reply, Draft]


def seeded_fraction(seed: int, *names: str) -> float:
    """A number in 0..1 that depends on nothing but its arguments: the project's coin for splits and choices."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def phrase_lines(phrases: Iterable[Phrase]) -> str:
    """Phrases as the prompts carry them: ``- "text" [x1, y1, x2, y2]`` or ``- "text" (no region)``.

    The text is quoted as JSON, so that nothing said in it can look like another line of the prompt.
    """
    return "\n".join(
        f"- {encode_basestring(phrase.text)} {format_box(phrase.box) if phrase.box else '(no region)'}"
        for phrase in phrases
    )


def remark_lines(phrases: Iterable[Phrase]) -> str:
    """Phrases with their times, for the facts of a whole video: ``- 12.5 s: "text"``."""
    return "\n".join(
        f"- {phrase.start_s:.1f} s: {encode_basestring(phrase.text)}" for phrase in phrases
    )


def load_prompts(recipe: GenerateRecipe) -> dict[str, Prompt]:
    """Every prompt that the recipe's kinds use, by name. Raises ConfigError for one that is absent or broken."""
    names = [name for kind in recipe.plans for name in PROMPT_NAMES[kind]]
    if REASONING_KINDS & recipe.plans.keys():
        names.append("case_facts")
    if recipe.checks.answerable_without_image:
        names.append("without_image")
    if recipe.checks.verify:
        names.append("verify")
    return {name: load_prompt(recipe.prompts, name) for name in names}


def draft_steps(task: Task, recipe: GenerateRecipe, prompts: dict[str, Prompt]) -> DraftSteps:
    """Ask for one sample. Raises UnusableReplyError."""
    if task.kind == "iterative_abduction":
        return (yield from _dialogue_steps(task, recipe, prompts))
    if task.kind == "question":
        return (yield from _narrator_steps(task, recipe, prompts["question"]))
    prompt = prompts[task.kind]
    values: dict[str, object] = {"phrases": phrase_lines(task.caption.phrases), "variant": task.number}
    if task.kind in REASONING_KINDS:
        values |= _case(task)
    reply = yield make_request(recipe, prompt.fill(**values), _FORMS[task.kind])
    pairs = _pairs(task, reply, _own_question(task, recipe, prompt))
    turns = [turn for question, answer in pairs for turn in (_turn("user", question), _turn("assistant", answer))]
    return Draft(tuple(turns), reply.text, reply.model, prompt.hash, made_up=reply.finish_reason == MADE_UP)


_FORMS: dict[SampleKind, type[Form]] = {
    "caption": CaptionReply,
    "conversation": TurnsReply,
    "description": DescriptionReply,
    "complex_reasoning": QuestionReply,
    "grounding": TurnsReply,
}


def _pairs(task: Task, reply: Reply, own_question: str) -> list[tuple[str, str]]:
    if task.kind == "caption":
        return [(own_question, read_reply(reply, CaptionReply).caption)]
    if task.kind == "description":
        return [(own_question, read_reply(reply, DescriptionReply).description)]
    if task.kind == "complex_reasoning":
        single = read_reply(reply, QuestionReply)
        return [(single.question, single.answer)]
    pairs = [(turn.question, turn.answer) for turn in read_reply(reply, TurnsReply).turns]
    if not pairs:
        raise UnusableReplyError("empty answer: no turns", reply.text)
    return pairs


def _narrator_steps(task: Task, recipe: GenerateRecipe, prompt: Prompt) -> DraftSteps:
    """A question that the narrator asked, with the answer that the talk gives (Quilt-VQA)."""
    asked = task.asked
    assert asked is not None, f"{task.id}: no question"
    reply = yield make_request(
        recipe,
        prompt.fill(
            phrases=phrase_lines(task.caption.phrases), question=encode_basestring(asked.text),
            time_s=f"{asked.start_s:.1f}", talk=remark_lines(asked.talk),
        ),
        NarratorReply,
    )
    made_up = reply.finish_reason == MADE_UP
    told = read_reply(reply, NarratorReply)
    fault = None if made_up else answer_fault(asked, told.question, told.answer, told.type, told.quote)
    if fault:
        raise UnusableReplyError(fault, reply.text)
    return Draft(
        (_turn("user", told.question), _turn("assistant", told.answer)), reply.text, reply.model, prompt.hash, made_up,
        told.type, told.image_dependent, told.quote,
    )


def _dialogue_steps(task: Task, recipe: GenerateRecipe, prompts: dict[str, Prompt]) -> DraftSteps:
    """A student who does not know the diagnosis and an assistant who does take turns: 4 turns, or 6 in some
    (Quilt-LLaVA's iterative abductive reasoning)."""
    student, assistant = (prompts[name] for name in PROMPT_NAMES["iterative_abduction"])
    long = seeded_fraction(recipe.seed, "rounds", task.id) < recipe.long_dialogue_fraction
    rounds = 3 if long else 2
    seen = phrase_lines(_without_diagnosis(task, recipe))
    shown = phrase_lines(task.caption.phrases)
    turns: list[Turn] = []
    raw: list[str] = []
    made_up = False
    teacher = recipe.model
    for number in range(1, rounds + 1):
        shared: dict[str, object] = {"round": number, "rounds": rounds, "variant": task.number}
        reply = yield make_request(
            recipe, student.fill(**shared, phrases=seen, dialogue=_dialogue_lines(turns)), StudentReply
        )
        raw.append(reply.text)
        thought = read_reply(reply, StudentReply)
        if not thought.abduction.strip():
            raise UnusableReplyError("empty answer: the student sees nothing", "\n".join(raw))
        turns.append(_turn("user", f"{thought.abduction.strip()} {thought.facts_used.strip()}"))
        reply = yield make_request(
            recipe,
            assistant.fill(**shared, phrases=shown, **_case(task), dialogue=_dialogue_lines(turns)),
            AssistantReply,
        )
        raw.append(reply.text)
        comment = read_reply(reply, AssistantReply)
        turns.append(_turn("assistant", f"{comment.comments.strip()} {comment.hint.strip()}"))
        teacher, made_up = reply.model, made_up or reply.finish_reason == MADE_UP
    both = hashlib.sha256((student.hash + assistant.hash).encode()).hexdigest()[:16]
    return Draft(tuple(turns), "\n".join(raw), teacher, both, made_up)


def _without_diagnosis(task: Task, recipe: GenerateRecipe) -> list[Phrase]:
    """The phrases that a student may read: those that do not name the diagnosis."""
    diagnosis = task.facts.diagnosis if task.facts else None
    return [
        phrase for phrase in task.caption.phrases
        if diagnosis is None or not is_named(phrase.text, diagnosis, recipe.synonyms)
    ]


def _dialogue_lines(turns: Sequence[Turn]) -> str:
    if not turns:
        return "(nothing yet)"
    names = {"user": "Student", "assistant": "Teacher"}
    return "\n".join(f"{names[turn.role]}: {encode_basestring(turn.text)}" for turn in turns)


def _case(task: Task) -> dict[str, object]:
    assert task.facts is not None and task.facts.diagnosis is not None, f"{task.id}: no case facts"
    clues = "\n".join(f"- {encode_basestring(clue.text)}" for clue in task.facts.clues)
    return {"diagnosis": task.facts.diagnosis, "clues": clues or "(none named)"}


def _own_question(task: Task, recipe: GenerateRecipe, prompt: Prompt) -> str:
    if task.kind not in {"caption", "description"}:
        return ""
    plan = recipe.plans[task.kind]
    questions = plan.questions or prompt.questions or ("Describe this image.",)
    return questions[int(seeded_fraction(recipe.seed, "question", task.id) * len(questions))]


def _turn(role: Any, text: str) -> Turn:
    return Turn(role=role, text=text.strip())


def make_request(
    recipe: GenerateRecipe, messages: tuple[dict[str, Any], ...], form: type[Form], model: str | None = None
) -> Request:
    """Ask ``model`` (None: the teacher) for a ``form``."""
    return Request(
        model=model or recipe.model, messages=messages, schema=_schema(form), schema_name=form.__name__,
        sampling=recipe.sampling,
    )


@cache
def _schema(form: type[Form]) -> dict[str, Any]:
    return form.model_json_schema()


def read_reply(reply: Reply, form: type[AnyForm]) -> AnyForm:
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
