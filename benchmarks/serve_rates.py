"""How fast the worker is: first token, time between tokens, throughput with few and many clients, beside what else
there is for the same checkpoint, and beside what the memory of this machine allows.

    python benchmarks/serve_rates.py [--quick]        # these rows alone; serve.py has them, too

The model has random weights; in full mode it is large enough (11 million parameters) that its own work, not the HTTP
around it, takes the time. "generate of transformers" is the stock class in one process, one question after the other;
"transformers serve" is that program on the same folder. All take one thread, greedy, with answers of equal length. The
limit of one answer after the other is the memory's speed over the bytes of the weights that each token reads; answers
made together share them.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import torch
from PIL import Image
from record import arguments, finish, row, wall_s

from medllava.serve.web import free_port

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
QUESTION = "What do you see in this image?"


@dataclass(frozen=True)
class Timed:
    """A streamed answer: seconds to its first text and what it says, and seconds between the further pieces."""

    first_s: float
    between_s: float
    text: str


def main() -> int:
    parser = arguments(__doc__, "serve_rates")
    given = parser.parse_args()
    return finish(given.out, rates(quick=given.quick))


def rates(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of speed, on a model made for it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path = checkpoint(Path(name) / "model", quick=quick)
        return measured(path, quick=quick)


def measured(path: Path, *, quick: bool) -> list[dict[str, Any]]:
    tokens = 16 if quick else 96
    rounds = 1 if quick else 2
    uris = [picture(number) for number in range(64)]
    bare = Bare(path)
    with worker(path) as ours, transformers_serve(path) as theirs:
        answers = {asyncio.run(_text(url, model, uris[0], 8)) for url, model in (ours, theirs)}
        assert len(answers) == 1, f"not the same answer: {answers}"
        timed: dict[str, list[Timed]] = {"ours": [], "bare": [], "theirs": []}
        serial: list[float] = []
        many: dict[int, list[float]] = {1: [], 4: [], 16: [], 64: []}
        theirs_16: list[float] = []
        # In turns, so that other work on the machine falls on all.
        for number in range(rounds):
            for uri in uris[number * 8 : number * 8 + 8]:
                timed["bare"].append(bare.timed(uri, tokens))
                timed["ours"].append(asyncio.run(_streamed(*ours, uri, tokens)))
                said = timed["bare"][-1].text, timed["ours"][-1].text.strip()
                assert said[1].startswith(said[0]), f"not the same first text: {said}"
                timed["theirs"].append(asyncio.run(_streamed(*theirs, uri, tokens)))
            serial.append(tokens * 4 / wall_s(lambda: [bare.answer(uri, tokens) for uri in uris[:4]]))
            for clients, found in many.items():
                found.append(asyncio.run(throughput(*ours, uris[: max(4, clients)], tokens, clients)))
            theirs_16.append(asyncio.run(throughput(*theirs, uris[:16], tokens, 16)))
    first = {name: statistics.median(one.first_s for one in found) for name, found in timed.items()}
    over_bare = statistics.median(
        one.first_s / other.first_s for one, other in zip(timed["ours"], timed["bare"], strict=True)
    )
    between = {name: statistics.median(one.between_s for one in found) for name, found in timed.items()}
    rate = {clients: statistics.median(found) for clients, found in many.items()}
    alone, other = statistics.median(serial), statistics.median(theirs_16)
    most = memory_bytes_per_s() / bare.bytes_per_token
    sure = None if quick else 1.0
    naive, stock = "generate of transformers, one at a time", "transformers serve"
    rows = [
        row(
            "serve.first_token_1", 1000 * first["ours"], "ms", baseline="bare generate of transformers",
            baseline_value=1000 * first["bare"],
        ),
        row(
            "serve.first_token_over_bare", over_bare, "times", baseline="bare generate of transformers",
            baseline_value=1.0, most=sure and 1.2,
        ),
        row(
            "serve.first_token_transformers_serve", 1000 * first["ours"], "ms", baseline=stock,
            baseline_value=1000 * first["theirs"],
        ),
        row(
            "serve.between_tokens_1", 1000 * between["ours"], "ms", baseline="bare generate of transformers",
            baseline_value=1000 * between["bare"], limit=1000 / most,
        ),
    ]
    for clients, value in rate.items():
        rows.append(row(
            f"serve.tokens_per_s_{clients}", value, "tokens/s", baseline=naive, baseline_value=alone,
            limit=most * min(clients, 16),
        ))
    return [
        *rows,
        row(
            "serve.batch16_over_serial", rate[16] / alone, "times", baseline=naive, baseline_value=1.0, limit=16,
            least=sure and 3.0,
        ),
        row(
            "serve.over_transformers_serve", rate[16] / other, "times", baseline=f"{stock}, 16 clients",
            baseline_value=1.0, least=sure,
        ),
        row("serve.share_of_limit_1", rate[1] / most, "share", baseline=naive, baseline_value=alone / most, limit=1.0),
    ]


def checkpoint(path: Path, *, quick: bool) -> Path:
    """A model with random weights that never ends an answer before it is full."""
    from medllava.model.checkpoint import save_full
    from medllava.model.tiny import TextSizes, VisionSizes, tiny_model

    text = TextSizes() if quick else TextSizes(hidden_size=384, intermediate_size=1056, layers=6, heads=6)
    vision = VisionSizes() if quick else VisionSizes(image_size=192, patch_size=16, hidden_size=192, layers=6)
    model, processor = tiny_model([f"{QUESTION} A gland in the upper left."], text=text, vision=vision)
    with torch.no_grad():
        model.lm_head.weight[model.generation_config.eos_token_id] = 0.0  # never the likeliest
    save_full(path, model, processor, chat_format="medllava")
    return path


def picture(number: int) -> str:
    """A JPEG of a field's usual size that no other number has, as a data URI."""
    noise = np.random.default_rng(number).integers(90, 255, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((640, 480))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Bare:
    """The stock class and its processor, in this process."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self._model = LlavaForConditionalGeneration.from_pretrained(path).eval()
        self._processor = AutoProcessor.from_pretrained(path, backend="pil")
        language = [*self._model.model.language_model.layers.parameters(), *self._model.lm_head.parameters()]
        self.bytes_per_token = sum(part.numel() * part.element_size() for part in language)

    def answer(self, uri: str, tokens: int, **how: Any) -> Any:
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        prompt = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self._processor(images=image, text=prompt, return_tensors="pt")
        return self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **how)

    def timed(self, uri: str, tokens: int) -> Timed:
        times: list[float] = []
        said: list[int] = []

        class Noting:
            """A streamer in the place of one that prints: notes when each token is there."""

            def put(self, ids: Any) -> None:
                times.append(time.perf_counter())
                said.extend(ids.flatten().tolist() if len(times) > 1 else [])  # the first call is with the prompt

            def end(self) -> None:
                pass

        began = time.perf_counter()
        self.answer(uri, tokens, streamer=Noting())
        # The first token that can be shown: random weights begin with spaces and parts of characters, which a server
        # keeps back until there is text.
        shown, text = next((n, text) for n in range(1, len(said) + 1) if (text := self._text(said[:n])))
        return Timed(times[shown] - began, statistics.median(np.diff(times[1:])), text)

    def _text(self, ids: list[int]) -> str:
        text: str = self._processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text.rstrip("\ufffd").strip()


async def _streamed(url: str, model: str, uri: str, tokens: int) -> Timed:
    times: list[float] = []
    texts: list[str] = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        # The connection is there, as it is after a client's first question.
        await client.chat.completions.create(**_question(model, uri, 1))
        began = time.perf_counter()
        async for chunk in await client.chat.completions.create(**_question(model, uri, tokens), stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.perf_counter())
                texts.append(chunk.choices[0].delta.content)
    return Timed(times[0] - began, float(statistics.median(np.diff(times))), texts[0])


async def _text(url: str, model: str, uri: str, tokens: int) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        reply = await client.chat.completions.create(**_question(model, uri, tokens))
    return (reply.choices[0].message.content or "").strip()


async def throughput(url: str, model: str, uris: list[str], tokens: int, clients: int) -> float:
    """Tokens per second where so many clients ask about the pictures, each the next one that is left."""
    left = iter(uris)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def ask_on() -> int:
            made = 0
            for uri in left:
                reply = await client.chat.completions.create(**_question(model, uri, tokens))
                made += reply.usage.completion_tokens if reply.usage else 0
            return made

        began = time.perf_counter()
        made = sum(await asyncio.gather(*(ask_on() for _ in range(clients))))
        return made / (time.perf_counter() - began)


def _question(model: str, uri: str, tokens: int) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0.0}


@contextmanager
def worker(path: Path) -> Iterator[tuple[str, str]]:
    """Our worker; yields (URL, name of the model)."""
    command = [sys.executable, "-m", "medllava.serve.worker", "--model-path", str(path), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-waiting", "256", "--device", "cpu", "--stop-with-stdin"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=ONE_THREAD,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().removeprefix("listening on ").strip()
        if not process.stdout.readline().startswith("ready"):
            raise SystemExit("the worker did not start; its own message is above")
        yield url, path.name
    finally:
        process.stdin.close()
        process.wait(30)


@contextmanager
def transformers_serve(path: Path) -> Iterator[tuple[str, str]]:
    """``transformers serve`` on the folder; yields (URL, name of the model)."""
    port = free_port("127.0.0.1", 0)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(path), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=ONE_THREAD, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until(lambda: httpx.get(f"{url}/health", timeout=2).status_code == 200, process)
        yield url, str(path)
    finally:
        process.terminate()
        process.wait(30)


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            assert process.stderr is not None
            raise SystemExit(f"transformers serve ended: {process.stderr.read()[-1000:]}")
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("transformers serve did not answer for two minutes")


def memory_bytes_per_s() -> float:
    """How fast one thread reads memory: the best of some sums over an array that no cache holds."""
    values = np.ones(64 * 2**20, dtype=np.float32)
    seconds = [wall_s(lambda: float(values.sum())) for _ in range(5)]
    return values.nbytes / min(seconds)


if __name__ == "__main__":
    sys.exit(main())
