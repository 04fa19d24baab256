"""Made-up captions and teacher's replies in any number, for measuring what ``generate`` itself costs.

The words are drawn from a small vocabulary, so that no reply is like another; they pass the gates and mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

from medllava.jsonl import write_records

_VOCABULARY = """
pale dense loose broad narrow slender plump oval round spindle stellate granular clear foamy vacuolated basophilic
eosinophilic amphophilic hyperchromatic vesicular smudged wavy straight branching anastomosing nested trabecular solid
cribriform papillary tubular cystic dilated compressed thin thick pink blue purple grey bright dark fine coarse even
uneven cells nuclei nucleoli cytoplasm membranes borders strands septa bundles sheets cords nests glands ducts lumina
vessels capillaries arterioles venules nerves muscle collagen stroma matrix fat adipocytes fibroblasts lymphocytes
plasma histiocytes neutrophils eosinophils macrophages melanin pigment mucin keratin debris crystals calcium
hemorrhage edema surround enclose line fill cross follow replace separate border contain resemble show form gather
spread mingle with near beside beneath above within around between along toward among against across through under
over mostly partly focally slightly clearly barely often rarely here there together apart again throughout everywhere
crowded scattered arranged aligned layered folded twisted frayed polarised overlapping irregular regular delicate
sturdy texture pattern outline contour rim core edge surface layer zone band pocket island cluster row palisade whorl
lattice
"""
_WORDS = _VOCABULARY.split()

_QUOTED = re.compile(r'- (?:(\d+\.\d) s: )?("(?:[^"\\]|\\.)*")(?: \[([\d., ]+)\])?')
DIAGNOSIS = "schwannoma"


def sentence(dice: random.Random, words: int = 14) -> str:
    return " ".join(dice.choices(_WORDS, k=words)).capitalize() + "."


def write_captions(path: Path, count: int, *, per_video: int = 12) -> None:
    """``count`` captions of three phrases each, two with a box; every video is of one case whose diagnosis is said."""
    write_records(path, (_caption(number, per_video) for number in range(count)))


def _caption(number: int, per_video: int) -> dict[str, Any]:
    video, place = divmod(number, per_video)
    dice = random.Random(f"caption {number}")
    began = 60.0 * place
    phrases = []
    for phrase in range(3):
        text = sentence(dice, 16)
        if place == 0 and phrase == 2:
            text = f"The diagnosis is {DIAGNOSIS}."
        x, y = dice.uniform(0, 0.6), dice.uniform(0, 0.6)
        box = [round(x, 2), round(y, 2), round(x + dice.uniform(0.1, 0.4), 2), round(y + dice.uniform(0.1, 0.4), 2)]
        phrases.append({
            "text": text, "start_s": began + 15 * phrase, "end_s": began + 15 * phrase + 12,
            "box": box if phrase < 2 else None,
        })
    name = f"lecture-{video:05}"
    return {
        "id": f"{name}-{place:03}", "video": f"{name}.mp4", "image": f"frames/{name}-{place:03}.png",
        "crop_px": [0, 0, 640, 480], "phrases": phrases,
    }


def reply_text(schema_name: str, prompt: str) -> str:
    """What a teacher would reply to a prompt that asks for a form of that name: the same each time."""
    dice = random.Random(hashlib.sha256(prompt.encode()).digest())
    said = [(seconds, json.loads(text), box) for seconds, text, box in _QUOTED.findall(prompt)]
    form: dict[str, Any]
    if schema_name == "FactsReply":
        clues = [{"text": text, "time_s": float(seconds), "quote": text} for seconds, text, _ in said[:3]]
        named = any(DIAGNOSIS in text for _, text, _ in said)
        form = {"diagnosis": DIAGNOSIS if named else None, "single_case": True, "clues": clues}
    elif schema_name == "TurnsReply":
        boxes = [box for _, _, box in said if box]
        wanted = "Task: grounding" in prompt
        form = {"turns": [
            {
                "question": "What do we see " + " ".join(dice.choices(_WORDS, k=6)) + "?",
                "answer": f"{sentence(dice)[:-1]} [{box}]." if wanted else f"{sentence(dice)} {sentence(dice)}",
            }
            for box in (boxes if wanted else range(3))
        ]}
    elif schema_name == "CaptionReply":
        form = {"caption": sentence(dice, 25)}
    elif schema_name == "DescriptionReply":
        form = {"description": " ".join(sentence(dice) for _ in range(6))}
    elif schema_name == "QuestionReply":
        answer = " ".join(sentence(dice) for _ in range(7))
        form = {"question": f"Why is it {sentence(dice, 10)[:-1]}?", "answer": answer}
    elif schema_name == "StudentReply":
        form = {"abduction": sentence(dice), "facts_used": sentence(dice)}
    elif schema_name == "AssistantReply":
        form = {"comments": sentence(dice), "hint": sentence(dice)}
    else:
        raise ValueError(f"no reply of the form {schema_name!r} is made up here")
    return json.dumps(form)
