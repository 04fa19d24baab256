"""Wordings compared: what is written against what was said, and what a text affirms or denies.

Rules over words, not a parser: made for the short, plain sentences of narration and of generated answers. Where a
sentence is hedged, hypothetical or about another place, nothing is concluded from it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz

SAID = 85.0
"""Least likeness (0..100, of letters) of a quotation with the talk: room for punctuation and a slip of recognition."""

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9\[])")
_SPELLINGS = (("tumour", "tumor"), ("aemia", "emia"), ("haem", "hem"), ("oedema", "edema"), ("oesoph", "esoph"))
_IRREGULAR = {
    "nuclei": "nucleus", "nucleoli": "nucleolus", "foci": "focus", "lumina": "lumen", "lumens": "lumen",
    "villi": "villus", "fungi": "fungus", "bacteria": "bacterium", "septa": "septum", "epithelia": "epithelium",
    "mitotic": "mitosis",
    "metastases": "metastasis", "metastatic": "metastasis", "necrotic": "necrosis", "criteria": "criterion",
    "glandular": "gland", "keratinous": "keratin",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUNCTION_WORDS = _words(
    """a about above all also an and any are as at be because been but by can could did do does for from had has have
    here how i if in into is it its just like may might more most of on one or our over see seen she he so some such
    than that the their them then there these they this those through to up us very was we were what when where which
    while who why will with would you your okay well now right"""
)


def normalised(text: str) -> str:
    """Lower-case words parted by single spaces: no punctuation, hyphens as spaces, American spelling."""
    plain = (text if text.isascii() else unicodedata.normalize("NFKC", text)).lower().replace("’", "'")
    for british, american in _SPELLINGS:
        plain = plain.replace(british, american)
    return " ".join(_WORD.findall(plain))


def stem(word: str) -> str:
    """A key that singular and plural share (``figures`` and ``figure``, ``mitoses`` and ``mitosis``)."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("oses", "yses")):
        return word[:-2] + "is"
    if word.endswith("omata"):
        return word[:-2]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def stems(text: str) -> list[str]:
    return [stem(word) for word in normalised(text).split()]


def content_words(text: str) -> set[str]:
    """Stems of the words that carry meaning."""
    return {stem(word) for word in normalised(text).split() if word not in _FUNCTION_WORDS}


def sentences(text: str) -> list[str]:
    return [piece.strip() for piece in _SENTENCE_END.split(text) if piece.strip()]


def is_said(part: str, talk: str, least: float = SAID) -> bool:
    """Whether ``part`` occurs in ``talk`` up to punctuation, case, and slips of a few letters."""
    needle, hay = normalised(part), normalised(talk)
    if not needle or len(needle) > 1.25 * len(hay):
        return False
    return f" {needle} " in f" {hay} " or (len(needle) >= 8 and fuzz.partial_ratio(needle, hay) >= least)


def shared_words(part: str, talk: str) -> float:
    """The share of ``part``'s content words that ``talk`` has too, up to a slip of a letter; 1 if it has none."""
    wanted, there = content_words(part), content_words(talk)
    if not wanted:
        return 1.0
    found = sum(1 for word in wanted if word in there or any(_alike(word, other) for other in there))
    return found / len(wanted)


def _alike(word: str, other: str) -> bool:
    return len(word) > 5 and abs(len(word) - len(other)) <= 2 and fuzz.ratio(word, other) >= SAID


# What a text affirms and denies.

