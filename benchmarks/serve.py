"""The worker: how fast it is beside others (the rows of serve_rates.py), and then under load, with many clients that
check what they are told.

    python benchmarks/serve.py                       # rates, then 64 clients for a minute
    python benchmarks/serve.py --quick               # the same in seconds
    python benchmarks/serve.py --model-path demo-out/stage2 --questions demo-out/held-out/questions.jsonl --soak 300
    python benchmarks/serve.py --model-path demo-out/stage2 --device cuda

Without --model-path the model is a very small one with random weights, which talks on to its last token. Each client of
the second part asks about its own picture over and over and compares each answer with the one that the picture got when
nobody else asked. The memory and the threads of the worker are counted after a fifth of the time (it is warm then) and
at the end, its open files when few have asked yet and when all have left. "overtaken" counts requests that got their
first token after one that arrived later, as the worker's log has it. The baseline of the throughput is one request at a
time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from PIL import Image
from record import finish, row
from serve_rates import rates

from medllava.images import load_image, to_data_uri
from medllava.model.checkpoint import load, save_full
from medllava.model.tiny import tiny_checkpoint

OUT = Path(__file__).parent / "results" / "serve.json"
TOGETHER = 16
ROUNDED_S = 0.002
"""Times in the log are rounded to thousandths of a second."""

Question = tuple[str, str]
"""A picture as a data URI, and the text."""


@contextmanager
def running_worker(path: Path, device: str | None, log: Path) -> Iterator[tuple[str, int]]:
    """A worker of its own process, which logs to a file; yields (URL, process number)."""
    command = [sys.executable, "-m", "medllava.serve.worker", "--model-path", str(path), "--port", "0"]
    command += ["--max-waiting", "256", "--stop-with-stdin", "--log-json", *(["--device", device] if device else [])]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdin is not None and process.stdout is not None
    url = process.stdout.readline().removeprefix("listening on ").strip()
    if not process.stdout.readline().startswith("ready"):
        raise SystemExit(f"the worker did not start:\n{log.read_text()}")
    try:
        yield url, process.pid
    finally:
        process.stdin.close()
        process.wait(30)


def talkative_checkpoint(path: Path) -> Path:
    """A very small model with random weights whose answers end at ``max_tokens`` and no sooner."""
    loaded = load(tiny_checkpoint(path / "tiny"), device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight[loaded.tokenizer.eos_token_id] = 0.0  # never the likeliest of 700
    save_full(path / "talkative", loaded.model, loaded.processor, chat_format="medllava")
    return path / "talkative"


def picture(number: int) -> str:
    """A picture that no other client has, as a data URI."""
    dice = random.Random(number)
    image = Image.new("RGB", (dice.randrange(100, 300), dice.randrange(100, 300)), (225, 180, 205))
    for _ in range(40):
        x, y = dice.randrange(image.width), dice.randrange(image.height)
        colour = (dice.randrange(256), dice.randrange(256), dice.randrange(256))
        image.paste(colour, (x, y, x + dice.randrange(5, 90), y + dice.randrange(5, 90)))
    return to_data_uri(image)


def own_questions(count: int) -> list[Question]:
    """Questions about pictures that no other client has."""
    return [(picture(1000 + number), "What do you see in this image?") for number in range(count)]


def questions_of(path: Path, images: Path, count: int) -> list[Question]:
    """``count`` questions of a benchmark's file, about different pictures; those for a box first, whose answers differ
    most."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows.sort(key=lambda row: row["kind"] != "box")
    chosen = list({row["image"]: row for row in reversed(rows)}.values())
    chosen.sort(key=lambda row: row["kind"] != "box")
    if len(chosen) < count:
        raise SystemExit(f"{path}: {len(chosen)} pictures for {count} clients")
    return [(to_data_uri(load_image(images / row["image"])), row["question"]) for row in chosen[:count]]


def status_of(pid: int, name: str) -> int:
    """A figure of /proc/PID/status: VmRSS in KiB, Threads, ..."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def in_flight(url: str) -> float:
    """Requests in line or being answered, as /metrics says."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("medllava_requests_waiting ", "medllava_requests_answering ")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


