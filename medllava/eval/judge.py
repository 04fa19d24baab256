"""Let a text model judge saved answers, on any OpenAI-compatible endpoint.

--mode grade   each answer alone against its reference, 0 to 10
--mode pair    the answer beside the reference's own words, or beside another run's answer (--against), in both orders:
               relative score (as in the Quilt-LLaVA paper, but both orders averaged), win rate, length-controlled win
               rate, and how often the order changes the winner

A judgement that fails or cannot be read is kept with its raw reply, counted, and left out; if more than 2 % are missing
there is no headline score. Writes into --out: judgements.jsonl, judge.json (the scores and what made them) and
judge_replies.jsonl (every reply, so that a second run asks nothing twice). Tell a price to see and limit the cost.

example:
  medllava eval judge --answers answers/answers.jsonl --base-url http://127.0.0.1:8001/v1 --model NAME --out judged
  medllava eval judge --mode pair --answers answers/answers.jsonl --model A B --price 2.5 10 --dry-run --out judged
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from medllava.errors import ConfigError, DataError, MissingExtraError, ServiceError
from medllava.eval import judge_pairs
from medllava.eval.defuse import defuse, filled, read_object
from medllava.eval.records import (
    Answer,
    Condition,
    Metric,
    PairVerdict,
    Question,
    QuestionKind,
    Report,
    Verdict,
)

if TYPE_CHECKING:
    from medllava.llm.base import Request, TextModel
    from medllava.llm.budget import Price

HELP = "let a text model grade saved answers against the references"

MOST_UNSCORED = 0.02
"""Share of missing judgements beyond which no headline score is given."""

EXPECTED_TOKENS = 40
"""Of a judge's reply, for what --dry-run tells."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=Path, required=True, help="answers.jsonl")
    parser.add_argument("--questions", "--gt", dest="questions", type=Path, help="default: questions.jsonl beside it")
    parser.add_argument("--mode", choices=("grade", "pair"), default="grade", help="default: grade")
    parser.add_argument("--against", type=Path, help="pair: another run's answers.jsonl (default: the references)")
    parser.add_argument("--base-url", help="OpenAI-compatible endpoint (default: OPENAI_BASE_URL)")
    parser.add_argument("--model", required=True, nargs="+", help="the judge's name at the endpoint, or several")
    parser.add_argument("--api-key-file", type=Path, help="file with the key (default: OPENAI_API_KEY)")
    parser.add_argument("--prompt", help="name in eval/prompts or path of the prompt; default judge or judge_pair")
    parser.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="US dollars per million tokens")
    parser.add_argument("--max-usd", type=float, help="stop before the replies in --out cost more")
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and money; make no call")
    parser.add_argument("--conditions", nargs="+", choices=get_args(Condition), default=["real"], help="default: real")
    parser.add_argument("--kinds", nargs="+", choices=get_args(QuestionKind), help="kinds of question; default: all")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at once; default 8")
    parser.add_argument("--retries", type=int, default=6, help="of a call that got no answer; default 6")
    parser.add_argument("--timeout", type=float, default=180, help="seconds that a call may take; default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for the judgements")


