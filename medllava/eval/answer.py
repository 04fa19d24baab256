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
import collections
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, DataError, MissingExtraError, ServiceError
from medllava.eval.records import Answer, Condition, Failure, Question

if TYPE_CHECKING:
    from PIL import Image

    from medllava.eval.benchmarks import Benchmark
    from medllava.eval.pictures import Pictures

HELP = "ask a model (a folder or a server) every question, with and without the picture"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What a model said; ``finish_reason`` is "length" if it was cut off."""

    text: str
    finish_reason: str


Ask = Callable[[Sequence[tuple["Image.Image | None", str]]], list[Reply]]
"""(picture or None, prompt) for each question of a batch -> one reply each."""

Job = tuple[Question, Condition]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", required=True, help="name in eval/benchmarks, or path of a YAML definition")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-path", type=Path, help="checkpoint folder, loaded here")
    source.add_argument("--base-url", help="OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="model name at the server (default: the first it lists)")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    parser.add_argument("--questions", type=Path, help="question file, in place of the definition's")
    parser.add_argument("--images", type=Path, help="folder of the pictures, in place of the definition's")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answers")
    parser.add_argument("--batch", type=int, default=8, help="questions at once (at a server: in parallel); default 8")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval import provenance
    from medllava.eval.benchmarks import load_benchmark, questions_hash, read_questions
    from medllava.eval.pictures import Pictures
    from medllava.jsonl import write_records

    if arguments.batch < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ConfigError("--batch and --limit must be at least 1")
    benchmark = load_benchmark(arguments.benchmark)
    source = arguments.questions or benchmark.questions
    if source is None:
        raise ConfigError(f"benchmark {benchmark.name} names no question file; give it with --questions")
    questions = read_questions(source)
    images = arguments.images or benchmark.images or source.parent
    pictures = Pictures(images, questions, benchmark.seed)
    questions = questions[: arguments.limit]
    if arguments.model_path:
        ask, model, details = _local(arguments.model_path, arguments.device, benchmark.max_new_tokens)
    else:
        key = os.environ.get(arguments.api_key_env) or "none"
        ask, model, details = _server(arguments.base_url, arguments.model, key, benchmark.max_new_tokens)
    provenance.start_run(
        arguments.out,
        {
            "benchmark": benchmark.model_dump(mode="json", exclude={"questions", "images"}),
            "model": model,
            **details,
            "questions_sha256": questions_hash(questions),
            "images_sha256": pictures.sha256(),
            "images": str(images.resolve()),
            "decoding": {"temperature": 0.0, "max_new_tokens": benchmark.max_new_tokens},
            "versions": provenance.versions(),
            "command": provenance.command("answer"),
            "date": provenance.now(),
        },
    )
    write_records(arguments.out / "questions.jsonl", questions)
    local = arguments.model_path is not None
    failed = answer_all(
        questions, benchmark, pictures, ask, model, arguments.out,
        batch=arguments.batch if local else 1, workers=1 if local else arguments.batch,
    )
    print(f"{arguments.out / 'answers.jsonl'}: {len(questions)} questions, {len(benchmark.conditions)} conditions")
    if failed:
        print(f"{failed} could not be asked and stay unscored; reasons in {arguments.out / 'failed.jsonl'}")
    return 0


def answer_all(
    questions: Sequence[Question],
    benchmark: Benchmark,
    pictures: Pictures,
    ask: Ask,
    model: str,
    out: Path,
    *,
    batch: int = 8,
    workers: int = 1,
) -> int:
    """Ask what ``out/answers.jsonl`` does not have yet and append it; returns how many could not be asked.

    Batches hold questions of one condition and of similar length, and are the same in every run, so that a resumed
    run computes what an uninterrupted one does. Raises DataError if nothing at all could be asked.
    """
    from tqdm import tqdm

    from medllava.jsonl import Appender, read_records

    path = out / "answers.jsonl"
    done = {(row.question_id, row.condition) for row in read_records(path, Answer)} if path.exists() else set()
    batches = _batches(questions, benchmark, batch)
    pending = [jobs for jobs in batches if any((question.id, condition) not in done for question, condition in jobs)]
    (out / "failed.jsonl").unlink(missing_ok=True)
    failed, last = 0, ""

    def work(jobs: list[Job]) -> list[Answer | Failure]:
        return _answer(jobs, benchmark, pictures, ask, model)

    with (
        Appender(path) as answers,
        Appender(out / "failed.jsonl") as failures,
        tqdm(total=sum(map(len, batches)), desc="answers", unit="", mininterval=0.5) as progress,
    ):
        progress.update(sum(map(len, batches)) - sum(map(len, pending)))
        for results in _in_order(work, pending, workers):
            for result in results:
                if isinstance(result, Failure):
                    log.warning("question %s (%s): %s", result.question_id, result.condition, result.reason)
                    failures.write(result)
                    failed, last = failed + 1, result.reason
                elif (result.question_id, result.condition) not in done:
                    answers.write(result)
            progress.update(len(results))
    if not failed:
        (out / "failed.jsonl").unlink()
    if failed == sum(map(len, batches)):
        raise DataError(f"none of the {failed} questions could be asked; the last one: {last}")
    return failed


def _batches(questions: Sequence[Question], benchmark: Benchmark, size: int) -> list[list[Job]]:
    found = []
    for condition in benchmark.conditions:
        jobs: list[Job] = [(q, condition) for q in questions if condition == "real" or q.image is not None]
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
    results += _ask(ready, benchmark, ask, model)
    return results


def _ask(
    ready: list[tuple[Job, Image.Image | None]], benchmark: Benchmark, ask: Ask, model: str
) -> list[Answer | Failure]:
    """Ask a batch; if it is refused, ask one by one, so that only the refused questions are lost."""
    if not ready:
        return []
    try:
        replies = ask([(image, benchmark.prompt(question)) for (question, _), image in ready])
    except (DataError, ConfigError) as error:
        if len(ready) == 1:
            ((question, condition), _) = ready[0]
            return [Failure(question_id=question.id, condition=condition, reason=str(error))]
        return [result for one in ready for result in _ask([one], benchmark, ask, model)]
    return [
        Answer(
            question_id=question.id, condition=condition, model=model, text=reply.text,
            finish_reason=reply.finish_reason,
        )
        for ((question, condition), _), reply in zip(ready, replies, strict=True)
    ]


def _in_order(
    work: Callable[[list[Job]], list[Answer | Failure]], items: list[list[Job]], workers: int
) -> Iterator[list[Answer | Failure]]:
    """Results in the order of the items, a few items ahead in threads if there is more than one worker."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        running: collections.deque[Future[list[Answer | Failure]]] = collections.deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) >= 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


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


