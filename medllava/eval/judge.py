"""Let a text model grade saved answers against their references, on any OpenAI-compatible endpoint.

A judgement that fails or cannot be read is kept with its raw reply, counted, and left out of the mean; if more than
2 % are missing there is no headline score. Writes into --out: judgements.jsonl (a verdict per answer), judge.json (the
score and what made it) and judge_replies.jsonl (every reply, so that a second run asks nothing twice).

example:
  medllava eval judge --answers answers/answers.jsonl --base-url http://127.0.0.1:8001/v1 --model NAME --out judged
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from medllava.errors import DataError, MissingExtraError
from medllava.eval.records import Answer, Condition, Metric, Question, QuestionKind, Report, Verdict

if TYPE_CHECKING:
    from medllava.llm.base import Request, TextModel

HELP = "let a text model grade saved answers against the references"

MOST_UNSCORED = 0.02
"""Share of missing judgements beyond which no headline score is given."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=Path, required=True, help="answers.jsonl")
    parser.add_argument("--questions", "--gt", dest="questions", type=Path, help="default: questions.jsonl beside it")
    parser.add_argument("--base-url", help="OpenAI-compatible endpoint (default: OPENAI_BASE_URL)")
    parser.add_argument("--model", required=True, help="the judge's name at the endpoint")
    parser.add_argument("--api-key-file", type=Path, help="file with the key (default: OPENAI_API_KEY)")
    parser.add_argument("--prompt", default="judge", help="name in eval/prompts or path of the prompt; default judge")
    parser.add_argument("--conditions", nargs="+", choices=get_args(Condition), default=["real"], help="default: real")
    parser.add_argument("--kinds", nargs="+", choices=get_args(QuestionKind), help="kinds of question; default: all")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at once; default 8")
    parser.add_argument("--retries", type=int, default=6, help="of a call that got no answer; default 6")
    parser.add_argument("--out", type=Path, required=True, help="folder for the judgements")


def run(arguments: argparse.Namespace) -> int:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("openai", "eval", error) from error
    import asyncio

    from medllava.eval import provenance
    from medllava.eval.benchmarks import find_file, questions_hash, read_question_file
    from medllava.eval.score import read_answers
    from medllava.jsonl import write_json, write_records
    from medllava.llm.cache import CachedModel, ReplyCache
    from medllava.llm.openai_api import OpenAIModel, resolve_api_key, resolve_base_url
    from medllava.model.manifest import current_versions, now

    questions, skipped = read_question_file(arguments.questions or arguments.answers.parent / "questions.jsonl")
    asked = [question for question in questions if not arguments.kinds or question.kind in arguments.kinds]
    known = {question.id: question for question in questions}
    answers = [answer for answer in read_answers(arguments.answers) if answer.question_id not in skipped]
    stray = next((answer.question_id for answer in answers if answer.question_id not in known), None)
    if stray is not None:
        raise DataError(f"{arguments.answers}: question {stray!r} is not in the question file")
    if not asked:
        raise DataError(f"no question of kind {', '.join(arguments.kinds)} to judge")
    template = find_file(arguments.prompt, "prompts", ".md").read_text(encoding="utf-8")
    url = resolve_base_url(arguments.base_url)
    endpoint = OpenAIModel(
        url, resolve_api_key(url, arguments.api_key_file), concurrency=arguments.concurrency,
        max_retries=arguments.retries,
    )
    with ReplyCache(arguments.out / "judge_replies.jsonl") as cache:
        verdicts = asyncio.run(
            judge_all(
                asked, answers, CachedModel(endpoint, cache), arguments.model, template,
                conditions=arguments.conditions, concurrency=arguments.concurrency,
            )
        )
    made = provenance.read_run(arguments.answers)
    report = summarise(
        asked, verdicts,
        {
            "judge": arguments.model, "base_url": url, "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "temperature": 0.0, "model": made.get("model") or ", ".join(sorted({answer.model for answer in answers})),
            "model_sha256": made.get("model_sha256"), "questions_sha256": questions_hash(asked),
            "versions": current_versions(), "command": provenance.command("judge"), "date": now(),
        },
    )
    write_records(arguments.out / "judgements.jsonl", verdicts)
    write_json(arguments.out / "judge.json", report.model_dump(mode="json"))
    found = report.metrics["judge"]
    score = "no score" if found.value is None else f"{found.value:.3f}"
    print(f"judge: {score}  n {found.n}  unscored {found.unscored}")
    for note in report.notes:
        print(f"- {note}")
    return 0


