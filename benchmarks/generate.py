"""How close ``generate`` comes to what its endpoint allows, what a request costs, and what many samples take.

    python benchmarks/generate.py [--quick]

The endpoint is a small server on this machine that answers each request after the same time, however many are in
flight. Then no program can be faster than requests x latency / calls in flight: that is the limit. "one by one" is the
same client with one call at a time. The second part gives the command again where all replies are there: once without
the results (nothing is asked; all replies are read, checked, compared with one another, and written as samples), and
once with them (nothing is left to do, which has to be found out).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import arguments, cost_of, finish, row
from synthetic import reply_text, write_captions

RECIPE = """\
model: fixed-latency
prompts: {prompts}
kinds:
{kinds}
sampling: {{temperature: 0, max_tokens: 1024}}
val_fraction: 0.02
"""
ALL_KINDS = "caption conversation description complex_reasoning iterative_abduction grounding"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
SAMPLES = 107_131
"""Samples of Quilt-Instruct."""


def main() -> int:
    parser = arguments(__doc__, "generate")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds that the endpoint takes (default 0.5)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of the finished run (default {SAMPLES})")
    parser.add_argument("--serve", type=float, metavar="LATENCY", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(_serve(given.serve))
        return 0
    with tempfile.TemporaryDirectory() as name:
        rows = _in_flight(Path(name), given) + _resumed(Path(name), 300 if given.quick else given.samples)
    note = (
        f"The endpoint answers each request after {given.latency:g} s. Wall time is that of the asking, from the first"
        " request to the last reply; it begins with 4 calls in flight and doubles with each round of answers"
    )
    return finish(given.out, rows, note)


def _in_flight(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples per second with 1, 8 and 64 calls in flight."""
    latency = 0.05 if given.quick else given.latency
    rows = []
    alone = 0.0
    with endpoint(latency) as url:
        for calls, count in (1, 12), (8, 128), (64, 9600):
            count = min(count, 128) if given.quick else count
            wall_s, cpu_s, tokens = asyncio.run(_ask(folder / f"ask-{calls}", count, calls, url))
            rate, most = count / wall_s, calls / latency
            alone = alone or rate
            rows.append(row(
                f"generate.samples_per_s_{calls}", rate, "samples/s", baseline="one by one", baseline_value=alone,
                limit=most,
            ))
            if calls == 64:
                rows.append(row(
                    "generate.share_of_limit_64", rate / most, "share", baseline="one by one",
                    baseline_value=alone / most, limit=1.0, least=None if given.quick else 0.95,
                ))
                rows.append(row("generate.cpu_per_request", 1000 * cpu_s / count, "ms"))
                rows.append(row("generate.tokens_per_sample", tokens / count, "tokens"))
    return rows


