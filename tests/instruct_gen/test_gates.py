from __future__ import annotations

import random
import re
from re import _constants as constants
from re import _parser as parser

import pytest

from medllava.conversation import Turn
from medllava.geometry import Box
from medllava.instruct_gen import diagnoses, patterns, wording
from medllava.instruct_gen.duplicates import NearDuplicates, fingerprint
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

    def repeats(id, image, said):
        return seen.fault(id, image, fingerprint(said))

    pairs = [("Where is the gland?", "In the upper left."), ("Is there necrosis here?", "No, there is no necrosis.")]
    first = turns(*pairs[0], *pairs[1])
    assert repeats("1", "a.png", first) is None
    assert repeats("2", "b.png", first) is None
    assert repeats("3", "a.png", turns(*pairs[1], *pairs[0])).startswith("near-duplicate: 1.00 like sample 1")
    assert repeats("3", "a.png", turns("WHERE is the gland?", *pairs[0][1:], *pairs[1])).startswith("near")
    assert repeats("3", "a.png", turns(*pairs[0], "What is in the lower left?", "Adipose.")) is None


def has_one(tree, needs) -> bool:
    """Whether every match of a parsed pattern holds one of the pieces."""
    run = ""
    for kind, what in [*tree, (None, None)]:
        if kind is constants.LITERAL:
            run += chr(what).lower()
            continue
        if any(piece in run for piece in needs):
            return True
        run = ""
        inner = {
            constants.BRANCH: lambda what: what[1], constants.SUBPATTERN: lambda what: [what[3]],
            constants.MAX_REPEAT: lambda what: [what[2]] if what[0] else [[]],
            constants.MIN_REPEAT: lambda what: [what[2]] if what[0] else [[]],
            constants.IN: lambda what: [[one] for one in what],
        }.get(kind, lambda what: [[]])
        if kind is not None and all(has_one(part, needs) for part in inner(what)):
            return True
    return False


WORDINGS = [name for name, one in vars(patterns).items() if isinstance(one, patterns.Wording)]


@pytest.mark.parametrize("name", WORDINGS)
def test_no_pattern_matches_without_one_of_its_pieces(name):
    for needs, alternative in getattr(patterns, name).alternatives:
        assert has_one(parser.parse(alternative.pattern, re.IGNORECASE), needs)
        assert not has_one(parser.parse(alternative.pattern, re.IGNORECASE), ["zzz"])


def test_letters_beyond_ascii_are_not_missed():
    assert patterns.SPEECH_NOISE.search("the \u017fubscribe button")  # A long s: lower() leaves it as it is.
    assert patterns.SPEECH_NOISE.search("\u212a \u266a")


WORDS = """
no not without lack lacks absence neither nor cannot can't isn't don’t see there is are absent missing mitotic
figures necrosis keratin tumour cancer carcinoma squamous cell SCC basal-cell carcinomas Bowen's disease
melanomas nevus invasive ductal in situ adeno-carcinoma free of devoid negative for node , . ? and or but
However, schwannoma
"""


def test_shortcuts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is looked through for denials only if it has a word of theirs, and names are compared part by part."""
    dice = random.Random(0)
    texts = [" ".join(dice.choices(WORDS.split(), k=dice.randint(1, 25))) for _ in range(400)]
    known = diagnoses.names("squamous cell carcinoma") + diagnoses.names("breast cancer") + diagnoses.names("melanoma")
    quick = [wording.denials(text) for text in texts], [diagnoses.named_in(text, known) for text in texts]

    def by_keys(text: str) -> str | None:
        short = [word for word in re.findall(r"\b[A-Za-z]{2,6}\b", text) if word in known or word[:-1] in known]
        upper = [word for word in short if sum(sign.isupper() for sign in word) >= 2]
        if upper:
            return upper[0]
        keys = {diagnoses._key(name) for name in known if not diagnoses._is_short(name)}
        words = wording.normalised(text).split()
        most = max(len(name.split()) for name in known) + 1
        pieces = [words[at : at + count] for at in range(len(words)) for count in range(1, most + 1)]
        return next((" ".join(piece) for piece in pieces if diagnoses._key(" ".join(piece)) in keys), None)

    monkeypatch.setattr(wording, "_MAY_DENY", re.compile(""))
    assert quick == ([wording.denials(text) for text in texts], [by_keys(text) for text in texts])
    assert sum(map(bool, quick[0])) > 50
    assert sum(map(bool, quick[1])) > 50
