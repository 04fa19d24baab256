from __future__ import annotations

import pytest

from medllava.conversation import Turn
from medllava.geometry import Box
from medllava.instruct_gen.duplicates import NearDuplicates
from medllava.instruct_gen.gates import Background, first_fault
from medllava.instruct_gen.records import CaseFacts, Clue, GroundedCaption, Phrase

KNOWN = Box(x1=0.1, y1=0.1, x2=0.5, y2=0.5)


def turns(*texts):
    return [Turn(role="assistant" if number % 2 else "user", text=text) for number, text in enumerate(texts)]


def background(*said, diagnosis=None, clues=()):
    """A caption of what was said, its first phrase at KNOWN, and a case."""
    phrases = [
        Phrase(text=text, start_s=n, end_s=n + 1, box=None if n else KNOWN)
        for n, text in enumerate(said or ["A gland."])
    ]
    caption = GroundedCaption(id="c", video="v.mp4", image="c.png", crop_px=(0, 0, 9, 9), phrases=tuple(phrases))
    facts = CaseFacts(video="v.mp4", diagnosis=diagnosis, clues=tuple(Clue(text=one, time_s=99) for one in clues))
    return Background(caption, facts if diagnosis else None)


def fault(kind, *texts, said=(), diagnosis=None, clues=()):
    reason = first_fault(kind, turns(*texts), background(*said, diagnosis=diagnosis, clues=clues))
    return reason and reason.partition(":")[0]


@pytest.mark.parametrize(("reason", "kind", "texts"), [
    ("empty answer", "conversation", ("Where?", "")),
    ("empty answer", "description", ("Describe it.", " ... ")),
    ("malformed", "conversation", ("Where?", "See <image> there.")),
    ("reads a caption", "description", ("Describe.", "The caption mentions a gland.")),
    ("reads a caption", "description", ("Describe.", "The description does not say what it is.")),
    ("reads a caption", "conversation", ("What does the narrator point at?", "A gland.")),
    ("reads a caption", "conversation", ("What?", "According to the text, a gland.")),
    ("reads a caption", "conversation", ("What?", "In the provided transcript a gland is named.")),
    ("reads a caption", "conversation", ("What?", "A gland lies under the cursor.")),
    ("reads a caption", "grounding", ("What is in the bounding box [0.10, 0.10, 0.50, 0.50]?", "A gland.")),
    ("reads a caption", "complex_reasoning", ("Why?", "It is not explicitly mentioned in the video.")),
    ("coordinates in prose", "conversation", ("Where?", "At [0.10, 0.10, 0.50, 0.50].")),
    ("coordinates in prose", "description", ("Describe.", "A gland at (0.25, 0.4).")),
    ("coordinates in prose", "iterative_abduction", ("I see it at x1=0.3.", "Yes.")),
    ("box outside the frame", "grounding", ("Box?", "[0.10, 0.10, 1.50, 0.50]")),
    ("box outside the frame", "grounding", ("Box?", "[0.50, 0.10, 0.10, 0.50]")),
    ("box outside the frame", "grounding", ("What is in [10, 20, 300, 400]?", "A gland.")),
    ("grounding without box", "grounding", ("Where?", "[0.10, 0.10, 0.50, 0.50]", "What?", "A gland.")),
    ("box not in the caption", "grounding", ("Box?", "[0.60, 0.60, 0.90, 0.90]")),
])  # fmt: skip
def test_each_gate_says_why(reason, kind, texts):
    assert fault(kind, *texts) == reason


@pytest.mark.parametrize(("kind", "texts"), [
    ("conversation", ("Where is the gland?", "In the upper left.")),
    ("conversation", ("Is there necrosis?", "No, there is no necrosis.")),
    ("conversation", ("How big is it?", "About 2.5 mm (range 1 to 3).")),
    ("description", ("Give a full description.", "The text-book picture of a gland; the lumen is described as open.")),
    ("grounding", ("Give the box of the gland.", "[0.10, 0.10, 0.50, 0.50]")),
    ("grounding", ("What is in [0.12, 0.10, 0.50, 0.52]?", "A gland.")),
    ("caption", ("What is this?", "upper left gland, upper right stroma.")),
])  # fmt: skip
def test_good_turns_pass(kind, texts):
    assert fault(kind, *texts) is None


def test_diagnosis_may_be_named_only_where_the_case_is_known():
    for kind in ("conversation", "description"):
        assert fault(kind, "What?", "A Meningioma.", diagnosis="meningioma") == "diagnosis leaked"
        assert fault(kind, "What?", "A meningiomatous area.", diagnosis="meningioma") is None
        assert fault(kind, "What?", "A meningioma.", diagnosis="adenocarcinoma") is None
    text = "What is in [0.10, 0.10, 0.50, 0.50]?"
    assert fault("grounding", text, "Meningiomas.", diagnosis="meningioma") == "diagnosis leaked"
    for kind in ("complex_reasoning", "iterative_abduction"):
        assert fault(kind, "What?", "A meningioma.", diagnosis="meningioma") is None


def test_near_duplicates_are_found_within_an_image_only():
    seen = NearDuplicates()
    pairs = [("Where is the gland?", "In the upper left."), ("Is there necrosis here?", "No, there is no necrosis.")]
    first = turns(*pairs[0], *pairs[1])
    assert seen.fault("1", "a.png", first) is None
    assert seen.fault("2", "b.png", first) is None
    assert seen.fault("3", "a.png", turns(*pairs[1], *pairs[0])).startswith("near-duplicate: 1.00 like sample 1")
    assert seen.fault("3", "a.png", turns("WHERE is the gland?", *pairs[0][1:], *pairs[1])).startswith("near")
    assert seen.fault("3", "a.png", turns(*pairs[0], "What is in the lower left?", "Adipose.")) is None
