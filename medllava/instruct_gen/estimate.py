"""``--dry-run``: calls, tokens and money, told by going through every sample with made-up replies.

Where replies are kept already, also of a pilot, they correct the figures: what a sample really took is set against what
going through it with made-up replies gives, kind by kind, and the line through these points is applied to the samples
still to be made. That covers another tokenizer, dialogues that end early, the length of replies and the checks of
samples without a word about any of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError
from medllava.instruct_gen.asking import Plan
from medllava.instruct_gen.kinds import MADE_UP, UnusableReplyError
from medllava.instruct_gen.recipe import REASONING_KINDS, GenerateRecipe
from medllava.instruct_gen.records import CaseFacts, Clue
from medllava.llm.base import Reply, Request, estimate_prompt_tokens, estimate_tokens
from medllava.llm.cache import ReplyCache

CountTokens = Callable[[str], int]
Figures = tuple[float, float, float]
"""Of calls, prompt tokens and completion tokens."""

_NAMES = ("calls", "prompt tokens", "reply tokens")

FEWEST = 8
"""Finished samples of a kind from which its figures are corrected by them."""


@dataclass
class Line:
    """Least squares of y on x over the points added, in running sums."""

    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n += 1
        self.x, self.y = self.x + x, self.y + y
        self.xx, self.xy, self.yy = self.xx + x * x, self.xy + x * y, self.yy + y * y

    def total(self, count: float, sum_x: float) -> tuple[float, float]:
        """Sum of y expected for ``count`` more points whose x are ``sum_x`` together, and its variance.

        A line of one height where x hardly varies.
        """
        mean_x, mean_y = self.x / self.n, self.y / self.n
        spread = self.xx - self.n * mean_x**2
        slope = (self.xy - self.n * mean_x * mean_y) / spread if spread > 1e-6 * self.xx else 0.0
        left = max(0.0, self.yy - self.n * mean_y**2 - slope**2 * spread) / max(1, self.n - 2)
        apart = sum_x - count * mean_x
        lever = apart**2 / spread if slope else 0.0
        return count * mean_y + slope * apart, left * (count + count**2 / self.n + lever)


@dataclass
class Estimate:
    """What is still to be asked for one kind, its checks included, and what it will take: expected calls, prompt tokens
    and completion tokens.

    ``measured`` is the number of finished samples that the figures rest on, 0 where they are the recipe's. ``own_sd``
    holds a standard deviation for each figure, ``facts_sd`` the part that comes from not knowing yet which videos have
    a diagnosis, which is shared by the kinds that need one.
    """

    answered: int = 0
    calls: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    cached_share: float = 0.0
    """Part of the prompt tokens that the provider took from its cache so far."""
    measured: int = 0
    own_sd: Figures = (0.0, 0.0, 0.0)
    facts_sd: Figures = (0.0, 0.0, 0.0)

    @property
    def figures(self) -> Figures:
        return self.calls, self.prompt_tokens, self.completion_tokens


@dataclass
class _Sums:
    """Samples to be made: how many, what is foretold of them, and what of it is answered already."""

    count: int = 0
    foretold: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    had: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


@dataclass
class _Kind:
    """What was found of one kind."""

    lines: tuple[Line, Line, Line] = field(default_factory=lambda: (Line(), Line(), Line()))
    """What finished samples took over what was foretold of them. Reply lengths are drawn over prompt tokens: who is
    told more has more to say."""
    answered: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sure: _Sums = field(default_factory=_Sums)
    perhaps: _Sums = field(default_factory=_Sums)
    """Those of videos whose facts are not known yet."""

    def add(self, walk: _Walk, *, perhaps: bool) -> None:
        self.answered += round(walk.had[0])
        self.prompt_tokens += round(walk.had[1])
        self.cached_tokens += walk.cached_tokens
        if not any(walk.foretold):
            return  # Dropped before anything is asked: no sign of what the others take.
        if walk.finished:
            calls, prompt_tokens, _ = walk.foretold
            for line, x, y in zip(self.lines, (calls, prompt_tokens, prompt_tokens), walk.had, strict=True):
                line.add(x, y)
            return
        sums = self.perhaps if perhaps else self.sure
        sums.count += 1
        for column in range(3):
            sums.foretold[column] += walk.foretold[column]
            sums.had[column] += walk.had[column]


@dataclass
class _Walk:
    """One sample gone through: its result if every reply was there, what its kept replies took, what is foretold of the
    whole sample (calls, prompt tokens, completion tokens)."""

    result: Any
    finished: bool
    had: list[float]
    foretold: list[float]
    cached_tokens: int


def estimate_run(plan: Plan, cache: ReplyCache, tokenizer: Path | None = None) -> dict[str, Estimate]:
    """What is left to ask, by kind. ``tokenizer``: see :func:`tokenizer_file`; None for a rule of thumb.

    A video whose facts are not known yet is taken to have a diagnosis as often as those whose facts are known; where
    there are too few of these, always, so the reasoning kinds are counted at their most.
    """
    count = tokenizer_file(tokenizer) if tokenizer else estimate_tokens
    walker = _Walker(plan.recipe, cache, lru_cache(maxsize=1024)(count))
    table: dict[str, _Kind] = {}
    facts: dict[str, CaseFacts] = {}
    usable: dict[str, bool] = {}
    length = plan.recipe.facts_reply_tokens
    for video, _ in plan.facts_by_video():
        walk = walker.go(partial(plan.facts_steps, video), length)
        table.setdefault("case facts", _Kind()).add(walk, perhaps=False)
        found = walk.result
        if walk.finished:
            usable[video] = bool(found and found.diagnosis and found.single_case)
        clues = (Clue(text=_words(length // 2), time_s=0.0),)
        said = None if walk.finished else "some diagnosis"
        facts[video] = found or CaseFacts(video=video, diagnosis=said, clues=clues)
    for task in plan.tasks(facts):
        walk = walker.go(partial(plan.steps, task), plan.recipe.plans[task.kind].reply_tokens)
        perhaps = task.kind in REASONING_KINDS and task.caption.video not in usable
        table.setdefault(task.kind, _Kind()).add(walk, perhaps=perhaps)
    share, share_sd = _share(list(usable.values()), len(facts))
    scale = _prompt_scale(table)
    return {name: _estimate(kind, scale, share, share_sd) for name, kind in table.items()}


def total(table: dict[str, Estimate]) -> Estimate:
    """All kinds together; ``measured`` is 0 if any kind with calls to come is not."""
    rows = list(table.values())
    to_come = [row for row in rows if row.calls >= 0.5]
    calls, prompt_tokens, completion_tokens = (sum(row.figures[column] for row in rows) for column in range(3))
    cached = sum(row.cached_share * row.prompt_tokens for row in rows)
    return Estimate(
        answered=sum(row.answered for row in rows), calls=calls, prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens, cached_share=cached / prompt_tokens if prompt_tokens else 0.0,
        measured=min((row.measured for row in to_come), default=0),
        own_sd=_triple(lambda column: math.hypot(*(row.own_sd[column] for row in rows))),
        facts_sd=_triple(lambda column: sum(row.facts_sd[column] for row in rows)),
    )


def report(
    table: dict[str, Estimate], recipe: GenerateRecipe, tokenizer: Path | None = None, *, batch: bool = False
) -> list[str]:
    """The estimate as lines of text: a table by kind, and how sure it is. ``batch``: at the batch interface's price."""
    whole = total(table)
    price = recipe.usd_per_million
    lines = [f"{'kind':<22}{'answered':>10}{'calls':>10}{'prompt tokens':>15}{'reply tokens':>14}{'dollars':>10}"]
    for name, row in {**table, "total": whole}.items():
        calls, prompt_tokens, reply_tokens = (round(figure) for figure in row.figures)
        cached_tokens = round(row.cached_share * prompt_tokens)
        usd = f"{price.usd(prompt_tokens, reply_tokens, cached_tokens, batch=batch):.2f}" if price else "unpriced"
        lines.append(f"{name:<22}{row.answered:>10,}{calls:>10,}{prompt_tokens:>15,}{reply_tokens:>14,}{usd:>10}")
    guessed = [name for name, row in table.items() if not row.measured and row.calls >= 0.5]
    if guessed:
        how = f"with {tokenizer}" if tokenizer else "by a rule of thumb, within some 10 %"
        lines.append(
            f"not measured yet: {', '.join(guessed)}. Prompt tokens are counted {how}; reply tokens are the recipe's"
            " reply_tokens; kinds that need a diagnosis are counted as if every video had one."
            f" --pilot 24 asks 24 of each kind and measures ({FEWEST} finished ones of a kind are needed)"
        )
    elif whole.calls >= 0.5:
        within = [
            2 * math.hypot(own, facts) / figure
            for figure, own, facts in zip(whole.figures, whole.own_sd, whole.facts_sd, strict=True)
        ]
        parts = [f"{name} within {100 * part:.1f} %" for name, part in zip(_NAMES, within, strict=True)]
        lines.append(f"measured on {whole.measured} finished samples of a kind or more: {', '.join(parts)} (95 %)")
        if max(within) > 0.05:
            enough = math.ceil(whole.measured * (max(within) / 0.05) ** 2)
            lines.append(f"--pilot {enough} would tell all within 5 %; its replies are part of the run")
    return lines


