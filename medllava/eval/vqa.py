"""Reading one answer: what does it say, and is it right? Pure functions, no model, no files.

Every reader is strict: an answer counts only if it names exactly one legal answer. What names none or several is
*unclear*; it is counted as such and scores 0, so that neither silence nor hedging is ever rewarded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from medllava.errors import DataError
from medllava.eval.records import Question
from medllava.eval.text_metrics import overlap, tokens
from medllava.geometry import QUADRANTS, Box, Point, parse_boxes

METRICS: dict[str, str] = {
    "where": "share of answers that name exactly one quadrant, the right one",
    "yes_no": "balanced accuracy: mean of the accuracies on yes- and on no-questions; unclear answers are wrong",
    "what": "share of answers that name exactly one of the possible findings, the right one",
    "count": "share of answers that name exactly one number, the right one",
    "box_iou": "mean intersection over union of the first box with the reference; no box counts 0",
    "box_centre": "share of answers whose first box has its centre (or whose point lies) inside the reference",
    "closed_accuracy": "share of closed answers that name exactly one choice, the right one",
    "closed_balanced": "mean of the accuracies on yes- and on no-questions; unclear answers are wrong",
    "open_f1": "mean token F1 with the reference answer",
    "open_recall": "mean share of the reference's tokens found in the answer (rewards length: read it beside open_f1)",
    "open_precision": "mean share of the answer's tokens that the reference has",
    "open_exact": "share of open answers with the reference's tokens, in its order, and no others",
    "open_bleu": "mean sentence BLEU of up to 4 words in a row, smoothed",
    "open_rouge_l": "mean ROUGE-L (F1 of the longest common subsequence of tokens)",
    "open_bertscore": "mean BERTScore F1, not rescaled: near 1 for any two English texts, so only differences tell",
}
"""Metric name -> what it is, in the order reports print it."""


FIRST_METRICS = frozenset({"where", "yes_no", "what", "count", "box_iou", "closed_accuracy", "open_f1"})
"""The verdict of each kind of question; the others say more about the same answers."""


@dataclass(frozen=True)
class Grade:
    """One answer, read: metric name -> 0..1 (the first is the verdict's score) and what it was read as, or None."""

    scores: dict[str, float]
    read: str | None
    reason: str


def metrics_of(question: Question) -> tuple[str, ...]:
    """The metrics that an answer to the question is scored by; the first is its verdict."""
    if question.kind == "box":
        return "box_iou", "box_centre"
    if question.kind == "open":
        return "open_f1", "open_recall", "open_precision", "open_exact", "open_bleu", "open_rouge_l"
    if question.kind == "closed":
        return ("closed_accuracy", "closed_balanced") if is_yes_no(question) else ("closed_accuracy",)
    return (question.kind,)


def is_yes_no(question: Question) -> bool:
    return question.kind == "yes_no" or {choice.lower() for choice in question.choices} == {"yes", "no"}


def grade(question: Question, text: str) -> Grade:
    """Score one answer. Raises DataError naming the question if its reference cannot be read."""
    if question.kind == "open":
        return _grade_open(question, text)
    if question.kind == "box":
        return _grade_box(question, text)
    metrics = metrics_of(question)
    expected = reference(question)
    named = _named(question, text)
    if len(named) != 1:
        return Grade(dict.fromkeys(metrics, 0.0), None, "unclear: names " + (" and ".join(named) or "no legal answer"))
    right = named[0] == expected
    reason = "right" if right else f"answered {named[0]}, expected {expected}"
    return Grade(dict.fromkeys(metrics, float(right)), named[0], reason)


def reference(question: Question) -> str:
    """The reference answer in the same words as :func:`grade` reads answers. Raises DataError naming the question."""
    if question.answer in question.choices:
        return question.answer
    named = _named(question, question.answer)
    if len(named) != 1:
        raise DataError(
            f"question {question.id}: the reference {question.answer!r} names {len(named)} legal answers instead of one"
        )
    return named[0]


def _named(question: Question, text: str) -> list[str]:
    """The distinct legal answers that ``text`` names."""
    if question.kind == "where":
        return read_quadrants(text)
    if is_yes_no(question):
        answer = read_yes_no(text)
        return [answer] if answer else []
    if question.kind == "count":
        return [str(number) for number in read_numbers(text)]
    if not question.choices:
        raise DataError(f"question {question.id}: a {question.kind!r} question needs 'choices'")
    if all(_OPTION.match(choice) for choice in question.choices):
        return read_options(text, question.choices)
    return read_choices(text, question.choices)


# ---------------------------------------------------------------------------------------------------------- yes or no

_VOTE = {"yes": "yes", "yeah": "yes", "yep": "yes", "no": "no", "nope": "no"}
_WORD = "(yes|yeah|yep|no|nope)"
_BOTH = re.compile(r"\b(?:yes\s*(?:/|or|and)\s*no|no\s*(?:/|or|and)\s*yes)\b")
# "No doubt it is there", "no way to tell": the word no does not answer the question.
_IDIOM = re.compile(
    r"\bno (?:(?:definite|clear|certain|reliable|reasonable) )?"
    r"(?:doubt|question|idea|way|answer|opinion|information|image|picture|problem|one)\b|\bno\.\d|\bnot yes\b"
)
_TAG = re.compile(r"</?\w+>")
_LEADING = re.compile(rf"^{_WORD}\b")
# Standing alone as a clause, or the last word: "The answer is no.", "I think, yes, it is", "... so yes."
_STANDALONE = re.compile(rf"(?:^|[.,;:!?]\s+|\banswer is\s+){_WORD}(?=\s*(?:[,.;:!]|$))|\b{_WORD}\W*$")


def read_yes_no(text: str) -> str | None:
    """``yes``, ``no``, or None if the answer is neither or both.

    Only the words yes and no decide, at the start of the answer, at its end or standing alone as a clause. A negation
    elsewhere ("not uncommon", "there is no doubt") is never taken for an answer.
    """
    plain = _TAG.sub(" ", unicodedata.normalize("NFKC", text).lower())
    plain = re.sub(r"\s+", " ", plain).strip(" \"'*_#(`“”‘’")
    if _BOTH.search(plain):
        return None
    plain = _IDIOM.sub("", plain)
    matches = [*_LEADING.finditer(plain), *_STANDALONE.finditer(plain)]
    votes = {_VOTE[word] for match in matches for word in match.groups() if word}
    return votes.pop() if len(votes) == 1 else None


# -------------------------------------------------------------------------------------------- quadrant, number, choice

_QUADRANT = re.compile(r"\b(?:(upper|lower) (left|right)|(left|right) (upper|lower))\b")


def read_quadrants(text: str) -> list[str]:
    """The distinct quadrants named, in order of mention; ``top-left`` and ``bottom`` are understood."""
    plain = re.sub(r"\btop\b", "upper", re.sub(r"\bbottom\b", "lower", _plain(text)))
    found = [f"{a or d} {b or c}" for a, b, c, d in _QUADRANT.findall(plain)]
    return [name for name in dict.fromkeys(found) if name in QUADRANTS]


_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
_NUMBER = re.compile(rf"(?<![\w.])(?:(\d+)(?![\w]|\.\d)|({'|'.join(_NUMBER_WORDS)}|none)\b)")


def read_numbers(text: str) -> list[int]:
    """The distinct whole numbers named, as digits or as words up to twenty; ``none`` is 0."""
    found = [
        int(digits) if digits else 0 if word == "none" else _NUMBER_WORDS.index(word)
        for digits, word in _NUMBER.findall(text.lower())
    ]
    return list(dict.fromkeys(found))


_DENIED = (
    r"(?:not|no|without|neither|nor|rather than|instead of|unlike|excludes?|excluding|rules? out|absence of)"
    r"(?: (?:an?|the|any|be|option|choice|[a-z]))*"
)


def read_choices(text: str, choices: Sequence[str]) -> list[str]:
    """The distinct choices named, in order of mention. Whole words only, case and punctuation aside; a plural s is
    allowed, and where one choice is part of another the longer one is meant. What is denied ("not a gland") is not
    named."""
    by_name = {_plain(choice): choice for choice in choices}
    names = "|".join(re.escape(name) for name in sorted(by_name, key=len, reverse=True) if name)
    # A choice that begins with a denial of its own ("no necrosis") is tried first.
    pattern = re.compile(rf"\b(?:({names})|{_DENIED} (?:{names}))s?\b")
    return list(dict.fromkeys(by_name[name] for name in pattern.findall(_plain(text)) if name))


_OPTION = re.compile(r"^\s*\(?([A-Z])\s*[:.)]\s*(.+)$", re.DOTALL)


def split_option(choice: str) -> tuple[str, str] | None:
    """(letter, text) of a lettered option, or None."""
    match = _OPTION.match(choice)
    return (match.group(1), match.group(2)) if match else None


# A letter standing alone; A and I only where they cannot be an article or a pronoun.
_MARKS = r"['’”\"*_)\]}>]*"
_NO_ARTICLE = (
    rf"(?={_MARKS}[^\S\n]*(?:[:.,;)!?/\]}}<|\n]|$|(?:or|and|nor|rather|because|since|but)\b|"
    r"is (?:the|my|correct|right|wrong|incorrect)\b))"
)
_LETTER = re.compile(rf"(?<![A-Za-z.])(?:([B-HJ-Z])(?![A-Za-z])|([AI]){_NO_ARTICLE})")
_SMALL = rf"(?i:([B-HJ-Z])(?![A-Za-z])|([AI]){_NO_ARTICLE})"
_OPENING = r"[('’‘\"“*_\[{]*"
_ANNOUNCED = re.compile(rf"(?i:\b(?:option|choice|letter|choose|select|pick))(?i: is)?\s*:?\s*{_OPENING}{_SMALL}")
# What a reply comes to in the end; what is discussed before it is no answer.
_FINAL = re.compile(
    r"(?i:(?:\banswer(?: choice| option| letter)?|\b(?:correct|right|best) (?:option|choice|letter|one))[*_]*\s*"
    r"(?:is|would be|should be|must be|:|=|-)[*_:]*\s*(?:(?:option|choice|letter)\s*)?"
    rf"|\\boxed(?:{{\\text)?|<answer>\s*){_OPENING}{_SMALL}"
)
# "The answer is B because A is wrong": a reason to the end of its sentence.
_REASON = re.compile(r"(?i:\b(?:because|since|as|while|whereas|although))\b[^.;\n]*")
_LIST = r"[A-Z](?![A-Za-z])[)'\"*]*(?:(?:,? (?:or|nor|and) |, )\(?[A-Z](?![A-Za-z])\)?)*"
_NOT = re.compile(
    r"(?i:\b(?:not|can ?not|nor|neither|rather than|instead of|unlike|rules? out|excludes?|excluding)|n['’]t) "
    r"(?i:be )?(?i:(?:option|choice|answer|letter)s? )?"
    r"[('\"*]*[A-Z](?![A-Za-z])[)'\"*]*(?:,? (?:or|nor) \(?[A-Z](?![A-Za-z])\)?)*"
    rf"|(?<![A-Za-z.])(?i:(?:option|choice|answer|letter)s? )?[('\"*]*{_LIST} "
    r"(?:is|are|seems?|can be|could be) (?:clearly |also |both )?"
    r"(?:wrong|incorrect|not|false|unlikely|less likely|excluded|ruled out)\b"
)


def read_options(text: str, options: Sequence[str]) -> list[str]:
    """The distinct lettered options (``B: ghost cells``) named by letter or by text, in the order of ``options``.

    A letter counts where it stands alone as a capital (for A: not as an article), after "answer is" or "option", or
    as the whole answer. Letters inside an option's text ("hepatitis B") and denied ones ("not B", "A is wrong") do not
    count, nor does what is said before "the answer is", or after it as a reason. All that is said to be the answer
    counts: "the answer is B, or the answer is C" names two.
    """
    text = unicodedata.normalize("NFKC", text)
    letters: dict[str, str] = {}
    by_text: dict[str, list[str]] = {}
    for option in options:
        match = _OPTION.match(option)
        if match:
            letters[match.group(1)] = option
            by_text.setdefault(_plain(match.group(2)), []).append(option)
    final: set[str] = set()
    if _FINAL.search(text):
        final = {(a or b).upper() for a, b in _FINAL.findall(_without(text, by_text))} & letters.keys()
    if final:
        # The first time that an answer is announced counts, with all that follows it but reasons.
        text = _REASON.sub("", text[_start_of_answer(text, letters) :])
    rest = _NOT.sub("", _without(text, by_text))
    named = {a or b for a, b in _LETTER.findall(rest)} | final
    named |= {(a or b).upper() for a, b in _ANNOUNCED.findall(rest)}
    named.add(text.strip(" \n().:'*\"[]{}").upper())
    found = {letters[letter] for letter in named if letter in letters}
    for name in read_choices(text, list(by_text)):
        # Two options of the same text: the letter, if there is one, says which is meant.
        if not found.intersection(by_text[name]):
            found.update(by_text[name])
    return [option for option in options if option in found]


def _without(text: str, names: Iterable[str]) -> str:
    """``text`` without the options' own words. A word stays in their place, so that the A of "A gland" is still an
    article."""
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = re.sub(r"\b" + r"[^0-9a-z]+".join(map(re.escape, name.split())), "something", text, flags=re.IGNORECASE)
    return text


def _start_of_answer(text: str, letters: Collection[str]) -> int:
    """Where the first announcement of a legal letter begins."""
    starts = [match.start() for match in _FINAL.finditer(text) if (match.group(1) or match.group(2)).upper() in letters]
    return starts[0] if starts else 0


def _plain(text: str) -> str:
    """Lower case, everything but letters and digits turned into single spaces."""
    return re.sub(r"[^0-9a-z]+", " ", unicodedata.normalize("NFKD", text).lower()).strip()


# ---------------------------------------------------------------------------------------------------------- box, open


def _grade_box(question: Question, text: str) -> Grade:
    if question.box is None:
        raise DataError(f"question {question.id}: a box question needs a reference 'box'")
    box = first_box(text)
    if box is None:
        point = first_point(text)
        if point is None:
            return Grade({"box_iou": 0.0, "box_centre": 0.0}, None, "unclear: no box")
        hit = float(question.box.contains(point))
        return Grade({"box_iou": 0.0, "box_centre": hit}, None, "unclear: a point, no box")
    iou = box.iou(question.box)
    hit = float(question.box.contains(box.centre))
    return Grade({"box_iou": iou, "box_centre": hit}, "box", f"IoU {iou:.2f}")


def first_box(text: str) -> Box | None:
    """The first well-formed box in the answer."""
    boxes = parse_boxes(text)
    return boxes[0] if boxes else None


_POINT = re.compile(r"[\[(]\s*(0?\.\d+|[01](?:\.0+)?)\s*,\s*(0?\.\d+|[01](?:\.0+)?)\s*[\])]")


def first_point(text: str) -> Point | None:
    """The first pair of numbers from 0 to 1 in brackets."""
    match = _POINT.search(text)
    return Point(x=float(match.group(1)), y=float(match.group(2))) if match else None


def _grade_open(question: Question, text: str) -> Grade:
    wanted = tokens(question.answer)
    if not wanted:
        raise DataError(f"question {question.id}: the reference {question.answer!r} has no words")
    found = overlap(text, question.answer)
    scores = (found.f1, found.recall, found.precision, found.exact, found.bleu, found.rouge_l)
    return Grade(
        dict(zip(metrics_of(question), scores, strict=True)), text if tokens(text) else None, f"F1 {found.f1:.2f}"
    )


# ---------------------------------------------------------------------------------------------------------- abstention

_ABSTAINS = re.compile(
    r"\b(?:i (?:am|'m) (?:unable|not able|sorry)|i (?:can ?not|can't|could not|do not|don't) (?:tell|see|know|"
    r"determine|say|provide|answer|identify|assess|make out|view)|(?:can ?not|can't|could not) be (?:determined|told|"
    r"assessed|identified|answered|said|seen)|(?:not|im)possible to (?:tell|determine|say|answer|assess)|"
    r"unable to (?:tell|determine|say|answer|assess|identify|see|view)|no image (?:was|is|has been)|"
    r"(?:there is )?no way to tell|insufficient information|not enough information|as an ai\b)"
)


def abstains(text: str) -> bool:
    """Whether an answer says that it cannot tell, or says nothing."""
    plain = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower().replace("’", "'")).strip()
    return not plain or _ABSTAINS.search(plain) is not None
