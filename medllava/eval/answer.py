"""Ask a model every question of a benchmark, with its picture and with each ablation in its place.

Writes into --out: answers.jsonl (appended to; the same command goes on after a kill), failed.jsonl (questions that
could not be asked, tried again by the next run), questions.jsonl (a copy) and run.json (what made the answers).

example:
  medllava eval answer --benchmark phantom --questions q/questions.jsonl --images q --model-path ckpt --out answers
  medllava eval answer --benchmark quilt_vqa --questions quiltvqa_test_w_ans.json --images imgs
      --base-url http://127.0.0.1:8000/v1 --out answers
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, DataError, MedllavaError, MissingExtraError, ServiceError
from medllava.eval.records import Answer, Condition, Failure, Question
from medllava.eval.rotation import applies, as_asked

if TYPE_CHECKING:
    from PIL import Image

    from medllava.eval.benchmarks import Benchmark
    from medllava.eval.pictures import Pictures

HELP = "ask a model (a folder or a server) every question, with and without the picture"

log = logging.getLogger(__name__)

MOST_TOLD = 5
"""Failures told one by one; all of them are in failed.jsonl."""


@dataclass(frozen=True)
class Reply:
    """What a model said; ``finish_reason`` is "length" if it was cut off."""

    text: str
    finish_reason: str


Ask = Callable[[Sequence[tuple["Image.Image | None", str]]], Sequence["Reply | MedllavaError"]]
"""(picture or None, prompt) for each question of a batch -> for each, a reply or why there is none. May also raise
DataError or ConfigError for the whole batch, which is then asked one by one."""

Job = tuple[Question, Condition]

NOT_ASKED = {"questions", "images", "files", "request", "harness", "rows"}
"""Parts of a definition that change neither what is asked nor how."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", required=True, help="name in eval/benchmarks, or path of a YAML definition")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-path", type=Path, help="checkpoint folder, loaded here")
    source.add_argument("--base-url", help="OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="model name at the server (default: the first it lists)")
    parser.add_argument("--api-key-file", type=Path, help="file with the server's key (default: OPENAI_API_KEY)")
    parser.add_argument("--questions", type=Path, help="question file, in place of the definition's")
    parser.add_argument("--images", type=Path, help="folder of the pictures, in place of the definition's")
    parser.add_argument("--split", help="which split, where the data holds several (default: the definition's)")
    parser.add_argument("--group-pattern", help="regular expression: its first group in a picture's name is the case")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answers")
    parser.add_argument("--batch", type=int, default=8, help="questions at once (at a server: in parallel); default 8")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval import provenance
    from medllava.eval.benchmarks import kinds_told, load_benchmark, questions_hash, read_question_set
    from medllava.eval.pictures import Pictures
    from medllava.jsonl import write_records
    from medllava.model.manifest import current_versions, now

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
        ask, model, details = _local(arguments.model_path, arguments.device, benchmark.max_new_tokens)
    else:
        ask, model, details = _server(arguments, benchmark.max_new_tokens)
    provenance.start_run(
        arguments.out,
        {
            "benchmark": benchmark.model_dump(mode="json", exclude=NOT_ASKED),
            "model": model,
            **details,
            "questions_sha256": questions_hash(questions),
            "data": found.told,
            "images_sha256": pictures.sha256(),
            "images": str(images.resolve()),
            "decoding": {"temperature": 0.0, "max_new_tokens": benchmark.max_new_tokens},
            "versions": current_versions(),
            "command": provenance.command("answer"),
            "date": now(),
        },
    )
    write_records(arguments.out / "questions.jsonl", questions)
    # A server gets some batches at once, so that one slow answer does not hold up the others.
    size = arguments.batch * (1 if arguments.model_path else 4)
    failed = answer_all(questions, benchmark, pictures, ask, model, arguments.out, batch=size)
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
    ask: Ask,
    model: str,
    out: Path,
    *,
    batch: int = 8,
) -> int:
    """Ask what ``out/answers.jsonl`` does not have yet and append it; returns how many could not be asked.

    Batches hold questions of one condition and of similar length, and are the same in every run, so that a resumed
    run computes what an uninterrupted one does. Raises DataError if no question could be asked on its own picture.
    """
    from tqdm import tqdm

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
        for jobs in pending:
            for result in _answer(jobs, benchmark, pictures, ask, model):
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
    found = []
    for condition in benchmark.conditions:
        jobs: list[Job] = [(question, condition) for question in questions if applies(question, condition)]
        jobs.sort(key=lambda job: (job[0].image is None, len(benchmark.prompt(job[0]))))
        found += [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return found


def _answer(
    jobs: Iterable[Job], benchmark: Benchmark, pictures: Pictures, ask: Ask, model: str
) -> list[Answer | Failure]:
    results: list[Answer | Failure] = []
    ready: list[tuple[Job, Image.Image | None]] = []
    for job in jobs:
        try:
            ready.append((job, pictures.show(*job)))
        except DataError as error:
            results.append(Failure(question_id=job[0].id, condition=job[1], reason=str(error)))
    replies = _ask([(image, benchmark.prompt(as_asked(*job))) for job, image in ready], ask)
    for ((question, condition), _), reply in zip(ready, replies, strict=True):
        if isinstance(reply, MedllavaError):
            results.append(Failure(question_id=question.id, condition=condition, reason=str(reply)))
        else:
            results.append(
                Answer(
                    question_id=question.id, condition=condition, model=model, text=reply.text,
                    finish_reason=reply.finish_reason,
                )
            )
    return results


def _ask(prompts: list[tuple[Image.Image | None, str]], ask: Ask) -> list[Reply | MedllavaError]:
    """Ask a batch; if it is refused as a whole, ask one by one, so that only the refused questions are lost."""
    if not prompts:
        return []
    try:
        return list(ask(prompts))
    except (DataError, ConfigError) as error:
        if len(prompts) == 1:
            return [error]
        return [reply for prompt in prompts for reply in _ask([prompt], ask)]


def _local(path: Path, device: str | None, max_new_tokens: int) -> tuple[Ask, str, dict[str, Any]]:
    """A checkpoint folder loaded in this process."""
    from medllava.conversation import IMAGE_TAG, Turn
    from medllava.eval.provenance import folder_hash
    from medllava.model.answerer import Answerer

    answerer = Answerer.load(path, device=device)

    def ask(batch: Sequence[tuple[Image.Image | None, str]]) -> list[Reply]:
        asked = [
            ([image] if image else [], [Turn(role="user", text=f"{IMAGE_TAG}\n{prompt}" if image else prompt)])
            for image, prompt in batch
        ]
        completions = answerer.answer_batch(asked, max_new_tokens=max_new_tokens, temperature=0.0)
        return [Reply(completion.text, completion.finish_reason) for completion in completions]

    manifest = answerer.manifest.model_dump(mode="json")
    return ask, answerer.model_id, {"model_sha256": folder_hash(path), "manifest": manifest}


def _server(arguments: argparse.Namespace, max_new_tokens: int) -> tuple[Ask, str, dict[str, Any]]:
    """An OpenAI-compatible server. Faults of key, address or model stop the run; a refused question does not."""
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError("openai", "eval", error) from error
    import asyncio

    from medllava.llm.base import RefusedError, Request, Sampling, UnansweredError
    from medllava.llm.openai_api import OpenAIModel, is_loopback, resolve_api_key, resolve_base_url

    url = resolve_base_url(arguments.base_url)
    key = resolve_api_key(url, arguments.api_key_file)
    server = OpenAIModel(url, key, concurrency=arguments.batch, timeout_s=600)
    loop = asyncio.Runner()
    name = arguments.model
    if name is None:
        http = openai.DefaultHttpxClient(trust_env=not is_loopback(url))
        try:
            name = openai.OpenAI(base_url=url, api_key=key, http_client=http).models.list().data[0].id
        except (openai.APIError, IndexError) as error:
            raise ServiceError(f"{url}: no list of models ({error}); check that it runs, or give --model") from error
    sampling = Sampling(temperature=0.0, max_tokens=max_new_tokens)

    async def ask_one(image: Image.Image | None, prompt: str) -> Reply | MedllavaError:
        request = Request(model=name, messages=(_message(image, prompt),), sampling=sampling)
        try:
            reply = await server.ask(request)
        except (RefusedError, UnansweredError) as error:
            return error
        return Reply(reply.text, reply.finish_reason)

    async def ask_all(batch: Sequence[tuple[Image.Image | None, str]]) -> list[Reply | MedllavaError]:
        return await asyncio.gather(*(ask_one(image, prompt) for image, prompt in batch))

    def ask(batch: Sequence[tuple[Image.Image | None, str]]) -> list[Reply | MedllavaError]:
        replies = loop.run(ask_all(batch))
        lost = [reply for reply in replies if isinstance(reply, UnansweredError)]
        if len(lost) == len(replies):
            raise ServiceError(f"{lost[0]}; run the same command again to go on")
        return replies

    return ask, name, {"model_sha256": None, "base_url": url}


def _message(image: Image.Image | None, prompt: str) -> dict[str, Any]:
    """One user message in OpenAI form; the picture comes first, as in training."""
    from medllava.images import to_data_uri

    if image is None:
        return {"role": "user", "content": prompt}
    picture = {"type": "image_url", "image_url": {"url": to_data_uri(image)}}
    return {"role": "user", "content": [picture, {"type": "text", "text": prompt}]}
