"""Correct misheard medical terms in captions by asking a text model, and find what in them is medical.

A model proposes; a proposal stands only if it changes one term into another that sounds like it and that the vocabulary
knows (or that sounds all but the same), and changes no number, negation, side or degree. Nothing else is touched: ids,
times and boxes stay. Replies are kept in OUT/replies.jsonl and never paid for twice. Results, in OUT:

  captions.jsonl      the captions with the corrections that stand; give these to generate
  corrections.jsonl   every proposal: from, to, both texts, its times, accepted or not, and why
  medical_text.jsonl  per caption its medical text and the phrases about its region, of words that were said
  concepts.jsonl      per caption the vocabulary's terms in it, and the sub-pathology of its video
  uncorrected.jsonl   what got no usable reply and stays as it was: id, reason, raw reply
  correct.json        counts, tokens and money

example:
  python -m medllava.instruct_gen correct --captions out/captions.jsonl --out out/corrected \\
      --config instruct_gen/recipes/quilt_instruct.yaml --redact --dry-run
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, ServiceError
from medllava.jsonl import Appender, write_json

if TYPE_CHECKING:
    from medllava.instruct_gen.asking import Trouble
    from medllava.instruct_gen.captions import CaptionFile
    from medllava.instruct_gen.concepts import ConceptLinker, Vocabulary
    from medllava.instruct_gen.correcting import Answer, Part, Steps
    from medllava.instruct_gen.prompts import Prompt
    from medllava.instruct_gen.recipe import GenerateRecipe
    from medllava.instruct_gen.records import GroundedCaption
    from medllava.llm.cache import CachedModel, ReplyCache

HELP = "captions -> captions with misheard terms corrected, medical text, concepts"

RESULTS = ("captions", "corrections", "medical_text", "concepts", "uncorrected")


def configure(parser: argparse.ArgumentParser) -> None:
    from medllava.instruct_gen.endpoint import add_flags

    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    from medllava.instruct_gen.endpoint import Address, read_captions, read_recipe, read_vocabulary, tell_redactions
    from medllava.instruct_gen.prompts import load_prompt
    from medllava.llm.cache import ReplyCache

    recipe = read_recipe(args)
    if (args.out / "captions.jsonl").resolve() == args.captions.resolve():
        raise ConfigError(f"--out {args.out}: would overwrite the captions that are read; choose another folder")
    vocabulary = read_vocabulary(args, recipe)
    captions = read_captions(args, recipe, vocabulary)
    work = _Work(captions, recipe, load_prompt(recipe.prompts, "correct"), vocabulary)
    address = Address.of(args, recipe)
    path = args.out / "replies.jsonl"
    if args.dry_run:
        with ReplyCache(path) if path.exists() else nullcontext(ReplyCache(path)) as cache:
            _print_estimate(work, cache, address.base_url)
        return 0
    tell_redactions(captions)
    address.announce(f"what was said in {len(captions)} captions", recipe.model)
    with ReplyCache(path) as cache:
        trouble = address.ask(recipe, cache, lambda model: _ask(work, model, cache))
        summary = _write(work, cache, trouble, args.out)
    _print_summary(summary, args.out)
    return _exit_code(summary, trouble)


@dataclass(frozen=True)
class _Work:
    """What there is to ask about."""

    captions: CaptionFile
    recipe: GenerateRecipe
    prompt: Prompt
    vocabulary: Vocabulary

    def parts(self) -> Iterator[Part]:
        from medllava.instruct_gen.correcting import parts

        for caption in self.captions:
            yield from parts(caption)

    def steps(self, part: Part) -> Steps:
        from medllava.instruct_gen.correcting import correct_steps

        return correct_steps(part, self.recipe, self.prompt)


async def _ask(work: _Work, model: CachedModel, cache: ReplyCache) -> Trouble:
    from medllava.instruct_gen.asking import Trouble, ask_each, drive
    from medllava.llm.budget import BudgetError

    trouble = Trouble()
    try:
        await ask_each(
            "correct", work.parts(), sum(1 for _ in work.parts()),
            lambda part: drive(part.id, work.steps(part), model, trouble), work.recipe, cache, model.pace,
        )
    except BudgetError as error:
        trouble.stopped = str(error)
    return trouble


def _write(work: _Work, cache: ReplyCache, trouble: Trouble, out: Path) -> dict[str, Any]:
    """Write every result from the kept replies; returns what is in correct.json."""
    from medllava.instruct_gen.concepts import vote

    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    subjects = {
        video: vote(mention for caption in work.captions.of_video(video) for phrase in caption.phrases
                    for mention in work.vocabulary.link(phrase.text))
        for video in work.captions.videos
    }  # fmt: skip
    with _Results(out) as results:
        for caption in work.captions:
            row = _corrected(work, caption, cache, trouble)
            results.write("captions", row.caption.model_dump(mode="json"))
            for correction in row.corrections:
                results.write("corrections", correction.model_dump(mode="json", by_alias=True))
                counts["accepted" if correction.accepted else "refused"] += 1
                if not correction.accepted:
                    refused[correction.reason.partition(" (")[0]] += 1
            results.write("medical_text", {
                "id": caption.id, "medical_text": row.medical_text, "roi_text": list(row.roi_text),
            })
            counts["extracted_dropped"] += row.dropped
            concepts = list(_concepts(row.caption, work.vocabulary))
            counts["concepts"] += len(concepts)
            results.write("concepts", {
                "id": caption.id, "concepts": concepts, "sub_pathology": subjects[caption.video],
            })
            for failure in row.failures:
                results.write("uncorrected", failure)
                counts["uncorrected"] += 1
                counts["absent"] += failure["reason"].startswith(("no reply", "not asked"))
    price = work.recipe.usd_per_million
    summary = {
        "captions": len(work.captions), **{name: counts[name] for name in (
            "accepted", "refused", "extracted_dropped", "concepts", "uncorrected", "absent"
        )},
        "refused_because": dict(sorted(refused.items())), "sub_pathology": subjects, "replies": len(cache),
        "prompt_tokens": cache.prompt_tokens, "completion_tokens": cache.completion_tokens,
        "usd": round(cache.usd(price), 4) if price else None, "prompt": work.prompt.hash,
    }  # fmt: skip
    write_json(out / "correct.json", summary)
    return summary


@dataclass(frozen=True)
class _Row:
    """One caption's results."""

    caption: GroundedCaption
    corrections: tuple[Any, ...]
    medical_text: str
    roi_text: tuple[str, ...]
    dropped: int
    failures: tuple[dict[str, Any], ...]