async def judge_all(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    judge: TextModel,
    model: str,
    template: str,
    *,
    conditions: Sequence[Condition] = ("real",),
    concurrency: int = 8,
) -> list[Verdict]:
    """A verdict for each question under each condition, in order. Raises ServiceError where no call can succeed."""
    from tqdm import tqdm

    from medllava.llm.base import for_each

    given = {(answer.question_id, answer.condition): answer.text for answer in answers}
    pairs = [(question, condition) for condition in conditions for question in questions]
    found: dict[tuple[str, str], Verdict] = {}

    async def work(pair: tuple[Question, Condition]) -> None:
        question, condition = pair
        found[question.id, condition] = await _judge_one(
            question, condition, given.get((question.id, condition)), judge, model, template
        )
        progress.update()

    with tqdm(total=len(pairs), desc="judge", mininterval=0.5) as progress:
        await for_each(pairs, work, concurrency)
    return [found[question.id, condition] for question, condition in pairs]


async def _judge_one(
    question: Question, condition: Condition, text: str | None, judge: TextModel, model: str, template: str
) -> Verdict:
    from medllava.llm.base import RefusedError, UnansweredError

    if text is None:
        return Verdict(question_id=question.id, condition=condition, reason="no answer", judge=model)
    if not text.strip():
        return Verdict(question_id=question.id, condition=condition, score=0.0, reason="empty answer", judge=model)
    try:
        reply = await judge.ask(request(question, text, model, template))
    except (RefusedError, UnansweredError) as error:
        return Verdict(question_id=question.id, condition=condition, reason=f"no judgement: {error}", judge=model)
    try:
        score, reason = read_judgement(reply.text)
    except ValueError as error:
        reason = f"unreadable judgement: {error}"
        return Verdict(question_id=question.id, condition=condition, reason=reason, judge=reply.model, raw=reply.text)
    return Verdict(
        question_id=question.id, condition=condition, score=score / 10, reason=reason, judge=reply.model, raw=reply.text
    )


def request(question: Question, answer: str, model: str, template: str) -> Request:
    """The judge's prompt: the template with ``{question}``, ``{reference}`` and ``{answer}`` filled in."""
    from medllava.llm.base import Request, Sampling

    parts = {"question": question.question, "reference": question.answer, "answer": answer}
    # One pass, and headings inside a text made harmless: an answer cannot write its own reference.
    quoted = {name: re.sub(r"^(\s*)#", r"\1\\#", text.strip(), flags=re.MULTILINE) for name, text in parts.items()}
    filled = re.sub(r"\{(question|reference|answer)\}", lambda match: quoted[match.group(1)], template)
    return Request(
        model=model, messages=({"role": "user", "content": filled},), schema=SCHEMA, schema_name="judgement",
        sampling=Sampling(temperature=0.0, max_tokens=512, seed=0),
    )


def read_judgement(text: str) -> tuple[int, str]:
    """(score 0..10, reason). Raises ValueError for anything but one JSON object with a whole score in range."""
    plain = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        value = json.loads(plain)
    except json.JSONDecodeError as error:
        raise ValueError("not a JSON object") from error
    score = value.get("score") if isinstance(value, dict) else None
    if isinstance(score, bool) or not isinstance(score, int) or not 0 <= score <= 10:
        raise ValueError("no whole 'score' from 0 to 10")
    return score, str(value.get("reason", ""))


def summarise(questions: Sequence[Question], verdicts: Sequence[Verdict], provenance: dict[str, Any]) -> Report:
    """Mean score 0..1 per condition with its interval; no value where too many judgements are missing."""
    from medllava.eval.metrics import estimate

    groups = {question.id: question.group for question in questions}
    found: dict[str, Metric] = {}
    notes = []
    for condition in dict.fromkeys(verdict.condition for verdict in verdicts):
        rows = [verdict for verdict in verdicts if verdict.condition == condition]
        scored = [(verdict.score, groups[verdict.question_id]) for verdict in rows if verdict.score is not None]
        missing = len(rows) - len(scored)
        if missing > MOST_UNSCORED * len(rows):
            notes.append(
                f"{condition}: {missing} of {len(rows)} judgements are missing, more than {MOST_UNSCORED:.0%}:"
                " no score is given; run again to ask for what failed"
            )
            found[condition] = Metric(value=None, low=None, high=None, n=len(scored), unscored=missing)
            continue
        mean = estimate([score for score, _ in scored], [group for _, group in scored])
        found[condition] = Metric(value=mean.value, low=mean.low, high=mean.high, n=len(scored), unscored=missing)
    none = Metric(value=None, low=None, high=None, n=0)
    return Report(
        metrics={"judge": found.pop("real", none)},
        ablations={condition: {"judge": metric} for condition, metric in found.items()},
        notes=tuple(notes), provenance=provenance,
    )