def _server(base_url: str, model: str | None, key: str, max_new_tokens: int) -> tuple[Ask, str, dict[str, Any]]:
    """An OpenAI-compatible server. Connection, key and model faults stop the run; a refused question does not."""
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError("openai", "eval", error) from error
    from medllava.images import to_data_uri

    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=4, timeout=600)
    try:
        name = model or client.models.list().data[0].id
    except (openai.APIError, IndexError) as error:
        raise ServiceError(f"{base_url}: no list of models ({error}); check that it runs, and --base-url") from error

    def ask_one(image: Image.Image | None, prompt: str) -> Reply:
        content: Any = [{"type": "text", "text": prompt}]
        if image:
            content = [{"type": "image_url", "image_url": {"url": to_data_uri(image)}}, *content]
        try:
            reply = client.chat.completions.create(
                model=name, temperature=0.0, max_tokens=max_new_tokens, messages=[{"role": "user", "content": content}]
            )
            choice = reply.choices[0]
        except (openai.APIConnectionError, openai.AuthenticationError, openai.NotFoundError) as error:
            raise ServiceError(f"{base_url}: {error}; run the same command again to go on") from error
        except (openai.APIError, IndexError, TypeError) as error:
            raise DataError(f"the server refused it ({error})") from error
        return Reply(choice.message.content or "", choice.finish_reason)

    def ask(batch: Sequence[tuple[Image.Image | None, str]]) -> list[Reply]:
        return [ask_one(image, prompt) for image, prompt in batch]

    return ask, name, {"model_sha256": None, "base_url": base_url}
