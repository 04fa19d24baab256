"""Samples made of kept replies, by as many processes as there are cores.

Until it is compared with the others, a sample stands for itself: its replies, the gates, its fingerprint and the lines
that are written of it take nine tenths of the work, and can be done anywhere. They come back in the order of the tasks.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from medllava.conversation import IMAGE_TAG, InstructionSample, Provenance, Turn
from medllava.errors import ServiceError
from medllava.instruct_gen.asking import replay
from medllava.instruct_gen.checks import sample_steps
from medllava.instruct_gen.duplicates import Fingerprint, fingerprint
from medllava.instruct_gen.kinds import Draft, Task, UnusableReplyError, seeded_fraction
from medllava.instruct_gen.prompts import Prompt
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.instruct_gen.records import Dropped
from medllava.instruct_gen.wording import verdict
from medllava.jsonl import to_item, to_line
from medllava.llm.cache import KeptReplies
from medllava.processes import begin_worker, deaf_children, holding_interrupts, usable_cores

MANY = 20_000
"""From so many samples on, which take some ten seconds, processes are worth their start."""

MOST_PROCESSES = 4
"""More than this one process cannot keep busy; each takes some 110 MiB."""

_BATCH = 200
"""Samples that a process is given at once, a megabyte of results."""


@dataclass(frozen=True)
class Made:
    """A sample that has passed every gate of its own, as it is written."""

    line: str
    """Its line of samples.jsonl."""
    item: str
    """Its item of llava.json."""
    question: str | None
    """The line of a question file, of narrators' questions only."""
    image_dependent: bool | None
    fingerprint: Fingerprint
    raw: str
    """The replies it was made of."""


@dataclass(frozen=True)
class Maker:
    """Makes samples of kept replies. Nothing else has a say in them, so each process may have a maker of its own."""

    recipe: GenerateRecipe
    prompts: dict[str, Prompt]
    replies: KeptReplies

    def make(self, task: Task) -> Made | Dropped | None:
        """What became of a task; None where a reply is absent."""
        try:
            draft = replay(sample_steps(task, self.recipe, self.prompts), self.replies)
        except UnusableReplyError as error:
            return Dropped(id=task.id, reason=error.reason, raw=error.raw or None)
        except LookupError:
            return None
        sample = _sample(task, draft, self.recipe)
        return Made(
            line=to_line(sample), item=to_item(sample.to_llava()),
            question=to_line(_question(sample)) if sample.kind == "question" else None,
            image_dependent=sample.image_dependent,
            fingerprint=fingerprint(draft.turns, across_images=self.recipe.duplicates_across_images), raw=draft.raw,
        )

    def make_all(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Made | Dropped | None]]:
        """Each task with what became of it, in order. Raises ServiceError if a process was ended from outside."""
        tasks = iter(tasks)
        first = list(islice(tasks, MANY))
        processes = min(usable_cores(), MOST_PROCESSES)
        if len(first) < MANY or processes == 1:
            for task in chain(first, tasks):
                yield task, self.make(task)
        else:
            yield from self._make_apart(chain(first, tasks), processes)

    def _make_apart(self, tasks: Iterator[Task], processes: int) -> Iterator[tuple[Task, Made | Dropped | None]]:
        begun: deque[tuple[list[Task], Future[list[Made | Dropped | None]]]] = deque()
        start = pickle.dumps(partial(_use, self))
        with holding_interrupts() as listen, ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), begin_worker, (os.getpid(), start)
        ) as pool:
            try:
                while True:
                    listen()
                    # Enough ahead that nobody waits; memory holds no more, however large the data set is.
                    while len(begun) < 3 * processes and (batch := list(islice(tasks, _BATCH))):
                        with deaf_children():  # It may start a process.
                            begun.append((batch, pool.submit(_make_batch, batch)))
                    if not begun:
                        return
                    batch, results = begun.popleft()
                    yield from zip(batch, results.result(), strict=True)
            except BrokenProcessPool as error:
                raise ServiceError(
                    "a process that made samples was ended from outside (out of memory?); all replies are kept: the"
                    " same command again goes on, and under taskset -c 0 it works alone"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


_maker: Maker
"""In a process of the pool."""


def _use(maker: Maker) -> None:
    global _maker
    _maker = maker


def _make_batch(tasks: list[Task]) -> list[Made | Dropped | None]:
    return [_maker.make(task) for task in tasks]


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
