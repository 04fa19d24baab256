r"""Ask a model every question of a benchmark, with its picture and with each ablation in its place.

Writes into --out: answers.jsonl (appended to; the same command goes on after a kill), failed.jsonl (questions that
could not be asked, tried again by the next run), questions.jsonl (a copy) and run.json (what made the answers).

example:
  medllava eval answer --benchmark phantom --questions q/questions.jsonl --images q --model-path ckpt --out answers
  medllava eval answer --benchmark quilt_vqa --questions quiltvqa_test_w_ans.json --images imgs \
      --base-url http://127.0.0.1:8000/v1 --out answers
"""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from medllava.errors import ConfigError, DataError, MedllavaError
from medllava.eval.records import Answer, Condition, Failure, Question
from medllava.eval.rotation import applies, as_asked

if TYPE_CHECKING:
    from medllava.eval.benchmarks import Benchmark
    from medllava.eval.models import Asked, Model, Reply
    from medllava.eval.pictures import Pictures, Shown

HELP = "ask a model (a folder or a server) every question, with and without the picture"

log = logging.getLogger(__name__)

_SIMILAR = 32
"""Prompts of one batch differ in length by hardly more characters than this."""

AHEAD = 3
"""Batches whose pictures are opened while the model answers."""

Job = tuple[Question, Condition]

