"""From kept replies to the result files: a pure function of captions, recipe, prompts and replies.

Nothing depends on the order in which replies came, so runs with any concurrency, and runs that were killed and taken up
again, write the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medllava.instruct_gen.asking import Plan, Trouble, read_facts
from medllava.instruct_gen.duplicates import NearDuplicates
from medllava.instruct_gen.finished import write_note
from medllava.instruct_gen.kinds import seeded_fraction
from medllava.instruct_gen.making import Made, Maker
from medllava.instruct_gen.records import CaseFacts, Dropped
from medllava.instruct_gen.redact import RedactedFile
from medllava.jsonl import atomic_write, to_line, write_json, write_json_list, write_records
from medllava.llm.cache import ReplyCache

_RESULTS = (
    "samples.jsonl", "dropped.jsonl", "case_facts.jsonl", "llava.json", "train.json", "val.json", "split.json",
    "summary.json",
)
_BENCHMARKS = {True: "questions.jsonl", False: "questions_general.jsonl"}
"""The narrators' questions of the val videos: those that need the image, and those of general knowledge."""


def write_results(plan: Plan, cache: ReplyCache, trouble: Trouble, out: Path) -> dict[str, Any]:
    """Write every result file into ``out``, sample by sample; returns what is in summary.json."""
    split = split_videos(plan.captions.videos, plan.recipe.val_fraction, plan.recipe.seed)
    facts: dict[str, CaseFacts] = {}
    kept: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:
        samples, dropped = (
            stack.enter_context(atomic_write(out / name)) for name in ("samples.jsonl", "dropped.jsonl")
        )
        whole, *parts = (
            stack.enter_context(write_json_list(out / name)) for name in ("llava.json", "train.json", "val.json")
        )
        part = dict(zip(("train", "val"), parts, strict=True))
        benchmark = {
            dependent: stack.enter_context(atomic_write(out / name))
            for dependent, name in _BENCHMARKS.items() if "question" in plan.recipe.plans
        }

        def drop(row: Dropped) -> None:
            dropped.write(to_line(row))
            reasons[row.reason.partition(":")[0]] += 1

        for video, found in read_facts(plan, cache):
            if isinstance(found, CaseFacts):
                facts[video] = found
                for reason in found.rejected:
                    drop(Dropped(id=f"{video} (case facts)", reason=reason))
            else:
                reason = found.reason if found else trouble.why_absent(video)
                drop(Dropped(id=f"{video} (case facts)", reason=reason, raw=found.raw if found else None))
        duplicates = NearDuplicates()
        for task, made in Maker(plan.recipe, plan.prompts, cache.kept).make_all(plan.tasks(facts)):
            if made is None:
                made = Dropped(id=task.id, reason=trouble.why_absent(task.id))
            elif isinstance(made, Made) and (alike := duplicates.fault(task.id, task.caption.image, made.fingerprint)):
                made = Dropped(id=task.id, reason=alike, raw=made.raw)
            if isinstance(made, Dropped):
                drop(made)
                continue
            kept[task.kind] += 1
            samples.write(made.line)
            whole(made.item)
            part[split[task.caption.video]](made.item)
            if made.question and split[task.caption.video] == "val":
                benchmark[bool(made.image_dependent)].write(made.question)
    write_records(out / "case_facts.jsonl", facts.values())
    write_json(out / "split.json", split)
    summary = _summary(plan, cache, kept, reasons)
    write_json(out / "summary.json", summary)
    if not (trouble.failures or trouble.stopped):
        write_note(plan, out, [*_RESULTS, *(_BENCHMARKS.values() if "question" in plan.recipe.plans else ())])
    return summary


def split_videos(videos: Sequence[str], val_fraction: float, seed: int) -> dict[str, str]:
    """``train`` or ``val`` for each video, by a seeded hash of its name without the extension.

    A video keeps its part when others are added. If a part was asked for and there are two videos or more, at least
    one is in val and at least one in train.
    """
    places = {Path(video).stem: seeded_fraction(seed, "split", Path(video).stem) for video in videos}
    by_place = sorted(places, key=lambda stem: (places[stem], stem))
    val = {stem for stem, place in places.items() if place < val_fraction}
    if val_fraction > 0 and len(places) > 1:
        val = (val or {by_place[0]}) - (set() if len(val) < len(places) else {by_place[-1]})
    return {video: "val" if Path(video).stem in val else "train" for video in videos}


def _summary(plan: Plan, cache: ReplyCache, kept: Counter[str], reasons: Counter[str]) -> dict[str, Any]:
    price = plan.recipe.usd_per_million
    return {
        "kept": {kind: kept[kind] for kind in plan.recipe.plans},
        "dropped": dict(sorted(reasons.items())),
        "replies": len(cache),
        "prompt_tokens": cache.prompt_tokens,
        "cached_tokens": cache.cached_tokens,
        "completion_tokens": cache.completion_tokens,
        "usd": round(cache.usd(price), 4) if price else None,
        "redacted": isinstance(plan.captions, RedactedFile),
        "recipe": plan.recipe.model_dump(mode="json", exclude={"prompts", "concurrency"}),
        "prompts": {name: prompt.hash for name, prompt in plan.prompts.items()},
    }
