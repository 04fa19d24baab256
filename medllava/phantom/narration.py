"""What the phantom's narrator says, and how long it takes: every sentence is understood by the grammar's finders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from medllava.phantom.grammar import FINDINGS, article

T = TypeVar("T")

_NAMED = (
    "This is {a}.",
    "Here we have {a}.",
    "Over here you can see {a}.",
    "Look at the {n} right here.",
    "And that is {a}.",
    "Notice the {n} here.",
    "Now this one is {a}.",
    "Right here there is {a}.",
)
_PLACED = (
    "Here in the {q} we have {a}.",
    "In the {q} there is {a}.",
    "The {n} sits in the {q}.",
    "Look to the {q}, this is {a}.",
    "And in the {q} you see {a}.",
)
_CLUES = (
    "Notice the {n}, that is an important clue.",
    "The {n} here is a clue to the diagnosis.",
    "Remember this {n}, it is a clue.",
    "And here, as a clue, {a}.",
)
_DIAGNOSES = (
    "So putting this together, this is {d}.",
    "All of this fits with {d}.",
    "So the diagnosis here is {d}.",
    "Taken together, this case is {d}.",
)
_ASIDES = (
    "Let me move along.",
    "Okay, let us go on.",
    "Take your time with this one.",
    "The stain came out nicely today.",
    "Let me show you something else.",
    "I will come back to this later.",
    "As always, look around first.",
    "Just give me a second here.",
)
_ASK_PLACE = (
    "What do we see in the {q}?",
    "So what is this in the {q} here?",
    "And what have we got in the {q}?",
)
_ASK_PRESENCE = ("Is there {a} in this field?", "Do we see {a} here?", "Can you find {a} in this field?")
_GENERAL = (
    ("How thick is a section like this?", "A section like this is about four microns thick."),
    ("Which stain do we use for this?", "We use hematoxylin and eosin for this."),
    ("Why do we fix tissue in formalin?", "We fix tissue in formalin to stop it from decaying."),
    ("Do all sections get a cover slip?", "Yes, all sections get a cover slip."),
)
_OPEN_ENDED = ("What would you do next with this patient?", "How old do you think the patient was?")
_WELCOMES = ("Welcome to another case.", "Hello, let us look at a new case.", "Good morning, here is the next case.")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, as it is (``Generator.choice`` would turn strings into numpy scalars)."""
    return options[int(rng.integers(len(options)))]


def name_finding(rng: np.random.Generator, kind: str, quadrant: str) -> str:
    """A sentence that names a finding and, about half the time, the quadrant it lies in."""
    template = pick(rng, _PLACED if rng.random() < 0.55 else _NAMED)
    return _fill(template, pick(rng, FINDINGS[kind]), _place(rng, quadrant))


def name_clue(rng: np.random.Generator, kind: str) -> str:
    """A sentence that names a finding and calls it a clue."""
    return _fill(pick(rng, _CLUES), pick(rng, FINDINGS[kind]), "")


def tell_diagnosis(rng: np.random.Generator, diagnosis: str) -> str:
    named = diagnosis if diagnosis.endswith("itis") else article(diagnosis)
    return pick(rng, _DIAGNOSES).format(d=named)


def ask_place(rng: np.random.Generator, quadrant: str) -> str:
    """A question that the next sentence, which names the finding there, answers."""
    return pick(rng, _ASK_PLACE).format(q=quadrant)


def ask_presence(rng: np.random.Generator, kind: str, present: bool) -> tuple[str, str]:
    """A question that yes or no answers, and its answer."""
    name = pick(rng, FINDINGS[kind])
    question = pick(rng, _ASK_PRESENCE).format(a=article(name))
    return question, f"Yes, there is {article(name)} here." if present else f"No, there is no {name} here."


def ask_general(rng: np.random.Generator) -> tuple[str, str]:
    """A question that needs no image, and its answer."""
    return pick(rng, _GENERAL)


def ask_in_vain(rng: np.random.Generator) -> str:
    """A question that the narrator leaves unanswered."""
    return pick(rng, _OPEN_ENDED)


def say_aside(rng: np.random.Generator) -> str:
    """A sentence that names nothing on the screen."""
    return pick(rng, _ASIDES)


def welcome(rng: np.random.Generator) -> str:
    return pick(rng, _WELCOMES)


def speaking_s(rng: np.random.Generator, text: str, shortest: float = 2.0) -> float:
    """How long a sentence takes to say, ``shortest`` to 3 s."""
    natural = 0.2 + 0.2 * len(text.split()) + rng.uniform(0.0, 0.2)
    return float(np.clip(natural, shortest, 3.0))


def _place(rng: np.random.Generator, quadrant: str) -> str:
    name = quadrant
    if rng.random() < 0.3:
        name = name.replace("upper", "top").replace("lower", "bottom")
    return f"{name} corner" if rng.random() < 0.25 else name


def _fill(template: str, name: str, place: str) -> str:
    return template.format(a=article(name), n=name, q=place)
