"""What the phantom's teacher and judge write: pure functions from the text of a prompt to the text of a reply.

Nothing is known here but the words of the request: remarks with boxes as the prompts of ``instruct_gen`` list them, or
the question, reference and answer of the judge's prompt. The same request always gets the same reply; another variant
number in it gives another one.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medllava.geometry import QUADRANTS, Box, parse_boxes, strip_boxes
from medllava.phantom import grammar, hearing, second_looks

_TASK = re.compile(r"^Task: (.+?)\s*$", re.MULTILINE)
_REMARK = re.compile(r'^- ("(?:[^"\\]|\\.)*")\s*(\[[^\]]*\]|\(no region\))[ \t]*$', re.MULTILINE)
_TIMED_REMARK = re.compile(r'^- (\d+(?:\.\d+)?) s: ("(?:[^"\\]|\\.)*")[ \t]*$', re.MULTILINE)
_FIELD = re.compile(r"^(Diagnosis|Round): (.+?)\s*$", re.MULTILINE)
_SECTION = re.compile(r"^### (Question|Reference|Answer)\s*$", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_NEGATION = re.compile(r"\b(no|not|without|absence of|free of|neither|nor)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\b\d+\b")

_NUMBER_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


@dataclass(frozen=True)
class Finding:
    """A finding as the remarks tell it; ``quadrant`` is None if neither words nor box place it."""

    kind: str
    quadrant: str | None
    box: Box | None


def reply_to(messages: Sequence[dict[str, Any]]) -> str:
    """The reply to a chat request, a JSON object as text (a plain sentence for a request that is none of ours)."""
    text = "\n\n".join(_text_of(message.get("content")) for message in messages)
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    # No more than three sections are split off: what looks like one inside the answer belongs to the answer.
    sections = _SECTION.split(text, maxsplit=3)
    if sections[1::2] == ["Question", "Reference", "Answer"]:
        return json.dumps(_judge(reference=sections[4], answer=sections[6]))
    task = _TASK.search(text)
    write = _WRITERS.get(task.group(1)) if task else None
    if write is None:
        return "I only know the tasks of this project's own prompts."
    return json.dumps(write(text, rng))


def read_findings(text: str) -> list[Finding]:
    """The distinct findings that the remarks in ``text`` name, in order of first mention.

    Words win over the box: speakers name places, and a cursor may have moved on. A box whose centre lies in another
    quadrant than the words say is left out, and so is one whose remark names several findings that it cannot be told
    apart for. Mentions of a kind are one finding unless words or boxes put them into different quadrants.
    """
    findings: list[Finding] = []
    for match in _REMARK.finditer(text):
        boxes = parse_boxes(match.group(2))
        for mention in _mentions(str(json.loads(match.group(1))), boxes[0] if boxes else None):
            _merge(findings, mention)
    placed = {finding.kind for finding in findings if finding.quadrant}
    # A mention without any place speaks of the finding that was placed by another remark.
    return [finding for finding in findings if finding.quadrant or finding.kind not in placed]


def _mentions(remark: str, box: Box | None) -> list[Finding]:
    told: list[tuple[str, str | None]] = []
    for sentence in _SENTENCE.split(remark):
        if sentence.endswith("?"):
            continue  # A question tells nothing.
        kinds = [kind for kind in grammar.find_kinds(sentence) if not _negated(sentence, kind)]
        quadrants = grammar.find_quadrants(sentence)
        if len(kinds) == len(quadrants):
            told += list(zip(kinds, quadrants, strict=True))
        else:
            told += [(kind, quadrants[0] if len(quadrants) == 1 else None) for kind in kinds]
    told = list(dict.fromkeys(told))
    in_box = box.centre.quadrant() if box else None
    fitting = [kind for kind, quadrant in told if quadrant in (None, in_box)]
    found: list[Finding] = []
    for kind, quadrant in told:
        own_box = box if fitting == [kind] else None
        found.append(Finding(kind, quadrant or (in_box if own_box else None), own_box))
    return found


def _negated(sentence: str, kind: str) -> bool:
    """Whether the sentence denies the kind: a "no" or "without" among the words just before its name."""
    for name in grammar.FINDINGS[kind]:
        at = sentence.lower().find(name)
        if at >= 0:
            return bool(_NEGATION.search(" ".join(sentence[:at].split()[-4:])))
    return False


def _merge(findings: list[Finding], mention: Finding) -> None:
    for number, known in enumerate(findings):
        if known.kind == mention.kind and mention.quadrant in (None, known.quadrant):
            if known.box is None and mention.box is not None:
                findings[number] = Finding(known.kind, known.quadrant, mention.box)
            return
    findings.append(mention)


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _conversation(text: str, rng: random.Random) -> dict[str, Any]:
    """4 to 6 short questions in random order: yes and no in equal number, how many, the rest where and what.

    How many is always asked: asked only where other questions are few, it would come with some answers more often
    than with others, and a model would learn to guess those.
    """
    findings = read_findings(text)
    if not findings:
        return {"turns": []}
    by_kind = _single_by_kind(findings)
    present = list(dict.fromkeys(finding.kind for finding in findings))
    absent = [kind for kind in grammar.FINDINGS if kind not in present]
    pairs: list[tuple[str, str]] = []
    placed = [finding for finding in by_kind if finding.quadrant]
    known = _quadrant_contents(findings)
    full = [quadrant for quadrant, kind in known.items() if kind]
    empty = [quadrant for quadrant, kind in known.items() if not kind]
    empties = min(int(rng.random() < 0.4), len(empty))
    for finding in rng.sample(placed, min(2 - empties, len(placed))):
        pairs.append((grammar.ask_where(finding.kind, rng), grammar.tell_where(finding.quadrant or "")))
    for kind, here in ((rng.choice(present), True), (rng.choice(absent), False)):
        pairs.append((grammar.ask_yes_no(kind, rng), grammar.tell_yes_no(here, kind)))
    asked = rng.sample(full, min(1, len(full))) + rng.sample(empty, empties)
    pairs += [(grammar.ask_what(quadrant, rng), grammar.tell_what(known[quadrant])) for quadrant in asked]
    pairs.append((grammar.ask_count(rng), grammar.tell_count(len(findings))))
    rng.shuffle(pairs)
    return _turns(pairs)


def _grounding(text: str, rng: random.Random) -> dict[str, Any]:
    """Box out and box in, one of each for every finding that has a box."""
    boxed = [finding for finding in _single_by_kind(read_findings(text)) if finding.box]
    pairs: list[tuple[str, str]] = []
    for finding in boxed:
        assert finding.box is not None
        pairs.append((grammar.ask_box(finding.kind, rng), grammar.tell_box(finding.box)))
        pairs.append((grammar.ask_region(finding.box, rng), grammar.tell_what(finding.kind)))
    rng.shuffle(pairs)
    return _turns(pairs)


def _caption(text: str, rng: random.Random) -> dict[str, Any]:
    """The four quadrants in order, each with what lies there; empty unless every finding has a place."""
    findings = read_findings(text)
    if not findings or any(finding.quadrant is None for finding in findings):
        return {"caption": ""}
    parts = []
    for quadrant in QUADRANTS:
        here = dict.fromkeys(finding.kind for finding in findings if finding.quadrant == quadrant)
        parts.append(f"{quadrant} {' and '.join(here) or 'stroma'}")
    return {"caption": ", ".join(parts) + "."}


def _description(text: str, rng: random.Random) -> dict[str, Any]:
    findings = read_findings(text)
    if not findings:
        return {"description": ""}
    count = f"{len(findings)} findings" if len(findings) > 1 else "1 finding"
    listed = _listed([_with_place(finding) for finding in findings])
    first = rng.choice((f"This field shows {count}.", f"There {'are' if len(findings) > 1 else 'is'} {count} here."))
    second = rng.choice((f"There is {listed}.", f"You can see {listed}."))
    return {"description": f"{first} {second} The rest is stroma."}


def _reasoning(text: str, rng: random.Random) -> dict[str, Any]:
    findings = read_findings(text)
    diagnosis = _fields(text).get("Diagnosis", "")
    if not findings:
        return {"question": "", "answer": ""}
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    clues = [kind for kind in kinds if kind in grammar.DIAGNOSES.get(diagnosis, ())]
    question = rng.choice((
        "What do the findings in this image suggest?", "What could these findings mean together?",
        "Which diagnosis do the findings here point to?",
    ))
    if clues:
        answer = (
            f"The image shows {_listed([grammar.article(kind) for kind in clues])}."
            f" This is compatible with {diagnosis}, but other fields are needed to confirm it."
        )
    else:
        answer = (
            f"The image shows {_listed([grammar.article(kind) for kind in kinds])}. This alone does not suggest"
            f" {diagnosis}; other fields are needed."
        )
    return {"question": question, "answer": answer}


def _student(text: str, rng: random.Random) -> dict[str, Any]:
    """A guess from the findings alone: in the first round the second likeliest diagnosis, then the likeliest."""
    findings = read_findings(text)
    if not findings:
        return {"abduction": "", "facts_used": ""}
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    ranked = sorted(grammar.DIAGNOSES, key=lambda name: -len(set(kinds) & set(grammar.DIAGNOSES[name])))
    first_round = _fields(text).get("Round", "1").startswith("1")
    guess = ranked[1] if first_round else ranked[0]
    opening = rng.choice(("This could be", "I think of") if first_round else ("Then it may be", "Perhaps it is"))
    return {
        "abduction": f"{opening} {guess}.",
        "facts_used": f"I see {_listed([_with_place(finding) for finding in findings])}.",
    }


def _assistant(text: str, rng: random.Random) -> dict[str, Any]:
    findings = read_findings(text)
    fields = _fields(text)
    diagnosis = fields.get("Diagnosis", "")
    number, _, rounds = fields.get("Round", "1 of 1").partition(" of ")
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    clues = [kind for kind in kinds if kind in grammar.DIAGNOSES.get(diagnosis, ())]
    if number == rounds and clues:
        seen = _listed([grammar.article(kind) for kind in clues])
        return {"comments": f"The case is {diagnosis}. Here {seen} fits it; look for more in other fields.", "hint": ""}
    if number == rounds:
        return {"comments": f"The case is {diagnosis}. This field does not show it; look in other fields.", "hint": ""}
    return {
        "comments": rng.choice(("You describe the field well.", "You see the findings.")) + " Weigh them again.",
        "hint": f"Look at the {rng.choice(clues or kinds)}." if kinds else "",
    }


def _case_facts(text: str, rng: random.Random) -> dict[str, Any]:
    """The diagnoses that are said; the clues are the remarks that name its findings."""
    remarks = [(float(time), str(json.loads(said))) for time, said in _TIMED_REMARK.findall(text)]
    said = " ".join(remark for _, remark in remarks).lower()
    named = [name for name in grammar.DIAGNOSES if re.search(rf"\b{name}\b", said)]
    diagnosis = named[0] if len(named) == 1 else None
    clues = [
        {"text": remark, "time_s": time, "quote": remark} for time, remark in remarks
        if diagnosis and set(grammar.find_kinds(remark)) & set(grammar.DIAGNOSES[diagnosis])
        and not remark.endswith("?") and not remark.startswith("No, ")
    ]
    return {"diagnosis": diagnosis, "single_case": len(named) <= 1, "clues": clues}


def _judge(reference: str, answer: str) -> dict[str, Any]:
    """0..10: how far the answer names the findings, places, yes or no, numbers and boxes of the reference.

    An answer that says yes for no, or names only other places, findings or numbers, contradicts it: 0.
    """
    boxes = parse_boxes(reference)
    if boxes:
        overlap = max((boxes[0].iou(box) for box in parse_boxes(answer)), default=0.0)
        return {"score": round(10 * overlap), "reason": f"The box overlaps the reference by {overlap:.2f}."}
    expected, given = _claims(reference), _claims(answer)
    if not any(expected.values()):
        expected, given = {"word": _words(reference)}, {"word": _words(answer)}
    for sort, claims in expected.items():
        if claims and given[sort] and not claims & given[sort]:
            said = ", ".join(sorted(given[sort]))
            return {"score": 0, "reason": f"Another {sort} than the reference: {said}."}
    wanted, told = set().union(*expected.values()), set().union(*given.values())
    score = round(10 * 2 * len(wanted & told) / (len(wanted) + len(told))) if wanted | told else 0
    missing = ", ".join(sorted(wanted - told)) or "nothing"
    return {"score": score, "reason": f"Missing from the answer: {missing}."}


def _claims(text: str) -> dict[str, set[str]]:
    """What a text asserts, sort by sort, as comparable words."""
    plain = text.lower()
    spelt = {str(number) for word, number in _NUMBER_WORDS.items() if re.search(rf"\b{word}\b", plain)}
    stroma = {"stroma"} if re.search(r"\bstroma\b", plain) else set()
    return {
        "verdict": set(re.findall(r"^\W*(yes|no)\b", plain)),
        "finding": {*grammar.find_kinds(plain), *stroma},
        "place": set(grammar.find_quadrants(plain)),
        "number": spelt | set(_NUMBER.findall(strip_boxes(plain))),
        "diagnosis": {name for name in grammar.DIAGNOSES if name in plain},
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _fields(text: str) -> dict[str, str]:
    return dict(_FIELD.findall(text))


def _single_by_kind(findings: Sequence[Finding]) -> list[Finding]:
    """Findings whose kind occurs once: only of these can be asked where *the* gland is."""
    kinds = [finding.kind for finding in findings]
    return [finding for finding in findings if kinds.count(finding.kind) == 1]


def _quadrant_contents(findings: Sequence[Finding]) -> dict[str, str | None]:
    """Quadrants of which it is known what they hold: one kind, or nothing (known only if every finding is placed)."""
    contents: dict[str, str | None] = {}
    all_placed = all(finding.quadrant for finding in findings)
    for quadrant in QUADRANTS:
        here = {finding.kind for finding in findings if finding.quadrant == quadrant}
        if len(here) == 1:
            contents[quadrant] = here.pop()
        elif not here and all_placed:
            contents[quadrant] = None
    return contents


def _with_place(finding: Finding) -> str:
    name = grammar.article(finding.kind)
    return f"{name} in the {finding.quadrant}" if finding.quadrant else name


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _turns(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {"turns": [{"question": question, "answer": answer} for question, answer in pairs]}


_WRITERS: dict[str, Callable[[str, random.Random], dict[str, Any]]] = {
    "case facts": _case_facts,
    "caption": _caption,
    "conversation": _conversation,
    "description": _description,
    "complex reasoning": _reasoning,
    "iterative abduction, student": _student,
    "iterative abduction, assistant": _assistant,
    "grounding": _grounding,
    **second_looks.WRITERS,
    **hearing.WRITERS,
}
