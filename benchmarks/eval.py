"""Evaluation: answering in batches beside one question at a time, and scoring ten thousand answers.

    python benchmarks/eval.py --model-path demo-out/stage2 --data demo-out/held-out     # the demo's model and questions
    python benchmarks/eval.py                       # a very small model with random weights, made-up pictures
    python benchmarks/eval.py --quick               # the same in seconds

"One at a time" opens a question's picture, asks, and goes to the next, as the scripts of the published benchmarks do;
both ask with the picture and with every ablation, with the same model in the same process, in turns. Answers are
compared one by one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from record import arguments, finish, paired, row

from medllava.conversation import IMAGE_TAG, Turn
from medllava.eval import __main__ as commands
from medllava.eval.answer import answer_all
from medllava.eval.benchmarks import Benchmark, load_benchmark, read_questions
from medllava.eval.models import Model, open_local
from medllava.eval.pictures import Pictures
from medllava.eval.records import Question
from medllava.eval.rotation import applies
from medllava.jsonl import read_rows, write_records
from medllava.model.answerer import Answerer
from medllava.model.tiny import tiny_checkpoint

Answers = dict[tuple[str, str], str]
WORDS = ("gland", "stroma", "nucleus", "vessel", "necrosis", "mitosis", "fibrosis", "oedema", "lumen", "crypt")


def made_up(folder: Path, count: int) -> list[Question]:
    """Questions on pictures of noise, some on each."""
    rng = random.Random(0)
    for number in range(count // 4 + 1):
        Image.effect_noise((320, 240), 60).convert("RGB").save(folder / f"{number}.png")
    return [
        Question(
            id=f"q{number}", image=f"{number // 4}.png", kind="open", answer="a gland", group=str(number // 4),
            question=f"What of {' '.join(rng.choices(WORDS, k=rng.randrange(1, 8)))} is seen here?",
        )
        for number in range(count)
    ]


def one_at_a_time(path: str, device: str, pictures: Pictures, benchmark: Benchmark) -> Callable[..., Answers]:
    answerer = Answerer.load(path, device=device)

    def answers(questions: Sequence[Question]) -> Answers:
        found = {}
        for condition in benchmark.conditions:
            for question in questions:
                if not applies(question, condition):
                    continue
                picture = pictures.show(question, condition)
                text = benchmark.prompt(question)
                turn = Turn(role="user", text=f"{IMAGE_TAG}\n{text}" if picture else text)
                shown = [picture] if picture else []
                done = answerer.answer(shown, [turn], max_new_tokens=benchmark.max_new_tokens, temperature=0.0)
                found[question.id, condition] = done.text
        return found

    return answers


def in_batches(model: Model, pictures: Pictures, benchmark: Benchmark, batch: int) -> Callable[..., Answers]:
    def answers(questions: Sequence[Question]) -> Answers:
        with tempfile.TemporaryDirectory() as folder:
            answer_all(questions, benchmark, pictures, model, Path(folder), batch=batch)
            rows = read_rows(Path(folder) / "answers.jsonl")
            return {(line["question_id"], line["condition"]): line["text"] for _, line in rows}

    return answers


def ten_thousand(count: int, folder: Path) -> float:
    """Seconds of the report on so many answers (half to open, half to closed questions, under two conditions): every
    score with its interval from 2,000 draws, and the page."""
    rng = random.Random(1)
    questions, answers = [], []
    for number in range(count // 2):
        closed = number % 2 == 1
        words = " ".join(rng.choices(WORDS, k=12))
        questions.append(Question(
            id=f"q{number}", image=f"{number // 3}.png", question=f"What is {number}?", group=f"v{number // 6}",
            kind="closed" if closed else "open", answer=rng.choice(("yes", "no")) if closed else words,
            choices=("yes", "no") if closed else (), categories={"tissue": rng.choice(WORDS)},
        ))
        for condition in ("real", "blank"):
            text = rng.choice(("Yes.", "No.", "I cannot tell.")) if closed else " ".join(rng.choices(WORDS, k=20))
            answers.append({"question_id": f"q{number}", "condition": condition, "text": text, "model": "m"})
    write_records(folder / "questions.jsonl", questions)
    write_records(folder / "answers.jsonl", answers)
    began = time.perf_counter()
    commands.main(["report", "--answers", str(folder / "answers.jsonl"), "--out", str(folder / "report")])
    return time.perf_counter() - began


def main() -> int:
    parser: argparse.ArgumentParser = arguments(__doc__, "eval")
    parser.add_argument("--model-path", help="a checkpoint (default: a very small one with random weights)")
    parser.add_argument("--data", type=Path, help="folder with questions.jsonl and narrated/, as of the demo")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    count, rounds = (40, 1) if given.quick else (given.questions, given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if given.data:
            questions, images = read_questions(given.data / "questions.jsonl"), given.data / "narrated"
            random.Random(0).shuffle(questions)
            questions = questions[:count]
        else:
            questions, images = made_up(place, count), place
        path = given.model_path or str(tiny_checkpoint(place / "tiny"))
        benchmark = load_benchmark("phantom").model_copy(update={} if given.data else {"max_new_tokens": 8})
        pictures = Pictures(images, questions)
        model = open_local(path, given.device, benchmark.max_new_tokens)
        found: dict[str, Answers] = {}

        def timed(name: str, answers: Callable[..., Answers]) -> Callable[[], float]:
            def run() -> float:
                began = time.perf_counter()
                found[name] = answers(questions)
                return time.perf_counter() - began

            return run

        serial = one_at_a_time(path, given.device, pictures, benchmark)
        serial(questions[:4])
        alone_s, together_s = paired(
            timed("alone", serial), timed("together", in_batches(model, pictures, benchmark, given.batch)), rounds
        )
        answers = len(found["alone"])
        different = sum(found["alone"][key] != found["together"].get(key) for key in found["alone"])
        report_s = ten_thousand(200 if given.quick else 10_000, place / "scored")
    alone = "one question at a time"
    rows = [
        row("eval.batched_over_serial", alone_s / together_s, "times", baseline=alone, baseline_value=1.0,
            least=None if given.quick else 4.0),
        row("eval.answers_per_s", answers / together_s, "answers/s", baseline=alone, baseline_value=answers / alone_s),
        row("eval.answers_that_differ", float(different), "answers", most=0.0),
        row("eval.report_10k", report_s, "s", most=None if given.quick else 20.0),
    ]
    what = f"{Path(path).name} on {given.data.name}" if given.data else "a very small model with random weights"
    note = (
        f"{len(questions)} questions under {len(benchmark.conditions)} conditions, {what}, batches of {given.batch}, "
        f"{given.device}, {torch.get_num_threads()} threads; medians of {rounds} rounds taken in turns"
    )
    return finish(given.out, rows, note)


if __name__ == "__main__":
    sys.exit(main())