NOT_ASKED = {"questions", "images", "files", "request", "harness", "rows"}
"""Parts of a definition that change neither what is asked nor how."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", required=True, help="name in eval/benchmarks, or path of a YAML definition")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-path", help="checkpoint folder or hub id, loaded here")
    source.add_argument("--base-url", help="OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="model name at the server (default: the first it lists)")
    parser.add_argument("--api-key-file", type=Path, help="file with the server's key (default: OPENAI_API_KEY)")
    parser.add_argument("--questions", type=Path, help="question file, in place of the definition's")
    parser.add_argument("--images", type=Path, help="folder of the pictures, in place of the definition's")
    parser.add_argument("--split", help="which split, where the data holds several (default: the definition's)")
    parser.add_argument("--group-pattern", help="regular expression: its first group in a picture's name is the case")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answers")
    parser.add_argument("--batch", type=int, default=16, help="questions at once (at a server, in parallel); 16")
    parser.add_argument(
        "--logprobs", action="store_true",
        help="ask a server for log-probabilities, too, for the report's calibration (a folder tells them anyway)",
    )
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument(
        "--regions", choices=["text", "mark"],
        help="a box that a question names: left in its text, or marked in red on the picture (default: as the"
        " checkpoint was trained, and text for a server)",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu, or auto: all cards together (default: the best one)")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval import models, provenance
    from medllava.eval.benchmarks import kinds_told, load_benchmark, questions_hash, read_question_set
    from medllava.eval.pictures import Pictures
    from medllava.jsonl import write_records
    from medllava.model.manifest import current_versions, now
    from medllava.regions import as_mark, way_of

    if arguments.batch < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ConfigError("--batch and --limit must be at least 1")
    benchmark = load_benchmark(arguments.benchmark)
    source = arguments.questions or benchmark.questions
    if source is None:
        raise ConfigError(f"benchmark {benchmark.name} names no question file; give it with --questions")
    if arguments.group_pattern:
        benchmark = benchmark.model_copy(update={"group_pattern": arguments.group_pattern})
    within = arguments.out / "pictures"
    found = read_question_set(source, benchmark, split=arguments.split, pictures=within)
    questions = found.questions
    print(f"{benchmark.name}: {found.told} ({kinds_told(questions)})")
    images = arguments.images or benchmark.images or (within if within.is_dir() else found.folder)
    pictures = Pictures(images, questions, benchmark.seed)
    _tell_missing(pictures, questions, images)
    questions = questions[: arguments.limit]
    if arguments.model_path:
        model = models.open_local(arguments.model_path, arguments.device, benchmark.max_new_tokens)
    else:
        model = models.open_server(arguments, benchmark.max_new_tokens)
    pictures.regions = arguments.regions or way_of(model.made.get("manifest", {}).get("regions", ()))
    # Only where it makes a difference, so that a run of before there were marks goes on.
    marks = pictures.regions == "mark" and any(as_mark(question.question) for question in questions)
    provenance.start_run(
        arguments.out,
        {
            "benchmark": benchmark.model_dump(mode="json", exclude=NOT_ASKED),
            "model": model.name,
            **model.made,
            "questions_sha256": questions_hash(questions),
            "data": found.told,
            "images_sha256": pictures.sha256(),
            "images": str(images.resolve()),
            "decoding": {"temperature": 0.0, "max_new_tokens": benchmark.max_new_tokens}
            | ({"regions": "mark"} if marks else {}),
            "versions": current_versions(),
            "command": provenance.command("answer"),
            "date": now(),
        },
    )
    write_records(arguments.out / "questions.jsonl", questions)
    # A server gets some batches at once, so that one slow answer does not hold up the others.
    size = arguments.batch * (1 if arguments.model_path else 4)
    failed = answer_all(questions, benchmark, pictures, model, arguments.out, batch=size)
    used = [name for name in benchmark.conditions if any(applies(question, name) for question in questions)]
    print(f"{arguments.out / 'answers.jsonl'}: {len(questions)} questions, {len(used)} conditions")
    if failed:
        print(f"{failed} could not be asked and stay unscored; reasons in {arguments.out / 'failed.jsonl'}")
    return 0


def _tell_missing(pictures: Pictures, questions: Sequence[Question], images: Path) -> None:
    """Say once how many pictures are not there; raises DataError if none is."""
    names = sorted({question.image for question in questions if question.image})
    missing = [name for name in names if not pictures.path(name).is_file()]
    if missing and len(missing) == len(names):
        raise DataError(f"{images}: none of the {len(names)} pictures is here (the first: {missing[0]}); give --images")
    if missing:
        log.warning("%s: %d of %d pictures are missing (the first: %s)", images, len(missing), len(names), missing[0])


def answer_all(
    questions: Sequence[Question],
    benchmark: Benchmark,
    pictures: Pictures,
    model: Model,
    out: Path,
    *,
    batch: int = 16,
) -> int:
    """Ask what ``out/answers.jsonl`` does not have yet and append it; returns how many could not be asked.

    Batches hold questions of one condition, one kind and similar length, and are the same in every run, so that a
    resumed run computes what an uninterrupted one does. Raises DataError if no question could be asked on its own
    picture.
    """
    from tqdm import tqdm

    from medllava.eval.benchmarks import MOST_TOLD
    from medllava.eval.pictures import Shown
    from medllava.jsonl import Appender, read_records

    path = out / "answers.jsonl"
    done = {(row.question_id, row.condition) for row in read_records(path, Answer)} if path.exists() else set()
    batches = _batches(questions, benchmark, batch)
    pending = [jobs for jobs in batches if any((question.id, condition) not in done for question, condition in jobs)]
    (out / "failed.jsonl").unlink(missing_ok=True)
    lost: list[Failure] = []

    with (
        Appender(path) as answers,
        Appender(out / "failed.jsonl") as failures,
        tqdm(total=sum(map(len, batches)), desc="answers", unit="", mininterval=0.5) as progress,
    ):
        progress.update(sum(map(len, batches)) - sum(map(len, pending)))
        for jobs, ready in _opened(pending, benchmark, Shown(pictures, model.picture)):
            for result in _answer(jobs, ready, model):
                if isinstance(result, Failure):
                    if len(lost) < MOST_TOLD:
                        log.warning("question %s (%s): %s", result.question_id, result.condition, result.reason)
                    failures.write(result)
                    lost.append(result)
                elif (result.question_id, result.condition) not in done:
                    answers.write(result)
            progress.update(len(jobs))
    if not lost:
        (out / "failed.jsonl").unlink()
    elif sum(failure.condition == "real" for failure in lost) == len(questions):
        raise DataError(f"none of the {len(questions)} questions could be asked; the first one: {lost[0].reason}")
    return len(lost)


def _batches(questions: Sequence[Question], benchmark: Benchmark, size: int) -> list[list[Job]]:
    """Answers of one kind are about equally long, so that few rows wait for the longest; among prompts of similar
    length, those about one picture stand together, which is then encoded once."""
    found = []
    for condition in benchmark.conditions:
        jobs: list[Job] = [(question, condition) for question in questions if applies(question, condition)]
        jobs.sort(key=lambda job: _order(job[0], len(benchmark.prompt(job[0]))))
        found += [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return found


def _order(question: Question, length: int) -> tuple[bool, str, int, str, int]:
    return question.image is None, question.kind, length // _SIMILAR, question.image or "", length


def _opened(
    batches: Sequence[list[Job]], benchmark: Benchmark, shown: Shown
) -> Iterator[tuple[list[Job], list[Asked | DataError]]]:
    """Each batch with what the model is given for it, opened by a thread of its own some batches ahead."""
    from medllava.eval.models import Asked, beginnings

    def opened(jobs: list[Job]) -> list[Asked | DataError]:
        found: list[Asked | DataError] = []
        for question, condition in jobs:
            asked = shown.pictures.worded(as_asked(question, condition))
            try:
                found.append(Asked(shown.of(question, condition), benchmark.prompt(asked), beginnings(asked)))
            except DataError as error:
                found.append(error)
        return found

    waiting: deque[tuple[list[Job], Future[list[Asked | DataError]]]] = deque()
    with ThreadPoolExecutor(1, "pictures") as thread:
        try:
            for jobs in batches:
                waiting.append((jobs, thread.submit(opened, jobs)))
                if len(waiting) > AHEAD:
                    first, ready = waiting.popleft()
                    yield first, ready.result()
            for jobs, ready in waiting:
                yield jobs, ready.result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def _answer(jobs: Sequence[Job], ready: Sequence[Asked | DataError], model: Model) -> list[Answer | Failure]:
    replies = iter(_ask([asked for asked in ready if not isinstance(asked, DataError)], model))
    results: list[Answer | Failure] = []
    for (question, condition), asked in zip(jobs, ready, strict=True):
        reply = asked if isinstance(asked, DataError) else next(replies)
        if isinstance(reply, MedllavaError):
            results.append(Failure(question_id=question.id, condition=condition, reason=str(reply)))
        else:
            results.append(Answer(question_id=question.id, condition=condition, model=model.name, **vars(reply)))
    return results


def _ask(batch: Sequence[Asked], model: Model) -> list[Reply | MedllavaError]:
    """Ask a batch; if it is refused as a whole, ask one by one, so that only the refused questions are lost."""
    if not batch:
        return []
    try:
        return list(model.ask(batch))
    except (DataError, ConfigError) as error:
        if len(batch) == 1:
            return [error]
        return [reply for asked in batch for reply in _ask([asked], model)]
