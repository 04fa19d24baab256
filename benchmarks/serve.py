"""The worker under load: tokens per second alone and together, and many clients that check what they are told.

    python benchmarks/serve.py                       # throughput, then 64 clients for five minutes
    python benchmarks/serve.py --quick               # the same in seconds
    python benchmarks/serve.py --model-path demo-out/stage2 --device cuda

Without --model-path the model is a very small one with random weights. Each client of the second part asks about its
own picture over and over and compares each answer with the one that the picture gets when nobody else asks. The memory
of the worker is measured after a fifth of the time (it is warm then) and at the end. "naive" is one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
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
from record import write_result

from medllava.images import to_data_uri
from medllava.model.checkpoint import load, save_full
from medllava.model.tiny import tiny_checkpoint

OUT = Path(__file__).parent / "results" / "serve.json"
TOGETHER = 16


@contextmanager
def running_worker(path: Path, device: str | None) -> Iterator[tuple[str, int]]:
    """A worker of its own process; yields (URL, process number)."""
    command = [sys.executable, "-m", "medllava.serve.worker", "--model-path", str(path), "--port", "0"]
    command += ["--max-waiting", "256", "--stop-with-stdin", *(["--device", device] if device else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    url = process.stdout.readline().removeprefix("listening on ").strip()
    if not process.stdout.readline().startswith("ready"):
        raise SystemExit("the worker did not start; its own message is above")
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


def resident_mb(pid: int) -> float:
    """Memory of a process, in megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


class Asker:
    """Asks one model, greedily."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self._max_tokens = max_tokens
        self.model = httpx.get(f"{url}/health").json()["model"]

    def _question(self, uri: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What do you see in this image?"}
        ]
        return {
            "model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": self._max_tokens,
            "temperature": 0.0,
        }

    async def whole(self, uri: str) -> tuple[str, int]:
        """(answer, its number of tokens)"""
        reply = await self._client.chat.completions.create(**self._question(uri))
        return reply.choices[0].message.content or "", reply.usage.completion_tokens if reply.usage else 0

    async def streamed(self, uri: str) -> tuple[str, float]:
        """(answer, seconds to its first text)"""
        started = time.monotonic()
        first = None
        text = ""
        async for chunk in await self._client.chat.completions.create(**self._question(uri), stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - started
                text += chunk.choices[0].delta.content
        return text, first or time.monotonic() - started


async def throughput(asker: Asker, requests: int) -> tuple[float, float]:
    """Tokens per second one at a time, and with :data:`TOGETHER` clients."""

    async def rate(clients: int) -> float:
        numbers = iter(range(requests))
        tokens = 0

        async def ask_on() -> None:
            nonlocal tokens
            for number in numbers:
                _, count = await asker.whole(uris[number % len(uris)])
                tokens += count

        started = time.monotonic()
        await asyncio.gather(*(ask_on() for _ in range(clients)))
        return tokens / (time.monotonic() - started)

    uris = [picture(number) for number in range(TOGETHER)]
    await asker.whole(uris[0])
    # Alternating, so that other work on the machine falls on both.
    alone, together = zip(*[(await rate(1), await rate(TOGETHER)) for _ in range(3)], strict=True)
    return sorted(alone)[1], sorted(together)[1]


async def soak(asker: Asker, url: str, pid: int, clients: int, seconds: float) -> dict[str, float]:
    """What many clients see that ask for some time."""
    uris = [picture(1000 + number) for number in range(clients)]
    wanted = [(await asker.whole(uri))[0] for uri in uris]
    started = time.monotonic()
    firsts: list[float] = []
    wrong = faults = 0

    async def ask_on(number: int) -> None:
        nonlocal wrong, faults
        while time.monotonic() - started < seconds:
            try:
                text, first = await asker.streamed(uris[number])
            except openai.OpenAIError:
                faults += 1
                continue
            firsts.append(first)
            wrong += int(text != wanted[number])

    async def memory_when_warm() -> float:
        await asyncio.sleep(seconds / 5)
        return resident_mb(pid)

    warm, *_ = await asyncio.gather(memory_when_warm(), *(ask_on(number) for number in range(clients)))
    growth = (resident_mb(pid) / warm - 1) * 100
    health = httpx.get(f"{url}/health").json()
    firsts.sort()
    return {
        "answers": len(firsts), "wrong": wrong, "faults": faults, "left": health["answering"] + health["waiting"],
        "growth": growth, "different": len(set(wanted)), "median_s": firsts[len(firsts) // 2],
        "late_s": firsts[int(len(firsts) * 0.99)],
    }


def row(
    figure: str, value: float, unit: str, *, limit: str = "", target: float | None = None, naive: float | None = None
) -> dict[str, Any]:
    holds = None if target is None else value >= target if limit == ">=" else value <= target
    return {
        "figure": figure, "value": value, "unit": unit, "limit": limit, "target": target, "holds": holds,
        "baseline": None if naive is None else "naive", "baseline_value": naive,
        "ratio": value / naive if naive else None,
    }


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model-path", type=Path, help="checkpoint folder (default: a tiny one, random weights)")
    options.add_argument("--device")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--seconds", type=float, default=300.0, help="length of the second part (default 300)")
    options.add_argument("--max-tokens", type=int, default=64)
    options.add_argument("--quick", action="store_true", help="few requests and seconds: shows that it runs")
    options.add_argument("--out", type=Path, default=OUT)
    given = options.parse_args(argv)
    requests, seconds = (16, 5.0) if given.quick else (64, given.seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = given.model_path or talkative_checkpoint(Path(folder))
        with running_worker(path, given.device) as (url, pid):
            asker = Asker(url, given.max_tokens)
            alone, together = asyncio.run(throughput(asker, requests))
            seen = asyncio.run(soak(Asker(url, given.max_tokens), url, pid, given.clients, seconds))
    rows = [
        row(f"{TOGETHER} clients", together, "tokens/s", naive=alone),
        row(f"{TOGETHER} clients against one at a time", together / alone, "times", limit=">=", target=3),
        row(f"answers to {given.clients} clients in {seconds:.0f} s", seen["answers"], "answers"),
        row("different right answers", seen["different"], "answers"),
        row("wrong answers", seen["wrong"], "answers", limit="<=", target=0),
        row("requests that failed", seen["faults"], "requests", limit="<=", target=0),
        row("requests left in the worker", seen["left"], "requests", limit="<=", target=0),
        # In a few seconds the worker is not warm.
        row("memory growth once warm", seen["growth"], "%", limit="<=", target=None if given.quick else 5),
        row("first text, median", seen["median_s"], "s"),
        row("first text, slowest of 100", seen["late_s"], "s"),
    ]
    write_result(given.out, rows)
    return int(any(entry["holds"] is False for entry in rows))


if __name__ == "__main__":
    sys.exit(main())