def tokenizer_file(path: Path) -> CountTokens:
    """Count with a ``tokenizer.json`` of Hugging Face, or the folder that holds one. Raises ConfigError."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise ConfigError(f"--tokenizer {file}: not a tokenizer.json that can be read ({error})") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


class _Walker:
    """Goes through samples with kept replies where there are some, and with made-up ones."""

    def __init__(self, recipe: GenerateRecipe, cache: ReplyCache, count: CountTokens) -> None:
        checks = recipe.checks
        named = (("BlindReply", checks.answerable_without_image), ("VerifyReply", checks.verify))
        self.check_tokens = {name: check.reply_tokens for name, check in named if check}
        self.cache = cache
        self.count = count

    def go(self, begin: Callable[[], Generator[Request, Reply, Any]], reply_tokens: int) -> _Walk:
        """``begin`` begins the sample anew: it is gone through twice."""
        result, finished, had, cached_tokens = self._kept(begin())
        return _Walk(result, finished, had, self._foretold(begin(), reply_tokens), cached_tokens)

    def _kept(self, steps: Generator[Request, Reply, Any]) -> tuple[Any, bool, list[float], int]:
        had, cached_tokens = [0.0, 0.0, 0.0], 0
        try:
            request = next(steps)
            while True:
                reply = self.cache.get(request.key())
                if reply is None:
                    return None, False, had, cached_tokens
                had = [had[0] + 1, had[1] + reply.prompt_tokens, had[2] + reply.completion_tokens]
                cached_tokens += reply.cached_tokens
                request = steps.send(reply)
        except StopIteration as end:
            return end.value, True, had, cached_tokens
        except UnusableReplyError:
            return None, True, had, cached_tokens

    def _foretold(self, steps: Generator[Request, Reply, Any], reply_tokens: int) -> list[float]:
        foretold = [0.0, 0.0, 0.0]
        try:
            request = next(steps)
            while True:
                length = self.check_tokens.get(request.schema_name, reply_tokens)
                prompt_tokens = estimate_prompt_tokens(request, self.count)
                foretold = [foretold[0] + 1, foretold[1] + prompt_tokens, foretold[2] + length]
                text = _made_up(request.schema_name, reply_tokens)
                request = steps.send(Reply(text=text, model=request.model, finish_reason=MADE_UP))
        except (StopIteration, UnusableReplyError):
            return foretold


def _share(usable: list[bool], videos: int) -> tuple[float, float]:
    """Share of the videos of unknown facts that have a diagnosis, and its standard deviation."""
    known, unknown = len(usable), videos - len(usable)
    if known < FEWEST or not unknown:
        return 1.0, 0.0
    # One success and one failure more than seen: no share is certain that was seen in a few videos.
    share = (sum(usable) + 1) / (known + 2)
    return sum(usable) / known, math.sqrt(share * (1 - share) * (1 / known + 1 / unknown))


def _prompt_scale(table: dict[str, _Kind]) -> float:
    """True prompt tokens per token counted here, over all finished samples: for kinds of which too few are finished."""
    lines = [kind.lines[1] for kind in table.values()]
    counted = sum(line.x for line in lines)
    return sum(line.y for line in lines) / counted if sum(line.n for line in lines) >= FEWEST and counted else 1.0


def _estimate(kind: _Kind, scale: float, share: float, share_sd: float) -> Estimate:
    measured = kind.lines[0].n if kind.lines[0].n >= FEWEST else 0
    figures: list[float] = []
    own_sd: list[float] = []
    facts_sd: list[float] = []
    for column, line in enumerate(kind.lines):
        parts = []
        for sums, part in ((kind.sure, 1.0), (kind.perhaps, share)):
            if measured:
                whole, variance = line.total(part * sums.count, part * sums.foretold[min(column, 1)])
            else:
                whole, variance = part * sums.foretold[column] * (scale if column == 1 else 1.0), 0.0
            parts.append((max(0.0, whole - part * sums.had[column]), variance))
        figures.append(parts[0][0] + parts[1][0])
        own_sd.append(math.sqrt(parts[0][1] + parts[1][1]))
        facts_sd.append(parts[1][0] / share * share_sd if share else 0.0)
    calls, prompt_tokens, completion_tokens = figures
    return Estimate(
        kind.answered, calls, prompt_tokens, completion_tokens,
        cached_share=kind.cached_tokens / kind.prompt_tokens if kind.prompt_tokens else 0.0, measured=measured,
        own_sd=_triple(own_sd.__getitem__), facts_sd=_triple(facts_sd.__getitem__),
    )


def _triple(figure: Callable[[int], float]) -> Figures:
    return figure(0), figure(1), figure(2)


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