def _corrected(work: _Work, caption: GroundedCaption, cache: ReplyCache, trouble: Trouble) -> _Row:
    from medllava.instruct_gen.asking import replay
    from medllava.instruct_gen.correcting import corrected, extracted, parts
    from medllava.instruct_gen.kinds import UnusableReplyError

    texts: list[str] = []
    corrections: list[Any] = []
    answers: list[Answer] = []
    failures: list[dict[str, Any]] = []
    for part in parts(caption):
        said = [phrase.text for phrase in part.phrases]
        try:
            answer = replay(work.steps(part), cache)
        except UnusableReplyError as error:
            failures.append({"id": part.id, "reason": error.reason, "raw": error.raw})
        except LookupError:
            failures.append({"id": part.id, "reason": trouble.why_absent(part.id), "raw": None})
        else:
            said, diff = corrected(part, answer, work.vocabulary)
            corrections += diff
            answers.append(answer)
        texts += said
    found = extracted(texts, answers, work.vocabulary)
    phrases = [phrase.model_copy(update={"text": text}) for phrase, text in zip(caption.phrases, texts, strict=True)]
    return _Row(
        caption.model_copy(update={"phrases": tuple(phrases)}), tuple(corrections), found.medical_text, found.roi_text,
        found.dropped, tuple(failures),
    )


def _concepts(caption: GroundedCaption, linker: ConceptLinker) -> Iterator[dict[str, Any]]:
    """Terms with the number of their phrase and their place in its text (characters, end exclusive)."""
    for number, phrase in enumerate(caption.phrases):
        for mention in linker.link(phrase.text):
            yield {
                "id": mention.concept.id, "term": mention.concept.term, "phrase": number, "start": mention.start,
                "end": mention.end,
            }  # fmt: skip


class _Results:
    """The result files, each written beside its name and put there only when all is written."""

    def __init__(self, out: Path) -> None:
        self._paths = {name: out / f"{name}.jsonl" for name in RESULTS}

    def __enter__(self) -> _Results:
        self._writers = {}
        for name, path in self._paths.items():
            _part(path).unlink(missing_ok=True)
            self._writers[name] = Appender(_part(path)).__enter__()
        return self

    def write(self, name: str, row: dict[str, Any]) -> None:
        self._writers[name].write(row)

    def __exit__(self, kind: object, *_: object) -> None:
        for name, path in self._paths.items():
            self._writers[name].__exit__()
            if kind is None:
                _part(path).replace(path)
            else:
                _part(path).unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _print_estimate(work: _Work, cache: ReplyCache, base_url: str) -> None:
    """Calls, tokens and money of what has no reply yet; a reply is about as long as what it is about."""
    from medllava.llm.base import estimate_prompt_tokens, estimate_tokens

    answered = calls = prompt_tokens = reply_tokens = 0
    for part in work.parts():
        request = next(work.steps(part))
        if cache.get(request.key()) is not None:
            answered += 1
            continue
        calls += 1
        prompt_tokens += estimate_prompt_tokens(request)
        reply_tokens += 30 + sum(estimate_tokens(phrase.text) for phrase in part.phrases)
    price = work.recipe.usd_per_million
    money = f"${price.usd(prompt_tokens, reply_tokens):.2f}" if price else "unpriced"
    print(
        f"{answered:,} answered, {calls:,} calls: {prompt_tokens:,} prompt tokens, {reply_tokens:,} reply tokens,"
        f" {money}"
    )
    print(f"no call was made; a run would send {calls:,} to {base_url}, model {work.recipe.model}")


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    print(
        f"{summary['captions']:,} captions: {summary['accepted']:,} corrections accepted,"
        f" {summary['refused']:,} refused; {summary['extracted_dropped']:,} extracted texts were not said and are left"
        " out;"
        f" {summary['concepts']:,} terms linked"
    )
    for reason, count in summary["refused_because"].items():
        print(f"  {reason:<48}{count:>7,}")
    money = "" if summary["usd"] is None else f", ${summary['usd']:.2f}"
    print(f"{summary['replies']:,} replies{money} -> {out / 'captions.jsonl'}")


def _exit_code(summary: dict[str, Any], trouble: Trouble) -> int:
    if trouble.stopped:
        raise ServiceError(f"stopped by --max-usd: {trouble.stopped}. A run with a larger limit goes on")
    if summary["absent"]:
        raise ServiceError(f"{summary['absent']} parts got no reply; the same command again asks only for those")
    return 0
