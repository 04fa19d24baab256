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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medllava.instruct_gen.asking import Plan, Trouble

HELP = "grounded captions -> instruction samples, by asking a teacher model"


def configure(parser: argparse.ArgumentParser) -> None:
    from medllava.instruct_gen.endpoint import add_flags

    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    from medllava.instruct_gen.asking import Plan, ask_all
    from medllava.instruct_gen.assemble import write_results
    from medllava.instruct_gen.endpoint import Address, read_captions, read_recipe
    from medllava.instruct_gen.kinds import load_prompts
    from medllava.llm.cache import ReplyCache

    recipe = read_recipe(args)
    plan = Plan(read_captions(args.captions, recipe.max_captions), recipe, load_prompts(recipe))
    address = Address.of(args, recipe)
    if args.dry_run:
        return _dry_run(plan, args.out, address.base_url)
    address.announce(f"what was said in {len(plan.captions)} captions, with box coordinates", recipe.model)
    with ReplyCache(args.out / "replies.jsonl") as cache:
        trouble = address.ask(recipe, cache, lambda model: ask_all(plan, model, cache))
        summary = write_results(plan, cache, trouble, args.out)
    _print_summary(summary, args.out)
    return _exit_code(summary, trouble, args.out)


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
