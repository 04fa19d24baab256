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

from medllava.conversation import IMAGE_TAG, InstructionSample, Provenance, Turn
from medllava.instruct_gen.asking import Plan, Trouble, read_facts, replay
from medllava.instruct_gen.duplicates import NearDuplicates
from medllava.instruct_gen.finished import write_note
from medllava.instruct_gen.kinds import Draft, Task, UnusableReplyError, seeded_fraction
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.instruct_gen.records import CaseFacts, Dropped
from medllava.instruct_gen.redact import RedactedFile
from medllava.instruct_gen.wording import verdict
from medllava.jsonl import atomic_write, to_item, to_line, write_json, write_json_list, write_records
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
        duplicates = NearDuplicates(plan.recipe.duplicates_across_images)
        for task in plan.tasks(facts):
            result = _sample_or_drop(task, plan, cache, trouble, duplicates)
            if isinstance(result, Dropped):
                drop(result)
                continue
            kept[result.kind] += 1
            samples.write(to_line(result))
            item = to_item(result.to_llava())
            whole(item)
            part[split[task.caption.video]](item)
            if result.kind == "question" and split[task.caption.video] == "val":
                benchmark[bool(result.image_dependent)].write(to_line(_question(result)))
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


def _sample_or_drop(
    task: Task, plan: Plan, cache: ReplyCache, trouble: Trouble, duplicates: NearDuplicates
) -> InstructionSample | Dropped:
    try:
        draft = replay(plan.steps(task), cache)
    except UnusableReplyError as error:
        return Dropped(id=task.id, reason=error.reason, raw=error.raw or None)
    except LookupError:
        return Dropped(id=task.id, reason=trouble.why_absent(task.id))
    reason = duplicates.fault(task.id, task.caption.image, draft.turns)
    if reason:
        return Dropped(id=task.id, reason=reason, raw=draft.raw)
    return _sample(task, draft, plan.recipe)


def _sample(task: Task, draft: Draft, recipe: GenerateRecipe) -> InstructionSample:
    first, *rest = draft.turns
    behind = recipe.image_position == "random" and seeded_fraction(recipe.seed, "image", task.id) < 0.5
    asked = f"{first.text}\n{IMAGE_TAG}" if behind else f"{IMAGE_TAG}\n{first.text}"
    phrases = task.caption.phrases
    return InstructionSample(
        id=task.id, kind=task.kind, images=(task.caption.image,), turns=(Turn(role="user", text=asked), *rest),
        answer_type=draft.answer_type, image_dependent=draft.image_dependent,
        provenance=Provenance(
            video=task.caption.video, chunk=task.caption.id, prompt_hash=draft.prompt_hash, teacher=draft.teacher,
            start_s=min((phrase.start_s for phrase in phrases), default=None),
            end_s=max((phrase.end_s for phrase in phrases), default=None), quote=draft.quote,
        ),
    )


def _question(sample: InstructionSample) -> dict[str, Any]:
    """A narrator's question as a line of the question files that ``medllava eval`` reads."""
    question, answer = (turn.text.replace(IMAGE_TAG, "").strip() for turn in sample.turns[:2])
    row: dict[str, Any] = {"id": sample.id, "image": sample.images[0], "question": question, "kind": sample.answer_type}
    if sample.answer_type == "closed":
        row |= {"answer": "yes" if verdict(answer) else "no", "choices": ["yes", "no"]}
    else:
        row |= {"answer": answer, "choices": []}
    return {**row, "box": None, "group": sample.provenance.video}


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
