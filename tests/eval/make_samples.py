"""Tiny made-up data in the layout of every benchmark, for tests and for eval/run_all.sh. None of it is anybody's data.

example: python tests/eval/make_samples.py OUT
"""

from __future__ import annotations

import csv
import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PICTURES = 4
NAMES = [f"case{number}_field.png" for number in range(PICTURES)]
FINDINGS = ("a gland", "a blood vessel", "necrosis", "a mitotic figure")


def pictures(folder: Path, mark: bool = False, names: list[str] = NAMES) -> None:
    """Pink fields with one dark disc each; with ``mark``, a red ellipse round it."""
    for number, name in enumerate(names):
        rng = random.Random(number)
        image = Image.new("RGB", (64, 48), (230, 190 + rng.randrange(20), 215))
        x, y = rng.randrange(4, 40), rng.randrange(4, 24)
        draw = ImageDraw.Draw(image)
        draw.ellipse((x, y, x + 16, y + 16), fill=(90, 50, 120))
        if mark:
            draw.ellipse((x - 3, y - 3, x + 19, y + 19), outline=(255, 0, 0), width=2)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def open_and_closed(count: int = 8) -> list[dict[str, Any]]:
    """Rows with OPEN and CLOSED questions about the pictures in turn."""
    rows = []
    for number in range(count):
        picture, finding = NAMES[number % PICTURES], FINDINGS[number % PICTURES]
        row = {"id": f"s{number}", "image": picture, "yes_no_answer": None}
        if number % 2:
            truth = number % 4 == 1
            word = "Yes" if truth else "No"
            row |= {
                "question": f"Is {finding} seen here, in {number}?", "answer_type": "CLOSED",
                "answer": f"{word}, there is {'' if truth else 'not '}{finding}.", "yes_no_answer": word,
            }
        else:
            question = f"What is seen in field {number}?"
            row |= {"question": question, "answer_type": "OPEN", "answer": f"{finding} in stroma"}
        rows.append(row)
    return rows


def choices(letter: bool) -> list[str]:
    return [f"{mark}: {text}" if letter else text for mark, text in zip("ABCD", FINDINGS, strict=True)]


def make_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def make_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def quilt_vqa(out: Path) -> None:
    rows = [{**row, "image_dependent": "no" if number > 5 else "yes"} for number, row in enumerate(open_and_closed())]
    for name in ("quilt_vqa", "quilt_vqa_raw"):
        make_json(out / name / "questions.json", rows)
        pictures(out / name / "images")


def quilt_vqa_red(out: Path) -> None:
    make_json(out / "quilt_vqa_red" / "questions.json", open_and_closed(4))
    pictures(out / "quilt_vqa_red" / "images", mark=True)
    make_json(out / "quilt_vqa_red_unmarked" / "questions.json", open_and_closed(4))
    pictures(out / "quilt_vqa_red_unmarked" / "images")


def quilt_gpt(out: Path) -> None:
    folder = out / "quilt_gpt"
    rows = [
        {"question_id": n, "image": NAMES[n], "text": f"What is in {n}?", "category": "detail" if n % 2 else "conv"}
        for n in range(4)
    ]
    make_lines(folder / "questions.jsonl", rows)
    make_lines(folder / "quilt_gpt_answers.jsonl", [{"question_id": n, "text": FINDINGS[n]} for n in range(4)])
    make_lines(
        folder / "quilt_gpt_captions.jsonl",
        [{"question_id": n, "type": "Breast" if n % 2 else "Bone", "caption": FINDINGS[n]} for n in range(4)],
    )
    pictures(folder / "images")


