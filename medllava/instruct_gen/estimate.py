"""``--dry-run``: calls, tokens and money, told by going through every sample with made-up replies."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TypeVar

from medllava.instruct_gen.asking import Plan
from medllava.instruct_gen.kinds import MADE_UP, UnusableReplyError
from medllava.instruct_gen.records import CaseFacts, Clue
from medllava.llm.base import Reply, Request, estimate_prompt_tokens
from medllava.llm.cache import ReplyCache

Result = TypeVar("Result")


@dataclass
class Estimate:
    """Calls still to be made for one kind, its checks included, and what they will take. ``check_tokens``: expected
    length of the checks' replies by the name of their form."""

    reply_tokens: int
    check_tokens: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

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
                    self.completion_tokens += self.check_tokens.get(request.schema_name, self.reply_tokens)
                    text = _made_up(request.schema_name, self.reply_tokens)
                    reply = Reply(text=text, model=request.model, finish_reason=MADE_UP)
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
    checks = plan.recipe.checks
    check_tokens = {
        name: check.reply_tokens
        for name, check in (("BlindReply", checks.answerable_without_image), ("VerifyReply", checks.verify)) if check
    }
    for task in plan.tasks(facts):
        tokens = plan.recipe.plans[task.kind].reply_tokens
        table.setdefault(task.kind, Estimate(tokens, check_tokens)).follow(plan.steps(task), cache)
    return table


def _made_up(schema_name: str, tokens: int) -> str:
    """A reply of about that length, on which dialogues and the checks of finished samples build."""
    half = _words(tokens // 2)
    pair = {"question": half, "answer": half}
    values: dict[str, dict[str, object]] = {
        "CaptionReply": {"caption": _words(tokens)},
        "DescriptionReply": {"description": _words(tokens)},
        "QuestionReply": {**pair},
        "TurnsReply": {"turns": [{"question": _words(tokens // 10), "answer": _words(tokens // 10)}] * 5},
        "NarratorReply": {**pair, "type": "open", "image_dependent": True, "quote": ""},
        "StudentReply": {"abduction": half, "facts_used": half},
        "AssistantReply": {"comments": half, "hint": half},
        "FactsReply": {"diagnosis": "some diagnosis", "single_case": True, "clues": []},
        "BlindReply": {"needs_image": True, "answer": ""},
    }
    return json.dumps(values.get(schema_name, {}))


def _words(count: int) -> str:
    return " ".join(["word"] * count)
