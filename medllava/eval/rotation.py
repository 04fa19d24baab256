"""Multiple choice with its options moved on: does a model choose an option, or a place in the list?"""

from __future__ import annotations

from typing import get_args

from medllava.eval.records import Condition, Question
from medllava.eval.vqa import split_option

MOST_ORDERS = 1 + sum(name.startswith("rotated_") for name in get_args(Condition))
"""Orders of the options that are asked, the published one among them; of more options, not every order is."""


def steps(condition: Condition) -> int:
    """By how many places the options are moved; 0 for a condition that is no rotation."""
    return int(condition.removeprefix("rotated_")) if condition.startswith("rotated_") else 0


def applies(question: Question, condition: Condition) -> bool:
    """Whether a question is asked under a condition: an ablation needs a picture, a rotation enough options."""
    if condition == "real":
        return True
    moved = steps(condition)
    if moved:
        return moved < len(question.choices) and all(split_option(choice) for choice in question.choices)
    return question.image is not None


def as_asked(question: Question, condition: Condition) -> Question:
    """The question with its options moved on: the letters stay in order, the texts go round. The question's own text
    changes where its options stand in it as lines."""
    moved = steps(condition)
    if not moved:
        return question
    parts = [split_option(choice) or ("", choice) for choice in question.choices]
    count = len(parts)
    marks = [choice[: len(choice) - len(text)] for choice, (_, text) in zip(question.choices, parts, strict=True)]
    choices = [mark + parts[(place - moved) % count][1] for place, mark in enumerate(marks)]
    replaced = dict(zip(question.choices, choices, strict=True))
    lines = [replaced.get(line.strip(), line) for line in question.question.split("\n")]
    answer = question.answer
    if answer in question.choices:
        answer = choices[(question.choices.index(answer) + moved) % count]
    return question.model_copy(update={"question": "\n".join(lines), "choices": tuple(choices), "answer": answer})