def path_vqa(out: Path) -> None:
    """The original pickle: pictures named without their ending."""
    folder = out / "path_vqa"
    names = [f"test_{n:04}.png" for n in range(4)]
    rows = [
        {"image": names[n % 4][:-4], "question": f"Is {n} a gland?" if n % 2 else f"What is {n}?",
         "answer": ("yes" if n % 4 == 1 else "no") if n % 2 else FINDINGS[n % 4]}
        for n in range(6)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.pkl").write_bytes(pickle.dumps(rows))
    pictures(folder / "images", names=names)


def pmc_vqa(out: Path) -> None:
    rows = [
        {"index": n, "Figure_path": NAMES[n % 4], "Caption": "c", "Question": f" What is seen in field {n}? ",
         **{f"Choice {mark}": f" {mark}:{text} " for mark, text in zip("ABCD", FINDINGS, strict=True)},
         "Answer": "ABCD"[n % 4], "split": "test"}
        for n in range(5)
    ]
    make_csv(out / "pmc_vqa_full" / "questions.csv", rows)
    pictures(out / "pmc_vqa_full" / "images" / "figures")
    tail = "\n".join(choices(True))
    llava = [
        {"id": f"p{n}", "image": NAMES[n % 4],
         "conversations": [{"from": "human", "value": f"<image>\nWhat is seen in {n}?\n{tail}"},
                           {"from": "gpt", "value": "ABCD"[n % 4]}]}
        for n in range(4)
    ]
    make_json(out / "pmc_vqa" / "questions.json", llava)
    pictures(out / "pmc_vqa" / "images")


def path_mmu(out: Path) -> None:
    options = [f"{mark}) {text}" for mark, text in zip("ABCD", FINDINGS, strict=True)]
    subsets = {
        subset: {
            split: [
                {"No": n, "img": NAMES[n], "question": f"What is seen in {subset} {n}?", "options": options,
                 "answer": options[n], "explanation": "x"}
                for n in range(2)
            ]
            for split in ("val", "test", "test_tiny")
        }
        for subset in ("PubMed", "Atlas")
    }
    make_json(out / "path_mmu" / "questions.json", subsets)
    pictures(out / "path_mmu" / "images")


def slake(out: Path) -> None:
    rows = [
        {"img_id": n, "img_name": f"xmlab{n}/source.jpg", "question": question, "answer": answer, "q_lang": lang,
         "location": "Lung", "modality": "CT", "answer_type": kind, "base_type": "vqa", "content_type": content,
         "triple": ["vhead", "_", "_"], "qid": n}
        for n, (question, answer, lang, kind, content) in enumerate([
            ("Is the lung healthy?", "No", "en", "CLOSED", "Abnormality"),
            ("What modality is used?", "CT", "en", "OPEN", "Modality"),
            ("Which plane is it?", "Axial", "en", "CLOSED", "Plane"),
            ("肺健康吗?", "是", "zh", "CLOSED", "Abnormality"),
        ])
    ]
    make_json(out / "slake" / "questions.json", rows)
    pictures(out / "slake" / "images", names=[f"xmlab{n}/source.jpg" for n in range(4)])


def vqa_rad(out: Path) -> None:
    rows = [
        {"qid": n, "image_name": NAMES[n % 4], "image_organ": "HEAD", "question": f"Is there a mass in {n}?",
         "answer": answer, "answer_type": kind, "question_type": "PRES", "phrase_type": phrase}
        for n, (answer, kind, phrase) in enumerate([
            ("Yes", "CLOSED", "test_freeform"), ("left lobe", "OPEN", "test_para"), ("No", "CLOSED", "freeform"),
        ])
    ]
    make_json(out / "vqa_rad" / "questions.json", rows)
    pictures(out / "vqa_rad" / "images")


def kvasir_vqa(out: Path) -> None:
    rows = [
        {"source": "HyperKvasir", "question": "Is there text?", "answer": "yes", "img_id": NAMES[0][:-4]},
        {"source": "Instrument", "question": "How many polyps are there?", "answer": "2", "img_id": NAMES[1][:-4]},
        {"source": "Instrument", "question": "Is there a polyp?", "answer": "No", "img_id": NAMES[2][:-4]},
    ]
    make_csv(out / "kvasir_vqa" / "questions.csv", rows)
    pictures(out / "kvasir_vqa" / "images")


def grounding(out: Path) -> None:
    rows = [
        {"id": f"v{n}-0", "video": f"v{n}.mp4", "image": NAMES[n], "crop_px": [0, 0, 64, 48],
         "phrases": [{"text": f"gland {n} here", "start_s": 0, "end_s": 1, "box": [0.1 * n, 0.2, 0.1 * n + 0.4, 0.8]},
                     {"text": "and so on", "start_s": 1, "end_s": 2, "box": None}]}
        for n in range(4)
    ]
    make_lines(out / "grounding" / "questions.jsonl", rows)
    pictures(out / "grounding" / "images")


def phantom(out: Path) -> None:
    """Questions of every kind that the phantom's have."""
    kinds: list[dict[str, Any]] = [
        {"kind": "where", "question": "Where is the dark disc?", "answer": "In the upper left."},
        {"kind": "yes_no", "question": "Is there a dark disc?", "answer": "Yes."},
        {"kind": "what", "question": "What is in this image?", "answer": "necrosis", "choices": FINDINGS},
        {"kind": "count", "question": "How many discs are there?", "answer": "1"},
        {"kind": "box", "question": "Give the box of the disc.", "answer": "[0.10, 0.10, 0.40, 0.40]",
         "box": [0.1, 0.1, 0.4, 0.4]},
    ]
    rows = [
        {"id": f"{number}-{row['kind']}", "image": NAMES[number], "group": f"video{number}", **row}
        for number in range(2) for row in kinds
    ]
    make_lines(out / "phantom" / "questions.jsonl", rows)
    pictures(out / "phantom" / "images")


def own(out: Path) -> None:
    rows = [
        {"image": NAMES[0], "question": "Is there a gland?", "answer": "yes", "choices": "", "category": "gut"},
        {"image": NAMES[1], "question": "What is seen?", "answer": "necrosis", "choices": "|".join(FINDINGS),
         "category": "gut"},
        {"image": NAMES[2], "question": "Describe it.", "answer": "necrosis in stroma", "choices": "",
         "category": "skin"},
    ]
    make_csv(out / "own" / "questions.csv", rows)
    pictures(out / "own" / "images")


def make(out: Path) -> dict[str, tuple[Path, Path]]:
    """Write every sample; benchmark -> (question file, folder of pictures)."""
    layouts = (
        quilt_vqa, quilt_vqa_red, quilt_gpt, path_vqa, pmc_vqa, path_mmu, slake, vqa_rad, kvasir_vqa, grounding,
        phantom, own,
    )
    for write in layouts:
        write(out)
    return {
        folder.name: (next(folder.glob("questions.*")), folder / "images")
        for folder in sorted(out.iterdir())
        if folder.is_dir()
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