async def _ask(out: Path, count: int, calls: int, url: str) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, tokens) of asking for ``count`` samples of one request each."""
    from medllava.instruct_gen.asking import ask_all
    from medllava.llm.cache import CachedModel, ReplyCache
    from medllava.llm.openai_api import OpenAIModel

    plan = make_plan(out, count, "conversation", calls)
    with ReplyCache(out / "replies.jsonl") as cache:
        endpoint = OpenAIModel(url, concurrency=calls)
        began, cpu = time.perf_counter(), time.process_time()
        trouble = await ask_all(plan, CachedModel(endpoint, cache, endpoint.pace), cache)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        await endpoint.close()
        assert not trouble.failures and len(cache) == endpoint.pace.calls == count, (trouble, endpoint.pace.calls)
        return wall_s, cpu_s, cache.prompt_tokens + cache.completion_tokens


def _resumed(folder: Path, samples: int) -> list[dict[str, Any]]:
    """Seconds and memory of ``generate`` where all replies are there: before its results are, and after."""
    out = folder / "finished"
    captions = -(-samples // len(ALL_KINDS.split()))
    plan = make_plan(out, captions, ALL_KINDS)
    _fill(plan, out)
    with endpoint(0) as url:
        command = [
            "-m", "medllava.instruct_gen", "generate", "--captions", out / "captions.jsonl", "--out", out, "--config",
            out / "recipe.yaml", "--base-url", url,
        ]
        cost = cost_of(command, quiet=True)
        written = (out / "samples.jsonl").stat().st_mtime_ns
        again = cost_of(command, quiet=True)
    if (out / "samples.jsonl").stat().st_mtime_ns != written:
        raise SystemExit("a finished run was made again")
    made = json.loads((out / "summary.json").read_text())
    kept, dropped = sum(made["kept"].values()), made["dropped"]
    if kept < 0.99 * samples:
        raise SystemExit(f"only {kept} of {samples} samples were kept; dropped: {dropped}")
    size = (out / "replies.jsonl").stat().st_size / 2**20
    full = samples >= SAMPLES
    return [
        row("generate.resumed_samples", kept, "samples"),
        row("generate.resumed_replies", made["replies"], "replies"),
        row("generate.resumed_replies_on_disk", size, "MiB"),
        row("generate.bookkeeping_wall", cost.wall_s, "s", most=60 if full else None),
        row("generate.bookkeeping_cpu", cost.cpu_s, "s"),
        row("generate.bookkeeping_peak_memory", cost.peak_mib, "MiB", most=1024),
        row("generate.finished_wall", again.wall_s, "s", most=60 if full else None),
        row("generate.finished_cpu", again.cpu_s, "s"),
        row("generate.finished_peak_memory", again.peak_mib, "MiB", most=1024),
    ]


def make_plan(out: Path, captions: int, kinds: str, calls: int = 16) -> Any:
    """The plan of a run with so many made-up captions, whose files are written into ``out``."""
    from medllava.config import load_recipe
    from medllava.instruct_gen.asking import Plan
    from medllava.instruct_gen.captions import CaptionFile
    from medllava.instruct_gen.kinds import load_prompts
    from medllava.instruct_gen.recipe import GenerateRecipe

    out.mkdir(parents=True)
    write_captions(out / "captions.jsonl", captions)
    prompts = Path(__file__).resolve().parents[1] / "instruct_gen" / "prompts"
    listed = "\n".join(f"  {kind}: {{per_caption: 1}}" for kind in kinds.split())
    (out / "recipe.yaml").write_text(RECIPE.format(prompts=prompts, kinds=listed))
    recipe = load_recipe(out / "recipe.yaml", GenerateRecipe, [f"concurrency={calls}"])
    return Plan(CaptionFile(out / "captions.jsonl"), recipe, load_prompts(recipe))


def _fill(plan: Any, out: Path) -> None:
    """Write the replies of a finished run."""
    from medllava.instruct_gen.asking import read_facts
    from medllava.llm.base import Reply
    from medllava.llm.cache import ReplyCache

    with ReplyCache(out / "replies.jsonl") as cache:

        def drive(steps: Any) -> None:
            try:
                request = next(steps)
                while True:
                    text = reply_text(request.schema_name, "\n".join(part["content"] for part in request.messages))
                    reply = Reply(text=text, model="fixed-latency", prompt_tokens=500, completion_tokens=100)
                    cache.put(request.key(), reply)
                    request = steps.send(reply)
            except StopIteration:
                pass

        for _, steps in plan.facts_by_video():
            drive(steps)
        for task in plan.tasks(dict(read_facts(plan, cache))):
            drive(plan.steps(task))


@contextmanager
def endpoint(latency: float) -> Iterator[str]:
    """A server of its own process that answers each request after ``latency`` seconds; yields its base URL."""
    command = [sys.executable, __file__, "--serve", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


async def _serve(latency: float) -> None:
    """Answer chat completions on a free port for ever: HTTP/1.1 read by hand, which costs this machine least."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                began = time.perf_counter()
                length = next(
                    int(line.partition(b":")[2]) for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                )
                request = json.loads(await reader.readexactly(length))
                body = _answer(request)
                await asyncio.sleep(latency - (time.perf_counter() - began))
                writer.write(_HEAD % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, StopIteration):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=256, limit=2**20)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def _answer(request: dict[str, Any]) -> bytes:
    prompt = "\n".join(message["content"] for message in request["messages"])
    text = reply_text(request["response_format"]["json_schema"]["name"], prompt)
    usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 5}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps({
        "id": "fixed", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice],
        "usage": usage,
    }).encode()


if __name__ == "__main__":
    sys.exit(main())
