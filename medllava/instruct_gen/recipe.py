"""The recipe of ``generate``: which kinds of sample, how many, by which model, at which price."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from medllava.config import Recipe
from medllava.llm.base import Sampling
from medllava.llm.budget import Price

SampleKind = Literal[
    "caption", "conversation", "description", "complex_reasoning", "iterative_abduction", "grounding", "question"
]

KINDS: tuple[SampleKind, ...] = (
    "caption", "conversation", "description", "complex_reasoning", "iterative_abduction", "grounding", "question"
)
"""The order of samples within one caption."""

REASONING_KINDS = frozenset({"complex_reasoning", "iterative_abduction"})
"""Kinds that know the case's diagnosis; asked only for single-case videos in which one is said."""


class KindPlan(Recipe):
    """How many samples of a kind are made."""

    per_caption: int = Field(default=1, ge=1)
    """Samples for each caption that is chosen; each is asked for with its own variant number. For ``question``: at
    most so many of the narrator's own questions."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the captions that is chosen, by a seeded hash of the caption's id."""
    reply_tokens: int = Field(default=300, gt=0)
    """Expected length of one reply; only ``--dry-run`` uses it."""
    questions: tuple[str, ...] = ()
    """For kinds whose question is not the teacher's (``caption``, ``description``): the list that a sample's question
    is drawn from, in place of the prompt's."""


class KindPlans(Recipe):
    """One plan per kind; a kind that is absent is not made."""

    caption: KindPlan | None = None
    conversation: KindPlan | None = None
    description: KindPlan | None = None
    complex_reasoning: KindPlan | None = None
    iterative_abduction: KindPlan | None = None
    grounding: KindPlan | None = None
    question: KindPlan | None = None


class BlindCheck(Recipe):
    """Asks a text model each question alone, without the image and without what was said."""

    model: str | None = None
    """Name of the model at the same endpoint; None: the recipe's."""
    times: int = Field(default=1, ge=1, le=3)
    """A question is answerable without the image if the model finds the answer every time."""
    action: Literal["drop", "mark"] = "drop"
    """Drop the question with its answer, or keep it and write ``image_dependent: false`` into the sample."""
    kinds: tuple[SampleKind, ...] = ("conversation", "complex_reasoning", "question")
    reply_tokens: int = Field(default=30, gt=0)
    """Expected length of one reply; only ``--dry-run`` uses it."""


class VerifyCheck(Recipe):
    """Asks a text model, sentence by sentence, whether what was said supports a sample."""

    model: str | None = None
    """Name of the model at the same endpoint; None: the recipe's."""
    kinds: tuple[SampleKind, ...] = (
        "caption", "conversation", "description", "complex_reasoning", "iterative_abduction", "question"
    )
    reply_tokens: int = Field(default=150, gt=0)
    """Expected length of one reply; only ``--dry-run`` uses it."""


class Checks(Recipe):
    """Gates that cost calls; each is off unless it is named. Their calls are paid, kept and limited like all others,
    at the recipe's price."""

    answerable_without_image: BlindCheck | None = None
    verify: VerifyCheck | None = None


class GenerateRecipe(Recipe):
    """A recipe of ``generate``."""

    model: str
    """Name of the teacher at its endpoint."""
    prompts: Path
    """Folder of prompt files, relative to this recipe."""
    kinds: KindPlans
    facts_reply_tokens: int = Field(default=400, gt=0)
    """Expected length of a case-facts reply; only ``--dry-run`` uses it."""
    facts_prompt_tokens: int = Field(default=24_000, ge=200)
    """A video whose words are longer than this is read in parts, whose facts are put together."""
    facts_overlap_s: float = Field(default=60.0, ge=0)
    """Seconds of talk that a part shares with the part before."""
    synonyms: dict[str, tuple[str, ...]] = {}
    """Diagnosis -> its other names, beside those that are built in: the gates know them as the same."""
    checks: Checks = Checks()
    duplicates_across_images: bool = True
    """Drop long samples that say nearly the same as one of another image; within an image it is always done."""
    max_captions: int | None = Field(default=None, gt=0)
    """Use only the first captions of the file."""
    sampling: Sampling = Sampling()
    usd_per_million: Price | None = None
    """The teacher's price per million tokens; needed by ``--max-usd``."""
    concurrency: int = Field(default=16, gt=0)
    """Calls in flight at once."""
    long_dialogue_fraction: float = Field(default=0.15, ge=0, le=1)
    """Part of the iterative abductions with 6 turns; the others have 4 (Quilt-LLaVA: 15 %)."""
    image_position: Literal["first", "random"] = "random"
    """Where ``<image>`` stands in the first question: before it, or before or after it at random."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Part of the videos whose samples go to val.json; a video is never divided."""
    seed: int = 0

    @model_validator(mode="after")
    def _some_kind(self) -> GenerateRecipe:
        if not self.plans:
            raise ValueError(f"kinds: name at least one of {', '.join(KINDS)}")
        return self

    @property
    def plans(self) -> dict[SampleKind, KindPlan]:
        """The kinds to make, in the order of :data:`KINDS`."""
        chosen = {kind: getattr(self.kinds, kind) for kind in KINDS}
        return {kind: plan for kind, plan in chosen.items() if plan is not None}