_NEGATOR = re.compile(
    r"\b(?:no|not|without|never|neither|nor|none|cannot|absen(?:t|ce)|lacks?|lacking|negative for|free of|devoid of"
    r"|rules? out|excludes?|fails? to)\b|n't\b"
)
_DENIAL = re.compile(
    r"\b(?:no|without|absence of|lack of|lacks?|lacking|negative for|free of|devoid of|neither|nor"
    r"|(?:do|does|did|can|could|have|has)(?:\s+not|n't)\s+(?:really\s+)?(?:see|find|identify|have|show|contain|seen|appreciate)"
    r"|cannot\s+(?:see|find|identify|appreciate)|(?:is|are)(?:\s+not|n't)\s+(?:any|a|an))\s+"
    r"(?P<rest>[^.;:?!]*)"
)
_AFTER = re.compile(
    r"(?P<before>[^.;:?!,]*?)\s+(?:is|are|was|were)\s+(?:(?:completely|entirely|clearly)\s+)?"
    r"(?:absent|missing|lacking|not\s+(?:seen|present|identified|found|visible|evident|appreciated))\b"
)
_MAY_DENY = re.compile(r"\b(?:no|without|absen|lack|negative|free|devoid|neither|cannot|missing)|n't|n’t")
"""Found in every text, lower-case, that :data:`_DENIAL` or :data:`_AFTER` finds something in; most have none of it."""
_FILLERS = re.compile(
    r"^(?:(?:any|an?|the|evidence\s+(?:of|for)|signs?\s+of|obvious|definite|definitive|true|significant|clear|visible|overt"
    r"|convincing|frank|much|other|additional|there|and|or|also|really)\s+)+"
)
_NOUNS_END = re.compile(
    r"\b(?:in|on|at|of|to|for|from|with|within|around|near|here|there|that|which|who|is|are|was|were|can|and|or|nor|but"
    r"|seen|present|visible|identified|found|evident|either|as|by|inside|throughout|anywhere|today|so|then|if|we|you|it"
    r"|between|beneath|under|over|along|among)\b|,"
)
_LIST = re.compile(r"\s*(?:,\s*(?:or|nor|and)?|\bor\b|\bnor\b|\band\b)\s+")
_ELSEWHERE = re.compile(
    r"\b(?:in|on|at|within|around|near|inside|beneath|under|along|between)\s+(?!this\b|these\b|here\b|the\s+(?:image|field|picture"
    r"|section|slide|view|patch|biopsy|specimen|lesion|tumou?r)\b)\w+"
    r"|\b(?:upper|lower|top|bottom|left|right|cent(?:er|re)|corner|periphery|elsewhere)\b"
)
_PLACE_FIRST = re.compile(
    r"\W*(?:(?:and|but|so|now|here|over\s+there)\s+)*(?:in|on|at|within|around|near)\s+(?!this\s+(?:image|field|section)\b)"
    r"[^,.;]*\b(?:there|we|you|i)\b"
)
_HEDGED = re.compile(
    r"\b(?:if|whether|would|could|may|might|possibl[ey]|suspicious|look(?:ing)?\s+for|search(?:ing)?\s+for|should|unless"
    r"|rather\s+than|instead\s+of|unlike|versus|elsewhere|other\s+(?:fields?|areas?|slides?|regions?|parts?)|previous(?:ly)?"
    r"|earlier|usually|typically|often|classically|sometimes|normally|in\s+general|expect(?:ed)?|(?:an)?other\s+cases?"
    r"|last\s+case|next\s+(?:slide|case)|resembl\w+|mimic\w*|remember|imagine|suppose)\b"
)
_SCOPE_END = re.compile(
    r"[;:]|\b(?:but|however|although|though|yet|except|while|whereas|instead|only)\b"
    r"|\b(?:and|with)\s+(?:the|there|we|it|a|an|some|many|numerous|several)\b|,\s*(?:there|we|it|this|the|you)\b"
)
_NO_FINDING = _words(
    """problem doubt reason question idea need longer matter way one more less thing point time other further sense
    big deal surprise chance case image worry rush difference answer information comment means diagnosis change
    exception"""
)
_YES_NO = re.compile(
    r"^(?:so\s+|and\s+|now\s+|but\s+)?(?:is|are|was|were|do|does|did|can|could|has|have|any)\b", re.IGNORECASE
)
_ASKED = re.compile(
    r"\b(?:(?:is|are)\s+there|(?:do|can|could|did)\s+(?:you|we|i)\s+(?:also\s+)?(?:see|find|identify|notice|have|appreciate)"
    r"|does\s+(?:the|this|it)(?:\s+\w+)?\s+(?:show|contain|have|include)|any)\s+(?P<rest>[^.;:?!]*)"
)


@dataclass(frozen=True)
class Denial:
    """Something that is said not to be there. ``words`` are stems in order; ``local``: it is said of one place only."""

    words: tuple[str, ...]
    local: bool


