"""``--dry-run``: calls, tokens and money, told by going through every sample with made-up replies."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from medllava.instruct_gen.asking import Plan
from medllava.instruct_gen.kinds import UnusableReplyError
from medllava.instruct_gen.records import CaseFacts, Clue
from medllava.llm.base import Reply, Request, estimate_prompt_tokens
from medllava.llm.cache import ReplyCache

Result = TypeVar("Result")


@dataclass
class Estimate:
    """Calls still to be made for one kind, and what they will take."""

    reply_tokens: int
    calls: int = 0
    answered: int = 0
    prompt_tokens: int = 0

    @property
    def completion_tokens(self) -> int:
        return self.calls * self.reply_tokens

    def follow(self, steps: Generator[Request, Reply, Result], cache: ReplyCache) -> Result | None:
        """Go through one sample with kept replies where there are some and made-up ones elsewhere.

        Returns its result if every reply was there.
        """
        made_up = False
        try:
            request = next(steps)
            while True:
                reply = cache.get(request.key())
                if reply is None:
                    made_up = True
                    self.calls += 1
                    self.prompt_tokens += estimate_prompt_tokens(request)
                    reply = Reply(text=_made_up(request.schema_name, self.reply_tokens), model=request.model)
                else:
                    self.answered += 1
                request = steps.send(reply)
        except StopIteration as end:
            return None if made_up else end.value
        except UnusableReplyError:
            return None


def estimate_run(plan: Plan, cache: ReplyCache) -> dict[str, Estimate]:
    """What a run would ask for, by kind. A video whose facts are not known yet is taken to have a diagnosis, so the
    reasoning kinds are counted at their most."""
    table: dict[str, Estimate] = {}
    facts: dict[str, CaseFacts] = {}
    for video, steps in plan.facts_by_video():
        tokens = plan.recipe.facts_reply_tokens
        found = table.setdefault("case facts", Estimate(tokens)).follow(steps, cache)
        clues = (Clue(text=_words(tokens // 2), time_s=0.0),)
        facts[video] = found or CaseFacts(video=video, diagnosis="some diagnosis", clues=clues)
    for task in plan.tasks(facts):
        tokens = plan.recipe.plans[task.kind].reply_tokens
        table.setdefault(task.kind, Estimate(tokens)).follow(plan.steps(task), cache)
    return table


def _made_up(schema_name: str, tokens: int) -> str:
    """A reply of about that length; only dialogues build on it."""
    half = _words(tokens // 2)
    values = {
        "StudentReply": {"abduction": half, "facts_used": half},
        "AssistantReply": {"comments": half, "hint": half},
    }
    return json.dumps(values.get(schema_name, {}))


def _words(count: int) -> str:
    return " ".join(["word"] * count)