def run(arguments: argparse.Namespace) -> int:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("openai", "eval", error) from error
    from medllava.eval import provenance
    from medllava.eval.benchmarks import find_file, questions_hash, read_question_file
    from medllava.eval.score import read_answers
    from medllava.jsonl import write_json, write_records
    from medllava.llm.budget import Price
    from medllava.llm.openai_api import resolve_base_url
    from medllava.model.manifest import current_versions, now

    if arguments.max_usd is not None and arguments.price is None:
        raise ConfigError("--max-usd needs the price: --price IN OUT, in US dollars per million tokens")
    if arguments.against and arguments.mode != "pair":
        raise ConfigError("--against belongs to --mode pair")
    questions, skipped = read_question_file(arguments.questions or arguments.answers.parent / "questions.jsonl")
    asked = [question for question in questions if not arguments.kinds or question.kind in arguments.kinds]
    known = {question.id for question in questions} | skipped
    answers, others = (
        [answer for answer in read_answers(path, known) if answer.question_id not in skipped] if path else []
        for path in (arguments.answers, arguments.against)
    )
    if not asked:
        raise DataError(f"no question of kind {', '.join(arguments.kinds)} to judge")
    prompt = arguments.prompt or ("judge_pair" if arguments.mode == "pair" else "judge")
    template = find_file(prompt, "prompts", ".md").read_text(encoding="utf-8")
    url = resolve_base_url(arguments.base_url)
    price = Price(input=arguments.price[0], output=arguments.price[1]) if arguments.price else None
    work = _Work(asked, answers, _pairs(arguments, asked, answers, others), template, arguments)
    if arguments.dry_run:
        print(work.told(price))
        return 0
    made = provenance.read_run(arguments.answers)
    origin = {
        "mode": arguments.mode, "judge": ", ".join(arguments.model), "base_url": url,
        "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(), "temperature": 0.0, "seed": 0,
        "model": made.get("model") or ", ".join(sorted({answer.model for answer in answers})),
        "model_sha256": made.get("model_sha256"), "questions_sha256": questions_hash(asked),
        "against": str(arguments.against) if arguments.against else None,
        "versions": current_versions(), "command": provenance.command("judge"),
        "date": now(),
    }
    _same_endpoint(arguments.out, url)
    print(work.told(price), flush=True)
    verdicts, usd = asyncio.run(work.done(url, price))
    if arguments.mode == "pair":
        pairs = [verdict for verdict in verdicts if isinstance(verdict, PairVerdict)]
        report = judge_pairs.summarise_pairs(asked, pairs, origin, most_unscored=MOST_UNSCORED)
    else:
        report = summarise(asked, [verdict for verdict in verdicts if isinstance(verdict, Verdict)], origin)
    write_records(arguments.out / "judgements.jsonl", verdicts)
    write_json(arguments.out / "judge.json", report.model_dump(mode="json"))
    cost = [] if usd is None else [f"cost of all replies in {arguments.out}: ${usd:.4f}"]
    print("\n".join([*map(_line, report.metrics.items()), *cost, *(f"- {note}" for note in report.notes)]))
    if verdicts and all(verdict.reason.startswith(judge_pairs.NOT_HAD) for verdict in verdicts):
        raise ServiceError(f"{url}: not one judgement could be had; the first: {verdicts[0].reason}")
    return 0


def _line(named: tuple[str, Metric]) -> str:
    name, found = named
    interval = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
    score = "no score" if found.value is None else f"{found.value:.3f}{interval}"
    return f"{name}: {score}  n {found.n}  unscored {found.unscored}"


def _pairs(
    arguments: argparse.Namespace, asked: Sequence[Question], answers: Sequence[Answer], others: Sequence[Answer]
) -> list[judge_pairs.Pair]:
    if arguments.mode != "pair":
        return []
    given, compared = ({(row.question_id, row.condition): row.text for row in rows} for rows in (answers, others))
    return [
        judge_pairs.Pair(question, condition, given.get((question.id, condition)), other)
        for condition in arguments.conditions
        for question in asked
        if (other := compared.get((question.id, condition)) if arguments.against else question.answer) is not None
    ]


def _same_endpoint(out: Path, url: str) -> None:
    """One folder holds the replies of one endpoint: a judge of the same name elsewhere is another judge."""
    from medllava.jsonl import read_json, write_json

    path = out / "endpoint.json"
    if not path.exists():
        write_json(path, {"base_url": url})
    elif (before := read_json(path).get("base_url")) != url:
        raise ConfigError(f"{out}: holds judgements of {before}, not of {url}; choose another --out")


