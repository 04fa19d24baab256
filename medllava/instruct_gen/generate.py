"""Make instruction samples from grounded captions by asking a text model (the teacher).

Only text is sent: the captions' phrases with their boxes. Every reply is kept in OUT/replies.jsonl as it arrives: a run
that was stopped in any way goes on where it was when the same command is given again, and no reply is paid for twice.
When the replies are there, the results are written from them in a fixed order:

  samples.jsonl      one sample a line, by caption, then kind, then number
  dropped.jsonl      what did not become a sample: its id, the reason, the raw reply
  case_facts.jsonl   diagnosis and clues per video
  llava.json         all samples as LLaVA JSON; train.json and val.json are the same, divided by video
  split.json         which video is in which part
  summary.json       the recipe, counts per kind, drops per reason, tokens and money

example:
  python -m medllava.instruct_gen generate --captions out/captions.jsonl --out out \\
      --config instruct_gen/recipes/quilt_instruct.yaml --max-usd 20
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medllava.instruct_gen.asking import Plan, Trouble
    from medllava.instruct_gen.recipe import GenerateRecipe
    from medllava.instruct_gen.records import GroundedCaption
    from medllava.llm.cache import ReplyCache

HELP = "grounded captions -> instruction samples, by asking a teacher model"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--captions", type=Path, required=True, metavar="FILE", help="captions.jsonl from narrate")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results and the kept replies")
    add("--config", type=Path, required=True, metavar="RECIPE", help="YAML recipe")
    add("--base-url", metavar="URL", help="OpenAI-compatible endpoint (default: OPENAI_BASE_URL, else OpenAI's)")
    add("--api-key-file", type=Path, metavar="FILE", help="file with the API key (default: OPENAI_API_KEY)")
    add("--model", help="the teacher's name at the endpoint (default: the recipe's)")
    add("--concurrency", type=int, metavar="N", help="calls in flight at once (default: the recipe's)")
    add("--dry-run", action="store_true", help="print calls, tokens and money; make no call, write nothing")
    add(
        "--max-usd", type=float, metavar="X",
        help="stop before the replies of this folder, earlier runs included, cost more than X dollars",
    )
    add("--seed", type=int, metavar="S", help="seed of the split and of all choices (default: the recipe's)")
    add("overrides", nargs="*", metavar="key=value", help="change a key of the recipe")


def run(args: argparse.Namespace) -> int:
    import asyncio

    from medllava.errors import ConfigError
    from medllava.instruct_gen.asking import Plan
    from medllava.instruct_gen.assemble import write_results
    from medllava.instruct_gen.kinds import load_prompts
    from medllava.llm.cache import ReplyCache
    from medllava.llm.openai_api import is_loopback, resolve_api_key, resolve_base_url

    recipe = _read_recipe(args)
    plan = Plan(_read_captions(args.captions, recipe.max_captions), recipe, load_prompts(recipe))
    base_url = resolve_base_url(args.base_url)
    if args.max_usd is not None and recipe.usd_per_million is None:
        raise ConfigError(f"{args.config}: --max-usd needs the price, usd_per_million: {{input: ..., output: ...}}")
    if args.dry_run:
        return _dry_run(plan, args.out, base_url)
    api_key = resolve_api_key(base_url, args.api_key_file)
    if is_loopback(base_url):
        _check_listening(base_url)
    else:
        print(
            f"notice: what was said in {len(plan.captions)} captions, with box coordinates (no image, no video, no file"
            f" name) will be sent to {base_url}, model {recipe.model}",
            file=sys.stderr,
        )
    with ReplyCache(args.out / "replies.jsonl") as cache:
        trouble = asyncio.run(_ask(plan, cache, base_url, api_key, args.max_usd))
        summary = write_results(plan, cache, trouble, args.out)
    _print_summary(summary, args.out)
    return _exit_code(summary, trouble, args.out)


async def _ask(plan: Plan, cache: ReplyCache, base_url: str, api_key: str, max_usd: float | None) -> Trouble:
    from medllava.instruct_gen.asking import ask_all
    from medllava.llm.base import TextModel
    from medllava.llm.budget import BudgetedModel
    from medllava.llm.cache import CachedModel
    from medllava.llm.openai_api import OpenAIModel

    price = plan.recipe.usd_per_million
    endpoint = OpenAIModel(base_url, api_key, concurrency=plan.recipe.concurrency)
    model: TextModel = endpoint
    if max_usd is not None and price is not None:
        model = BudgetedModel(endpoint, price, max_usd, price.usd(cache.prompt_tokens, cache.completion_tokens))
    cached = CachedModel(model, cache)
    try:
        return await ask_all(plan, cached, cache)
    finally:
        await cached.drain()
        await endpoint.close()


def _read_recipe(args: argparse.Namespace) -> GenerateRecipe:
    from medllava.config import load_recipe
    from medllava.instruct_gen.recipe import GenerateRecipe

    flags = {"model": args.model, "concurrency": args.concurrency, "seed": args.seed}
    overrides = [*args.overrides, *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    recipe = load_recipe(args.config, GenerateRecipe, overrides)
    return recipe.model_copy(update={"prompts": args.config.parent / recipe.prompts})


def _read_captions(path: Path, most: int | None) -> list[GroundedCaption]:
    from itertools import islice

    from medllava.errors import DataError
    from medllava.instruct_gen.records import GroundedCaption
    from medllava.jsonl import read_records

    captions = list(islice(read_records(path, GroundedCaption), most))
    if not captions:
        raise DataError(f"{path}: no captions in it; make some with: python -m medllava.instruct_gen narrate")
    repeated = [id for id, count in Counter(caption.id for caption in captions).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: the id {repeated[0]!r} occurs more than once; ids must be unique")
    return captions


def _check_listening(base_url: str) -> None:
    """Find out at once, instead of after all retries, that a server on this machine was not started."""
    import socket
    from urllib.parse import urlsplit

    from medllava.errors import ServiceError

    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ServiceError(f"{base_url}: nothing answers there ({error.strerror or error}); start it first") from error


def _dry_run(plan: Plan, out: Path, base_url: str) -> int:
    from medllava.instruct_gen.estimate import estimate_run
    from medllava.llm.cache import ReplyCache

    path = out / "replies.jsonl"
    if path.exists():
        with ReplyCache(path) as cache:
            table = estimate_run(plan, cache)
    else:
        table = estimate_run(plan, ReplyCache(path))
    price = plan.recipe.usd_per_million
    print(f"{'kind':<22}{'answered':>10}{'calls':>10}{'prompt tokens':>15}{'reply tokens':>14}{'dollars':>10}")
    totals = [0, 0, 0, 0]
    for name, row in table.items():
        numbers = [row.answered, row.calls, row.prompt_tokens, row.completion_tokens]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        _print_estimate(name, numbers, price.usd(*numbers[2:]) if price else None)
    _print_estimate("total", totals, price.usd(*totals[2:]) if price else None)
    print(f"no call was made; a run would send {totals[1]:,} to {base_url}, model {plan.recipe.model}")
    return 0


def _print_estimate(name: str, numbers: list[int], usd: float | None) -> None:
    answered, calls, prompt_tokens, completion_tokens = numbers
    money = "unpriced" if usd is None else f"{usd:.2f}"
    print(f"{name:<22}{answered:>10,}{calls:>10,}{prompt_tokens:>15,}{completion_tokens:>14,}{money:>10}")


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    for title, counts in (("samples", summary["kept"]), ("dropped because", summary["dropped"])):
        if counts:
            print(title)
        for name, count in counts.items():
            print(f"  {name:<24}{count:>9,}")
    money = "" if summary["usd"] is None else f", ${summary['usd']:.2f}"
    tokens = f"{summary['prompt_tokens']:,} + {summary['completion_tokens']:,} tokens"
    print(f"{summary['replies']:,} replies, {tokens}{money} -> {out / 'samples.jsonl'}")


def _exit_code(summary: dict[str, Any], trouble: Trouble, out: Path) -> int:
    from medllava.errors import DataError, ServiceError

    absent = summary["dropped"].get("not asked", 0) + summary["dropped"].get("no reply", 0)
    if trouble.stopped:
        raise ServiceError(
            f"stopped by --max-usd: {trouble.stopped}. {absent} samples are not there yet;"
            " a run with a larger limit goes on"
        )
    if absent:
        why = next((reason for reason in trouble.failures.values() if reason.startswith("no reply")), "")
        raise ServiceError(f"{absent} samples got no reply ({why}); the same command again asks only for those")
    if not any(summary["kept"].values()):
        raise DataError(f"{out}: not one sample was made; the reasons are in {out / 'dropped.jsonl'}")
    return 0