def is_yes_no(question: str) -> bool:
    """Whether a question is put so that yes or no answers it."""
    last = sentences(question)[-1:] or [""]
    return bool(_YES_NO.match(last[0])) and not re.search(r"\bor\b", last[0].lower())


def verdict(answer: str) -> bool | None:
    """True for an answer that begins with yes, False for no, None for others."""
    match = re.match(r"\W*(yes|no)\b(?!\s+\w+\s+(?:is|are)\b)", answer.lower())
    return None if match is None else match.group(1) == "yes"


def denials(text: str) -> list[Denial]:
    """What ``text`` says is not there."""
    found: list[Denial] = []
    if not _MAY_DENY.search(text.lower()):
        return found
    for sentence in sentences(text):
        plain = _flat(sentence)
        if sentence.endswith("?") or _HEDGED.search(plain):
            continue
        for match in _DENIAL.finditer(plain):
            local = _is_local(plain, match.start())
            found += [Denial(words, local) for words in _nouns(match.group("rest"))]
        for match in _AFTER.finditer(plain):
            local = _is_local(plain, match.start())
            head = tuple(stem(word) for word in re.sub(_FILLERS, "", match.group("before").strip()).split()[-3:])
            if head and not set(head) & _NO_FINDING and not _NEGATOR.search(match.group("before")):
                found.append(Denial(head, local))
    return found


def asked_for(question: str) -> list[Denial]:
    """What a yes-or-no question asks for: what "no" denies and "yes" affirms."""
    plain = _flat(question)
    match = _ASKED.search(plain)
    local = bool(_ELSEWHERE.search(plain))
    return [Denial(words, local) for words in _nouns(match.group("rest"))] if match else []


def affirms(text: str, words: Sequence[str]) -> bool:
    """Whether some sentence of ``text`` says plainly that ``words`` (stems, in a row) are there."""
    for sentence in sentences(text):
        plain = _flat(sentence)
        if sentence.endswith("?") or _HEDGED.search(plain):
            continue
        spans = _negated_spans(plain)
        tokens = [(match.start(), stem(match.group())) for match in _WORD.finditer(plain)]
        for at in range(len(tokens) - len(words) + 1):
            if [token for _, token in tokens[at : at + len(words)]] == list(words):
                start = tokens[at][0]
                if not any(low <= start < high for low, high in spans):
                    return True
    return False


def mentions(text: str, words: Sequence[str]) -> bool:
    found = stems(text)
    return any(found[at : at + len(words)] == list(words) for at in range(len(found) - len(words) + 1))


def _flat(sentence: str) -> str:
    plain = sentence.lower().replace("’", "'").replace("-", " ").replace("can't", "cannot").replace("can not", "cannot")
    for british, american in _SPELLINGS:
        plain = plain.replace(british, american)
    # One finding under three names.
    return re.sub(r"\bmitotic (?:figures?|activity)\b", "mitosis", plain)


def _is_local(plain: str, start: int) -> bool:
    """Whether a denial that is at ``start`` is of one place: told after it in its clause, or in front of it."""
    stop = _SCOPE_END.search(plain, start + 1)
    clause_end = stop.start() if stop else len(plain)
    return bool(_ELSEWHERE.search(plain, start, clause_end) or _PLACE_FIRST.match(plain))


def _negated_spans(plain: str) -> list[tuple[int, int]]:
    spans = []
    for match in _NEGATOR.finditer(plain):
        end = _SCOPE_END.search(plain, match.end())
        spans.append((match.start(), end.start() if end else len(plain)))
    for match in _AFTER.finditer(plain):
        spans.append(match.span())
    return spans


def _nouns(rest: str) -> Iterable[tuple[str, ...]]:
    """The noun phrases that a list after a negator or a question begins with, as stems."""
    while rest:
        rest = re.sub(_FILLERS, "", rest.strip() + " ").strip()
        end = _NOUNS_END.search(rest)
        phrase = rest[: end.start()] if end else rest
        words = tuple(stem(word) for word in _WORD.findall(phrase))[:4]
        if not words or set(words) & _NO_FINDING or len(words[-1]) < 4:
            return
        yield words
        following = _LIST.match(rest, end.start()) if end else None
        if following is None:
            return
        rest = rest[following.end() :]