@dataclass(frozen=True)
class _Work:
    """What is to be judged: either answers alone, or pairs."""

    questions: Sequence[Question]
    answers: Sequence[Answer]
    pairs: Sequence[judge_pairs.Pair]
    template: str
    arguments: argparse.Namespace

    def requests(self) -> list[Request]:
        """Every call, for its price."""
        models, referenced = self.arguments.model, bool(self.arguments.against)
        if self.arguments.mode == "pair":
            return [
                judge_pairs.request(pair, model, self.template, swapped=swapped, with_reference=referenced)
                for model in models for pair in self.pairs if pair.answer is not None for swapped in (False, True)
            ]
        known = {question.id: question for question in self.questions}
        return [
            request(known[answer.question_id], answer.text, model, self.template)
            for model in models for answer in self.answers
            if answer.condition in self.arguments.conditions and answer.question_id in known and answer.text.strip()
        ]

    def told(self, price: Price | None) -> str:
        """Calls, tokens and money, without making a call."""
        from medllava.llm.base import estimate_prompt_tokens

        requests = {made.key(): made for made in self.requests()}
        kept = _kept_keys(self.arguments.out / "judge_replies.jsonl")
        open_ones = [made for key, made in requests.items() if key not in kept]
        prompt = sum(map(estimate_prompt_tokens, open_ones))
        lines = [
            f"{len(open_ones):,} calls to make ({len(requests) - len(open_ones):,} are kept already);"
            f" about {prompt:,} prompt tokens and {EXPECTED_TOKENS * len(open_ones):,} of replies"
        ]
        if price and open_ones:
            most = sum(map(price.most, open_ones))
            lines.append(
                f"about ${price.usd(prompt, EXPECTED_TOKENS * len(open_ones)):.4f}, at most ${most:.4f}"
            )
        return "\n".join(lines)

    async def done(self, url: str, price: Price | None) -> tuple[list[Verdict | PairVerdict], float | None]:
        """All verdicts, and what the replies kept so far have cost."""
        from contextlib import nullcontext

        from medllava.llm.budget import Budget
        from medllava.llm.cache import CachedModel, ReplyCache
        from medllava.llm.openai_api import OpenAIModel, resolve_api_key

        given = self.arguments
        verdicts: list[Verdict | PairVerdict] = []
        with ReplyCache(given.out / "judge_replies.jsonl") as cache:
            budget = Budget(
                price, given.max_usd, replies_usd=cache.usd(price), ledger=cache.path.with_suffix(".sent.jsonl"),
                answered=cache,
            ) if price else None
            with budget or nullcontext():
                endpoint = OpenAIModel(
                    url, resolve_api_key(url, given.api_key_file), concurrency=given.concurrency,
                    max_retries=given.retries, timeout_s=given.timeout, budget=budget,
                )
                judge = CachedModel(endpoint, cache, endpoint.pace)
                try:
                    for model in given.model:
                        verdicts += await self._by(model, judge)
                finally:
                    await judge.drain()
                    await endpoint.close()
            return verdicts, cache.usd(price) if price else None

    async def _by(self, model: str, judge: TextModel) -> Sequence[Verdict | PairVerdict]:
        given = self.arguments
        if given.mode == "pair":
            return await judge_pairs.compare_all(
                self.pairs, judge, model, self.template, with_reference=bool(given.against),
                concurrency=given.concurrency,
            )
        return await judge_all(
            self.questions, self.answers, judge, model, self.template, conditions=given.conditions,
            concurrency=given.concurrency,
        )


def _kept_keys(path: Path) -> set[str]:
    from medllava.jsonl import read_rows

    return {str(row.get("key")) for _, row in read_rows(path)} if path.exists() else set()


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
    if not defuse(text)[0]:
        return Verdict(question_id=question.id, condition=condition, score=0.0, reason="empty answer", judge=model)
    try:
        reply = await judge.ask(request(question, text, model, template))
    except (RefusedError, UnansweredError) as error:
        reason = f"{judge_pairs.NOT_HAD}: {error}"
        return Verdict(question_id=question.id, condition=condition, reason=reason, judge=model)
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
    return Request(
        model=model, messages=({"role": "user", "content": filled(template, parts)},), schema=SCHEMA,
        schema_name="judgement", sampling=Sampling(temperature=0.0, max_tokens=512, seed=0),
    )


def read_judgement(text: str) -> tuple[int, str]:
    """(score 0..10, reason). Raises ValueError for anything but one JSON object with a whole score in range."""
    value = read_object(text)
    score = value.get("score")
    if isinstance(score, bool) or not isinstance(score, int) or not 0 <= score <= 10:
        raise ValueError("no whole 'score' from 0 to 10")
    return score, str(value.get("reason", ""))


def summarise(questions: Sequence[Question], verdicts: Sequence[Verdict], provenance: dict[str, Any]) -> Report:
    """Mean score 0..1 per condition with its interval; no value where too many judgements are missing."""
    from medllava.eval.metrics import metric_of

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
        found[condition] = metric_of([score for score, _ in scored], [group for _, group in scored], missing)
    none = Metric(value=None, low=None, high=None, n=0)
    return Report(
        metrics={"judge": found.pop("real", none)},
        ablations={condition: {"judge": metric} for condition, metric in found.items()},
        notes=tuple(notes), provenance=provenance,
    )
