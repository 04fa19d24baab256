"""Correcting misheard terms: what is asked of a model, and which of its proposals may stand.

A model that hears "adenoma" may prefer "adenocarcinoma". So a proposal stands only if it changes one term into another
that sounds like it, and nothing that a diagnosis can hang on: see :func:`refusal`. Extracted text stands only where its
words were said.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jellyfish
from pydantic import BaseModel, ConfigDict, Field

from medllava.instruct_gen.concepts import Vocabulary, singular
from medllava.instruct_gen.kinds import Form, make_request, read_reply
from medllava.instruct_gen.prompts import Prompt
from medllava.instruct_gen.recipe import GenerateRecipe
from medllava.instruct_gen.records import GroundedCaption, Phrase
from medllava.llm.base import Reply, Request

MOST_WORDS = 250
"""Words asked about at once; longer captions are asked about in parts."""

LONGEST_TERM = 6
"""Words of a term; what is longer is a sentence rewritten."""

ALIKE_KNOWN = 0.75
ALIKE_UNKNOWN = 0.88
"""How alike (0..1, Jaro-Winkler) the sounds of both must be if the new term is in the vocabulary, and if it is not."""

SAID_SHARE = 0.8
"""The part of an extracted sentence's words that must have been said."""

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.?!…])\s+")


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NUMBERS = _set_of(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand first
    second third fourth fifth half quarter double triple single once twice few several many"""
)
_NEGATIONS = _set_of(
    """no not non none never neither nor without absent absence negative nothing cannot free lack lacks lacking
    rule"""
)
_SIDES = _set_of(
    """left right upper lower top bottom superior inferior anterior posterior medial lateral bilateral unilateral
    proximal distal central peripheral dorsal ventral above below inside outside deep superficial"""
)
_POLES = _set_of(
    """benign malignant positive high low increased decreased more less mild moderate severe acute chronic invasive
    situ well poorly"""
)
_PREFIXES = ("hyper", "hypo", "intra", "inter", "extra", "pre", "post", "anti", "non")


class Proposal(Form):
    """One misheard term."""

    line: int
    wrong: str = Field(alias="from")
    right: str = Field(alias="to")


class CorrectReply(Form):
    corrections: list[Proposal]
    medical_text: str
    roi_text: list[str]


@dataclass(frozen=True)
class Part:
    """Phrases of one caption that are asked about at once; ``first`` is the number of the first of them, from 0."""

    caption: GroundedCaption
    number: int
    first: int
    phrases: tuple[Phrase, ...]

    @property
    def id(self) -> str:
        return f"{self.caption.id}-correct-{self.number}"


@dataclass(frozen=True)
class Answer:
    """What came back for one part."""

    reply: CorrectReply
    raw: str
    teacher: str


class Correction(BaseModel):
    """One proposal and what became of it (one line of ``corrections.jsonl``). ``phrase`` counts from 0 in the caption;
    ``before`` and ``after`` are the phrase's text before and after this proposal."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    phrase: int
    start_s: float
    end_s: float
    wrong: str = Field(serialization_alias="from")
    right: str = Field(serialization_alias="to")
    accepted: bool
    reason: str
    before: str
    after: str
    teacher: str


Steps = Generator[Request, Reply, Answer]


def parts(caption: GroundedCaption) -> Iterator[Part]:
    """The caption's phrases in parts of at most :data:`MOST_WORDS` words (one phrase at least)."""
    number, first, words = 1, 0, 0
    for at, phrase in enumerate(caption.phrases):
        count = len(phrase.text.split())
        if at > first and words + count > MOST_WORDS:
            yield Part(caption, number, first, caption.phrases[first:at])
            number, first, words = number + 1, at, 0
        words += count
    if caption.phrases:
        yield Part(caption, number, first, caption.phrases[first:])


def correct_steps(part: Part, recipe: GenerateRecipe, prompt: Prompt) -> Steps:
    """Ask about one part. Raises UnusableReplyError."""
    lines = "\n".join(
        f"{number}. {json.dumps(phrase.text, ensure_ascii=False)}"
        for number, phrase in enumerate(part.phrases, start=1)
    )
    reply = yield make_request(recipe, prompt.fill(lines=lines), CorrectReply)
    return Answer(read_reply(reply, CorrectReply), reply.text, reply.model)


def corrected(part: Part, answer: Answer, vocabulary: Vocabulary) -> tuple[list[str], list[Correction]]:
    """The texts of the part's phrases with the proposals that stand, and all proposals with their fate."""
    texts = [phrase.text for phrase in part.phrases]
    diff: list[Correction] = []
    for proposal in answer.reply.corrections:
        at = proposal.line - 1
        if not 0 <= at < len(texts):
            at, reason = 0, f"there is no line {proposal.line}"
        else:
            reason = refusal(texts[at], proposal.wrong, proposal.right, vocabulary) or ""
        before = texts[at]
        if not reason:
            texts[at] = _replaced(before, proposal.wrong, proposal.right)
        phrase = part.phrases[at]
        diff.append(Correction(
            id=part.caption.id, phrase=part.first + at, start_s=phrase.start_s, end_s=phrase.end_s,
            wrong=proposal.wrong, right=proposal.right, accepted=not reason,
            reason=reason or _grounds(proposal.right, vocabulary), before=before, after=texts[at],
            teacher=answer.teacher,
        ))
    return texts, diff


def refusal(said: str, wrong: str, right: str, vocabulary: Vocabulary) -> str | None:
    """Why ``wrong`` may not be replaced by ``right`` in what was said; None if it may."""
    old, new = _words(wrong), _words(right)
    if not old or not _pattern(wrong).search(said):
        return "not said"
    if not new or _strange(right):
        return "not a term"
    if _doubled(_replaced(said, wrong, right)) > _doubled(said):
        return "says a word twice"
    old, new = _core(old, new)
    if not old and not new:
        return "changes nothing"
    if max(len(_words(wrong)), len(_words(right))) > LONGEST_TERM:
        return "more than a term"
    if not old:
        return "adds to what was said"
    if not new:
        return "removes what was said"
    for name, kept in (("number", _numbers), ("negation", _negations), ("side", _sides), ("degree", _degrees)):
        if kept(old) != kept(new):
            return f"changes a {name}"
    if vocabulary.concept(wrong) or vocabulary.concept(" ".join(old)):
        if vocabulary.concept(wrong) is not vocabulary.concept(right) or not vocabulary.concept(right):
            return "replaces a known term"
        return None  # Another spelling of the same term.
    known = right in vocabulary or " ".join(new) in vocabulary
    alike = likeness(old, new)
    if alike < (ALIKE_KNOWN if known else ALIKE_UNKNOWN):
        return f"does not sound like it ({alike:.2f})" + ("" if known else ", and not in the vocabulary")
    return None


def likeness(old: Sequence[str], new: Sequence[str]) -> float:
    """How alike two terms sound, 0..1: of their Metaphone codes or of their letters, whichever is more."""
    was, would = ("".join(words) for words in (old, new))
    was_code, would_code = ("".join(map(jellyfish.metaphone, words)).replace(" ", "") for words in (old, new))
    sounds = jellyfish.jaro_winkler_similarity(was_code, would_code) if was_code and would_code else 0.0
    length = min(len(was), len(would)) / max(len(was), len(would))
    # Jaro-Winkler likes what begins alike whatever follows: a term twice as long is another term.
    return float(max(sounds, jellyfish.jaro_winkler_similarity(was, would))) * min(1.0, length + 0.35)


@dataclass(frozen=True)
class Extracted:
    """Text of a caption that is medical, and about its region; ``dropped`` sentences were not said."""

    medical_text: str
    roi_text: tuple[str, ...]
    dropped: int


def extracted(texts: Iterable[str], answers: Iterable[Answer], vocabulary: Vocabulary) -> Extracted:
    """The two extractions with only those sentences and phrases that are drawn from ``texts``."""
    said = " ".join(texts)
    medical: list[str] = []
    regions: list[str] = []
    dropped = 0
    for answer in answers:
        sentences = [sentence for sentence in _SENTENCE_END.split(answer.reply.medical_text.strip()) if sentence]
        for kept, candidates in ((medical, sentences), (regions, answer.reply.roi_text)):
            for candidate in filter(None, map(str.strip, candidates)):
                if is_drawn_from(candidate, said, vocabulary):
                    kept.append(candidate)
                else:
                    dropped += 1
    return Extracted(" ".join(medical), tuple(dict.fromkeys(regions)), dropped)


def is_drawn_from(text: str, said: str, vocabulary: Vocabulary) -> bool:
    """Whether nearly all words of ``text`` were said, and all its numbers, negations, sides and terms."""
    words, known = Counter(map(singular, _words(text))), set(map(singular, _words(said)))
    if not words:
        return False
    for kept in (_numbers, _negations, _sides, _degrees):
        if not set(kept(_words(text))) <= set(kept(_words(said))):
            return False
    terms = {mention.concept.id for mention in vocabulary.link(said)}
    if not {mention.concept.id for mention in vocabulary.link(text)} <= terms and not words.keys() <= known:
        return False
    return sum(count for word, count in words.items() if word in known) >= SAID_SHARE * words.total()


def _grounds(right: str, vocabulary: Vocabulary) -> str:
    return "sounds like it and is in the vocabulary" if right in vocabulary else "sounds like it"


def _doubled(text: str) -> int:
    """How often a word follows itself, as in "fat cells cells"."""
    words = _words(text)
    return sum(one == other for one, other in itertools.pairwise(words))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _core(old: list[str], new: list[str]) -> tuple[list[str], list[str]]:
    """Both without the words that they share at their beginning and end."""
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    return old[first : len(old) - last], new[first : len(new) - last]


def _strange(text: str) -> bool:
    return bool(re.search(r"[\n\[\]{}<>$]", text))


def _numbers(words: Iterable[str]) -> Counter[str]:
    return Counter(
        number for word in words for number in ([word] if word in _NUMBERS else re.findall(r"\d+", word))
    )


def _negations(words: Iterable[str]) -> Counter[str]:
    return Counter("not" for word in words if word in _NEGATIONS or word.endswith(("n't", "n’t")))


def _sides(words: Iterable[str]) -> Counter[str]:
    return Counter(word for word in words if word in _SIDES)


def _degrees(words: Iterable[str]) -> Counter[str]:
    found = [word for word in words if word in _POLES]
    return Counter([*found, *(prefix for word in words for prefix in _PREFIXES if word.startswith(prefix))])


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, words.split())) + r"(?!\w)", re.IGNORECASE)


def _replaced(text: str, wrong: str, right: str) -> str:
    def put(match: re.Match[str]) -> str:
        capital = match.group()[0].isupper() and right[0].islower()
        return right[0].upper() + right[1:] if capital else right

    return _pattern(wrong).sub(put, text)