class Asker:
    """Asks one model, greedily."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self._max_tokens = max_tokens
        self.model = httpx.get(f"{url}/health").json()["model"]

    def _request(self, question: Question) -> dict[str, Any]:
        uri, text = question
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
        return {
            "model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": self._max_tokens,
            "temperature": 0.0,
        }

    async def whole(self, question: Question) -> tuple[str, int]:
        """(answer, its number of tokens)"""
        reply = await self._client.chat.completions.create(**self._request(question))
        return reply.choices[0].message.content or "", reply.usage.completion_tokens if reply.usage else 0

    async def streamed(self, question: Question) -> tuple[str, float]:
        """(answer, when its first text came)"""
        first = None
        text = ""
        async for chunk in await self._client.chat.completions.create(**self._request(question), stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic()
                text += chunk.choices[0].delta.content
        return text, first or time.monotonic()

    async def leave(self) -> None:
        await self._client.close()


async def throughput(asker: Asker, questions: list[Question], requests: int) -> tuple[float, float]:
    """Tokens per second one at a time, and with :data:`TOGETHER` clients."""

    async def rate(clients: int) -> float:
        numbers = iter(range(requests))
        tokens = 0

        async def ask_on() -> None:
            nonlocal tokens
            for number in numbers:
                _, count = await asker.whole(questions[number % len(questions)])
                tokens += count

        started = time.monotonic()
        await asyncio.gather(*(ask_on() for _ in range(clients)))
        return tokens / (time.monotonic() - started)

    await asker.whole(questions[0])
    # Alternating, so that other work on the machine falls on both.
    alone, together = zip(*[(await rate(1), await rate(TOGETHER)) for _ in range(3)], strict=True)
    await asker.leave()
    return sorted(alone)[1], sorted(together)[1]


async def soak(asker: Asker, url: str, pid: int, questions: list[Question], seconds: float) -> dict[str, float]:
    """What many clients see that ask for some time, and what is left in the worker of it."""
    wanted = [(await asker.whole(question))[0] for question in questions]
    files = open_files(pid)
    started = time.monotonic()
    waits: list[float] = []
    wrong = faults = 0

    async def ask_on(number: int) -> None:
        nonlocal wrong, faults
        while time.monotonic() - started < seconds:
            sent = time.monotonic()
            try:
                text, first = await asker.streamed(questions[number])
            except openai.OpenAIError as error:
                faults += 1
                print(f"client {number}: {error}", file=sys.stderr)
                continue
            waits.append(first - sent)
            if text != wanted[number]:
                wrong += 1
                print(f"client {number}: {text!r} in place of {wanted[number]!r}", file=sys.stderr)

    async def when_warm() -> tuple[int, int]:
        await asyncio.sleep(seconds / 5)
        return status_of(pid, "VmRSS"), status_of(pid, "Threads")

    (warm, threads), *_ = await asyncio.gather(when_warm(), *(ask_on(number) for number in range(len(questions))))
    growth = (status_of(pid, "VmRSS") / warm - 1) * 100
    await asker.leave()
    await asyncio.sleep(2)
    waits.sort()
    return {
        "answers": len(waits), "wrong": wrong, "faults": faults, "left": in_flight(url), "growth": growth,
        "different": len(set(wanted)), "median_s": waits[len(waits) // 2], "late_s": waits[int(len(waits) * 0.99)],
        "threads": status_of(pid, "Threads") - threads, "files": open_files(pid) - files,
        "memory": warm / 1024,
    }


def overtaken(log: Path) -> int:
    """How many requests got their first token after one that had arrived later."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    calls = [line for line in lines if "first_token_s" in line]
    times = sorted((call["at"] + call["received_s"], call["at"] + call["first_token_s"]) for call in calls)
    count = 0
    later, earliest = len(times), float("inf")
    for arrived, first in reversed(times):
        while times[later - 1][0] > arrived + ROUNDED_S:
            later -= 1
            earliest = min(earliest, times[later][1])
        count += first > earliest + ROUNDED_S
    return count


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model-path", type=Path, help="checkpoint folder (default: a tiny one, random weights)")
    options.add_argument("--device")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--questions", type=Path, help="questions.jsonl of a benchmark (default: made-up pictures)")
    options.add_argument("--images", type=Path, help="where its pictures are (default: narrated/ beside it)")
    options.add_argument("--soak", type=float, default=60.0, help="seconds of the second part (default 60)")
    options.add_argument("--max-tokens", type=int, default=64)
    options.add_argument("--quick", action="store_true", help="few requests and seconds: shows that it runs")
    options.add_argument("--out", type=Path, default=OUT)
    given = options.parse_args(argv)
    requests, seconds = (16, 5.0) if given.quick else (64, given.soak)
    if given.questions:
        images = given.images or given.questions.parent / "narrated"
        questions = questions_of(given.questions, images, given.clients)
    else:
        questions = own_questions(given.clients)
    speed = rates(quick=given.quick)
    with tempfile.TemporaryDirectory() as folder:
        path = given.model_path or talkative_checkpoint(Path(folder))
        log = Path(folder) / "worker.log"
        with running_worker(path, given.device, log) as (url, pid):
            alone, together = asyncio.run(throughput(Asker(url, given.max_tokens), questions, requests))
            seen = asyncio.run(soak(Asker(url, given.max_tokens), url, pid, questions, seconds))
        passed = overtaken(log)
    ratio = together / alone
    rows = [
        *speed,
        row(
            f"serve.soak_tokens_per_s_{TOGETHER}", together, "tokens/s", baseline="one at a time", baseline_value=alone
        ),
        # Without a target in a quick run: it is too short for figures of speed and memory.
        row(f"serve.soak_batch{TOGETHER}_over_serial", ratio, "times", least=None if given.quick else 3),
        row(f"serve.answers_to_{given.clients}_in_{seconds:.0f}_s", seen["answers"], "answers"),
        row("serve.different_right_answers", seen["different"], "answers"),
        row("serve.wrong_answers", seen["wrong"], "answers", most=0),
        row("serve.failed_requests", seen["faults"], "requests", most=0),
        row("serve.overtaken_requests", passed, "requests", most=0),
        row("serve.left_in_worker", seen["left"], "requests", most=0),
        row("serve.threads_left", seen["threads"], "threads", most=None if given.quick else 0),
        row("serve.files_left", seen["files"], "files", most=0),
        row("serve.memory_once_warm", seen["memory"], "MiB"),
        row("serve.memory_growth", seen["growth"], "%", most=None if given.quick else 5),
        row("serve.first_text_median", seen["median_s"], "s"),
        row("serve.first_text_slowest_of_100", seen["late_s"], "s"),
    ]
    what = f"{given.questions.name} of a trained demo" if given.questions else "made-up pictures"
    return finish(given.out, rows, f"Model: {given.model_path.name if given.model_path else 'tiny'}; questions: {what}")


if __name__ == "__main__":
    sys.exit(main())
