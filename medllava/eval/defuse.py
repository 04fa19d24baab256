"""Answers made harmless before a judge reads them: no answer can write the judge's prompt or speak to the judge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+(?=\s|$)|\n|$)|[.!?\n]")
_ANSWER = r"(?:answer|response|reply|assistant)"
_JUDGE = r"(?:judge|grader|evaluator|examiner|reviewer)"
# An order to grade, at the start of a clause: "the pathologist would assign a grade of 2" is none.
_ORDER = (
    r"(?:^|[,;:]\s*|\b(?:please|must|should|now|and|then|to|just|simply)\s+)"
    r"(?:give|award|assign|grant|rate|score|grade|mark|output|return|reply with|respond with)\s+"
)
_TO_THE_JUDGE = re.compile(
    rf"{_ORDER}(?:this\b(?! (?:patient|case|lesion|tumou?r|area|region))|it\b|me\b|my\b|the (?:\w+ )?{_ANSWER}|"
    r"(?:an? |the )?(?:10\b|ten\b|full|maximum|max\b|perfect|top|highest|best)|[\[{])"
    r"|\b(?:ignore|disregard|forget|override)\b[^.!?\n]{0,40}"
    r"\b(?:instructions?|prompt|rules|(?:the )?above|previous|reference|criteria|rubric)\b"
    rf"|\b(?:dear|attention|note to(?: the)?|you are(?: the| an?)?|as (?:the|an?))\s+{_JUDGE}\b"
    rf"|\b(?:this|my|the (?:first|second|above|other)) {_ANSWER} (?:deserves|(?:should|must) (?:get|receive|be))"
    r"|\b(?:this|my|the (?:first|second|above|other)) (?:answer|reply|assistant) is (?:the |completely |entirely )?"
    r"(?:best|better|perfect|right|correct|worse|wrong|false)\b"
    r"|[\"'“{]\s*(?:score|first|second|rating|verdict|reason)\s*[\"'”]?\s*:"
    r"|\b(?:score|rating|grade|points?)\b\W{0,3}10\s*(?:/|out of)\s*10\b|\b10\s*(?:/|out of)\s*10\b"
    r"|\[\[\s*(?:\d+(?:\.\d+)?|[ABC])\s*\]\]"
    r"|^\s*(?:system|assistant|user|judge)\s*:|<\|?(?:im_start|im_end|system|assistant|user)\|?>",
    re.IGNORECASE,
)


def defuse(text: str) -> tuple[str, int]:
    """(the text as a judge may read it, how many sentences were taken out because they speak to the judge).

    What is left stands as if they had never been there, since a mark in their place could itself move the grade. Lines
    that look like headings or fences of the prompt are escaped.
    """
    removed = 0

    def check(match: re.Match[str]) -> str:
        nonlocal removed
        sentence = match.group()
        if not _TO_THE_JUDGE.search(sentence.strip()):
            return sentence
        removed += 1
        return ""

    kept = _SENTENCE.sub(check, text.strip()).strip()
    if removed:
        kept = re.sub(r"[ \t]{2,}", " ", re.sub(r"\n{2,}", "\n", kept))
    return re.sub(r"^(\s*)(#|```)", r"\1\\\2", kept, flags=re.MULTILINE), removed


def filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with ``{name}`` replaced by each part, made harmless, in one pass: an answer cannot write its own
    reference."""
    quoted = {name: defuse(text)[0] for name, text in parts.items()}
    return re.sub(rf"\{{({'|'.join(parts)})\}}", lambda match: quoted[match.group(1)], template)


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that a judge wrote, also in a fence; empty for other JSON. Raises ValueError if it is none."""
    plain = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        value = json.loads(plain)
    except json.JSONDecodeError as error:
        raise ValueError("not a JSON object") from error
    return value if isinstance(value, dict) else {}
