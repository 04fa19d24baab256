"""``generate --batch``: the same requests through the provider's batch interface, in rounds.

What builds on replies comes a round later: the samples after the case facts, each turn of a dialogue after the one
before. A run of the command collects what has ended, then submits what can be asked next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medllava.errors import ConfigError, ServiceError
from medllava.instruct_gen.asking import Plan, Trouble, open_request, read_facts
from medllava.instruct_gen.records import CaseFacts
from medllava.llm.base import Request
from medllava.llm.batches import BatchQueue, read_jobs
from medllava.llm.budget import Budget
from medllava.llm.cache import ReplyCache

POLL_S = 60.0
"""How often ``--wait`` looks."""


def refuse_while_under_way(out: Path) -> None:
    """Raises ConfigError if batches of ``out`` have not ended: their requests would be paid twice."""
    if any(not job.ended for job in read_jobs(out)):
        raise ConfigError(f"{out}: batches are under way, and asking now would pay for them twice; give --batch")


def run_batches(
    plan: Plan, cache: ReplyCache, queue: BatchQueue, budget: Budget | None, *, wait: bool
) -> tuple[Trouble | None, str]:
    """Collect, then submit what is open; with ``wait`` until nothing is. Returns the troubles if nothing is left to
    wait for, else None, and what there is to say.

    Raises ServiceError where the provider does not answer, or a round brought no reply at all.
    """
    queue.resume()
    with tqdm(desc="batches", unit="", disable=not wait) as bar:
        while True:
            had, waited = len(cache) + len(queue.refused), bool(queue.under_way)
            progress = queue.collect()
            if not queue.under_way:
                if waited and len(cache) + len(queue.refused) == had:
                    raise ServiceError("the batches ended without any reply; see their state at the provider")
                trouble = Trouble()
                room_usd = None
                if budget and budget.max_usd is not None:
                    room_usd = budget.max_usd - cache.usd(budget.price) - budget.lost_usd
                requests = open_requests(plan, cache, queue.refused, trouble)
                sent, whole = queue.submit(requests, plan.recipe.usd_per_million, room_usd)
                if not whole and not sent:
                    trouble.stopped = f"the rest of the limit, ${room_usd:.4f}, does not pay for the next call"
                if not sent:
                    return trouble, ""
                progress = queue.collect()
            states = ", ".join(dict.fromkeys(progress.statuses)) or "ended"
            said = f"{progress.answered:,} of {progress.requests:,} answered, {progress.failed:,} failed ({states})"
            if price := plan.recipe.usd_per_million:
                most_usd = sum(job.most_usd for job in queue.under_way)
                said += f"; ${cache.usd(price):.2f} for the replies kept, these cost ${most_usd:.2f} at most"
            if not wait:
                return None, said
            bar.set_postfix_str(f"{len(cache):,} replies kept; {said}")
            time.sleep(POLL_S)


def open_requests(plan: Plan, cache: ReplyCache, refused: dict[str, str], trouble: Trouble) -> Iterator[Request]:
    """What can be asked now, with the replies that are kept: the facts of videos first, then the samples. What the
    provider refused goes to ``trouble``."""

    def look(id: str, steps: Any) -> Iterator[Request]:
        request = open_request(steps, cache)
        if request is None:
            return
        if request.key() in refused:
            trouble.failures[id] = f"refused: {refused[request.key()]}"
        else:
            yield request

    some = False
    for video, steps in plan.facts_by_video():
        for request in look(video, steps):
            some = True
            yield request
    if some:
        return
    facts = {video: found for video, found in read_facts(plan, cache) if isinstance(found, CaseFacts)}
    for task in plan.tasks_to_ask(facts):
        yield from look(task.id, plan.steps(task))
