"""What a run asks the teacher, and the asking itself."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from tqdm import tqdm

from medllava.errors import ServiceError
from medllava.instruct_gen.captions import CaptionFile
from medllava.instruct_gen.checks import sample_steps
from medllava.instruct_gen.facts import FactsSteps, facts_steps
from medllava.instruct_gen.kinds import DraftSteps, Task, UnusableReplyError, seeded_fraction
from medllava.instruct_gen.narrator_questions import NarratorQuestion, narrator_questions
from medllava.instruct_gen.prompts import Prompt
from medllava.instruct_gen.recipe import REASONING_KINDS, GenerateRecipe
from medllava.instruct_gen.records import CaseFacts
from medllava.llm.base import RefusedError, Reply, Request, TextModel, UnansweredError, for_each
from medllava.llm.budget import BudgetError
from medllava.llm.cache import CachedModel, KeptReplies, ReplyCache
from medllava.llm.pace import Pace

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_FAILURES = 8
"""So many calls in a row without an answer, or refusals before the first reply, end the run: nothing will succeed."""


@dataclass(frozen=True)
class Plan:
    """What there is to ask, in the order in which the results are written."""

    captions: CaptionFile
    recipe: GenerateRecipe
    prompts: dict[str, Prompt]

    def facts_by_video(self) -> Iterator[tuple[str, FactsSteps]]:
        """The case-facts question of each video, in order of first appearance; none if no kind needs facts."""
        if not REASONING_KINDS & self.recipe.plans.keys():
            return
        for video in self.captions.videos:
            yield video, self.facts_steps(video)

    def facts_steps(self, video: str) -> FactsSteps:
        spoken = [phrase for caption in self.captions.of_video(video) for phrase in caption.phrases]
        spoken.sort(key=lambda phrase: phrase.start_s)
        return facts_steps(video, spoken, self.recipe, self.prompts)

    def tasks(self, facts: dict[str, CaseFacts]) -> Iterator[Task]:
        """Every sample to be made: by caption, then kind, then number. Reasoning kinds only where ``facts`` has the
        diagnosis of a single case; ``question`` as often as the narrator asked something, ``per_caption`` at most."""
        asked: dict[str, tuple[NarratorQuestion, ...]] = {}
        video: str | None = None
        for caption in self.captions:
            case = facts.get(caption.video)
            if "question" in self.recipe.plans and caption.video != video:
                video = caption.video
                asked = narrator_questions(self.captions.of_video(video))
            for kind, plan in self.recipe.plans.items():
                if kind in REASONING_KINDS and not (case and case.diagnosis and case.single_case):
                    continue
                if plan.fraction < 1 and seeded_fraction(self.recipe.seed, "chosen", kind, caption.id) >= plan.fraction:
                    continue
                if kind == "question":
                    for number, question in enumerate(asked.get(caption.id, ())[: plan.per_caption], start=1):
                        yield Task(caption, kind, number, case, question)
                    continue
                for number in range(1, plan.per_caption + 1):
                    yield Task(caption, kind, number, case)

    def tasks_to_ask(self, facts: dict[str, CaseFacts]) -> Iterator[Task]:
        """The same in the order of asking: within a video by kind. One after the other the requests then begin alike
        (instructions, diagnosis, clues), and providers charge less for a beginning that they have just read."""
        place = {kind: at for at, kind in enumerate(self.recipe.plans)}
        for _, of_video in groupby(self.tasks(facts), key=lambda task: task.caption.video):
            yield from sorted(of_video, key=lambda task: place[task.kind])

    def steps(self, task: Task, *, judge: bool = True) -> DraftSteps:
        return sample_steps(task, self.recipe, self.prompts, judge=judge)


@dataclass
class Trouble:
    """Why some replies are absent: per sample id or video, and why the whole run stopped early, if it did."""

    failures: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    replies: int = 0
    unanswered_in_a_row: int = 0

    def why_absent(self, id: str) -> str:
        return self.failures.get(id) or f"not asked: {self.stopped or 'a reply that it builds on is absent'}"


def replay(steps: Generator[Request, Reply, Result], cache: ReplyCache | KeptReplies) -> Result:
    """What ``steps`` return when they are sent the kept replies. Raises LookupError if one is not there."""
    try:
        request = next(steps)
        while True:
            reply = cache.get(request.key())
            if reply is None:
                raise LookupError(f"no reply is kept for {request.key()}")
            request = steps.send(reply)
    except StopIteration as end:
        result: Result = end.value
        return result


def open_request(steps: Generator[Request, Reply, Any], cache: ReplyCache) -> Request | None:
    """The first request of ``steps`` whose reply is not kept, None if all are there."""
    try:
        request = next(steps)
        while (reply := cache.get(request.key())) is not None:
            request = steps.send(reply)
        return request
    except (StopIteration, UnusableReplyError):
        return None


def read_facts(plan: Plan, cache: ReplyCache) -> Iterator[tuple[str, CaseFacts | UnusableReplyError | None]]:
    """Per video: its facts out of the kept replies, the fault of the reply, or None where no reply is kept."""
    for video, steps in plan.facts_by_video():
        try:
            yield video, replay(steps, cache)
        except UnusableReplyError as error:
            yield video, error
        except LookupError:
            yield video, None


async def ask_all(plan: Plan, model: CachedModel, cache: ReplyCache) -> Trouble:
    """Ask everything that is not in ``cache`` yet: first the facts of every video, then the samples.

    ``model`` keeps its replies in ``cache``. Raises ServiceError if the endpoint can answer nothing at all.
    """
    trouble = Trouble()
    try:
        count = len(plan.captions.videos) if REASONING_KINDS & plan.recipe.plans.keys() else 0
        await ask_each(
            "case facts", plan.facts_by_video(), count,
            lambda question: drive(*question, model, trouble), plan.recipe, cache, model.pace,
        )
        facts = {video: found for video, found in read_facts(plan, cache) if isinstance(found, CaseFacts)}
        count = sum(1 for _ in plan.tasks(facts))
        await ask_each(
            "samples", plan.tasks_to_ask(facts), count,
            lambda task: drive(task.id, plan.steps(task, judge=False), model, trouble), plan.recipe, cache, model.pace,
        )
    except BudgetError as error:
        trouble.stopped = str(error)
    return trouble


async def ask_pilot(plan: Plan, model: CachedModel, cache: ReplyCache, count: int) -> Trouble:
    """Ask ``count`` samples of each kind, drawn by a seeded hash of their names, after the facts of four times as many
    videos: the share of videos with a diagnosis decides over whole kinds, and it is seen in few videos only roughly."""
    trouble = Trouble()

    def drawn(name: str) -> float:
        return seeded_fraction(plan.recipe.seed, "pilot", name)

    try:
        needs_facts = bool(REASONING_KINDS & plan.recipe.plans.keys())
        videos = heapq.nsmallest(4 * count, plan.captions.videos, key=drawn) if needs_facts else []
        await ask_each(
            "pilot: case facts", videos, len(videos),
            lambda video: drive(video, plan.facts_steps(video), model, trouble), plan.recipe, cache, model.pace,
        )
        facts = {video: found for video, found in read_facts(plan, cache) if isinstance(found, CaseFacts)}
        chosen: dict[str, list[tuple[float, str, Task]]] = {}
        for task in plan.tasks(facts):
            lowest = chosen.setdefault(task.kind, [])
            heapq.heappush(lowest, (-drawn(task.id), task.id, task))
            if len(lowest) > count:
                heapq.heappop(lowest)
        tasks = [task for kind in plan.recipe.plans for _, _, task in sorted(chosen.get(kind, []), reverse=True)]
        await ask_each(
            "pilot: samples", tasks, len(tasks),
            lambda task: drive(task.id, plan.steps(task, judge=False), model, trouble), plan.recipe, cache, model.pace,
        )
    except BudgetError as error:
        trouble.stopped = str(error)
    return trouble


async def ask_each(
    name: str, items: Iterable[Item], count: int, ask: Callable[[Item], Awaitable[None]], recipe: GenerateRecipe,
    cache: ReplyCache, pace: Pace | None = None,
) -> None:
    """Ask under a bar with ETA, and replies, calls in flight, tokens and money beside it."""

    def told() -> str:
        tokens = cache.prompt_tokens + cache.completion_tokens
        parts = [f"{len(cache):,} replies", f"{tokens / 1000:,.0f}k tokens"]
        if recipe.usd_per_million:
            parts.append(f"${cache.usd(recipe.usd_per_million):.2f}")
        if pace:
            parts.append(f"{pace.in_flight} of {int(pace.limit)} in flight")
            if pace.pause_s() > 1:
                parts.append(f"told to wait {pace.pause_s():.0f} s")
        return ", ".join(parts)

    with tqdm(total=count, desc=name, unit="", smoothing=0.05, disable=not count) as bar:

        async def ask_one(item: Item) -> None:
            await ask(item)
            bar.update()

        async def refresh() -> None:
            while True:
                await asyncio.sleep(1)
                bar.set_postfix_str(told())

        # Also while no answer comes, a person should see why.
        clock = asyncio.create_task(refresh())
        try:
            await for_each(items, ask_one, recipe.concurrency)
        finally:
            clock.cancel()
            bar.set_postfix_str(told())


async def drive(id: str, steps: Generator[Request, Reply, Any], model: TextModel, trouble: Trouble) -> None:
    """Send ``steps`` their replies; why some are absent goes to ``trouble``."""
    try:
        request = next(steps)
        while True:
            reply = await model.ask(request)
            trouble.replies += 1
            trouble.unanswered_in_a_row = 0
            request = steps.send(reply)
    except (StopIteration, UnusableReplyError):
        return  # What the replies are worth is decided when the files are written.
    except RefusedError as error:
        trouble.failures[id] = f"refused: {error}"
        if not trouble.replies and len(trouble.failures) >= MOST_FAILURES:
            raise ServiceError(f"{error}; gave up because the first {MOST_FAILURES} requests were refused") from error
    except UnansweredError as error:
        trouble.failures[id] = f"no reply: {error}"
        trouble.unanswered_in_a_row += 1
        if trouble.unanswered_in_a_row >= MOST_FAILURES:
            raise ServiceError(
                f"{error}; gave up after {MOST_FAILURES} calls in a row without an answer."
                " Run the same command again to go on"
            ) from error
