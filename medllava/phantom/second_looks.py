"""What the phantom's teacher writes about questions and about finished samples: the narrator's own questions, answers
without the image, and verdicts on sentences."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from medllava.phantom import grammar

_TIMED = re.compile(r'^- (\d+(?:\.\d+)?) s: ("(?:[^"\\]|\\.)*")[ \t]*$', re.MULTILINE)
_REMARK = re.compile(r'^- ("(?:[^"\\]|\\.)*")\s*(?:\[[^\]]*\]|\(no region\))[ \t]*$', re.MULTILINE)
_ASKED = re.compile(r'^Question asked at (\d+(?:\.\d+)?) s: ("(?:[^"\\]|\\.)*")[ \t]*$', re.MULTILINE)
_QUESTION = re.compile(r'^Question: ("(?:[^"\\]|\\.)*")[ \t]*$', re.MULTILINE)
_CASE = re.compile(r"^Case: (.+)$", re.MULTILINE)
_NUMBERED = re.compile(r'^(\d+)\. ("(?:[^"\\]|\\.)*")[ \t]*$', re.MULTILINE)
_CLOSED = re.compile(r"^(?:is|are|do|does|can)\b", re.IGNORECASE)
_IN_VAIN = re.compile(r"\bpatient\b")


def _narrator_question(text: str, rng: random.Random) -> dict[str, Any]:
    """The next thing said after the question, unless the question asks for the patient."""
    empty = {"question": "", "answer": "", "type": "open", "image_dependent": False, "quote": ""}
    asked = _ASKED.search(text)
    if asked is None:
        return empty
    time_s, question = float(asked.group(1)), str(json.loads(asked.group(2)))
    later = [str(json.loads(said)) for at, said in _TIMED.findall(text) if float(at) > time_s]
    answer = next((said for said in later if not said.endswith("?")), "")
    closed = bool(_CLOSED.match(question))
    if _IN_VAIN.search(question) or not answer or closed != answer.startswith(("Yes, ", "No, ")):
        return empty
    dependent = bool(grammar.find_kinds(question) or grammar.find_quadrants(question))
    told = answer
    if dependent and not closed:
        kinds = grammar.find_kinds(answer)
        if not kinds:
            return empty
        told = grammar.tell_what(kinds[0])
    return {
        "question": question, "answer": told, "type": "closed" if closed else "open", "image_dependent": dependent,
        "quote": answer,
    }


def _without_image(text: str, rng: random.Random) -> dict[str, Any]:
    """Only questions that name nothing of the phantom's world can be answered without its image."""
    asked = _QUESTION.search(text)
    question = str(json.loads(asked.group(1))).lower() if asked else ""
    answers = (("stain", "We use hematoxylin and eosin for this."), ("thick", "A section is about four microns thick."))
    answer = next((answer for word, answer in answers if word in question), "")
    return {"needs_image": not answer, "answer": answer}


def _verify(text: str, rng: random.Random) -> dict[str, Any]:
    """A sentence may name what the remarks or the case name; what it denies may be unnamed."""
    said = " ".join(str(json.loads(remark)) for remark in _REMARK.findall(text))
    said += " " + " ".join(str(json.loads(remark)) for _, remark in _TIMED.findall(text))
    case = _CASE.search(text)
    known = {*grammar.find_kinds(said), *_diagnoses(f"{said} {case.group(1) if case else ''}")}
    listed = _NUMBERED.findall(text[text.rfind("Sentences of the answers:") :])
    verdicts = []
    for number, quoted in listed:
        sentence = str(json.loads(quoted))
        named = {*grammar.find_kinds(sentence), *_diagnoses(sentence)}
        denied = bool(re.search(r"\bno\b", sentence, re.IGNORECASE))
        if not named:
            verdict = "no_claim"
        elif denied:
            verdict = "contradicted" if named <= known else "supported"
        else:
            verdict = "supported" if named <= known else "unsupported"
        unnamed = ", ".join(sorted(named - known))
        reason = f"not said: {unnamed}" if unnamed else ""
        verdicts.append({"number": int(number), "verdict": verdict, "reason": reason})
    return {"sentences": verdicts}


def _diagnoses(text: str) -> set[str]:
    return {name for name in grammar.DIAGNOSES if re.search(rf"\b{name}\b", text, re.IGNORECASE)}


WRITERS: dict[str, Callable[[str, random.Random], dict[str, Any]]] = {
    "narrator's question": _narrator_question,
    "answer without the image": _without_image,
    "verify": _verify,
}
