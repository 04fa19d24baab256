"""Make instruction samples from grounded captions by asking a text model (the teacher).

Only text is sent: the captions' phrases with their boxes. Every reply is kept in OUT/replies.jsonl as it arrives: a run
that was stopped in any way goes on where it was when the same command is given again, and no reply is paid for twice.
When the replies are there, the results are written from them in a fixed order; a run that is finished, and whose files
are as it left them, is told to be so at once:

  samples.jsonl      one sample a line, by caption, then kind, then number
  dropped.jsonl      what did not become a sample: its id, the reason, the raw reply
  case_facts.jsonl   diagnosis and clues per video
  llava.json         all samples as LLaVA JSON; train.json and val.json are the same, divided by video
  questions.jsonl    the narrators' own questions of the val videos, for medllava eval; questions_general.jsonl: those
                     that need no image
  split.json         which video is in which part
  summary.json       the recipe, counts per kind, drops per reason, tokens and money
  finished.json      digests of all these and of what they were made of, once no reply is absent

example:
  python -m medllava.instruct_gen generate --captions out/captions.jsonl --out out \\
      --config instruct_gen/recipes/quilt_instruct.yaml --max-usd 20
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medllava.instruct_gen.asking import Plan, Trouble
    from medllava.instruct_gen.endpoint import Address
    from medllava.llm.cache import ReplyCache

UNDER_WAY = 75
"""Exit code while batches are under way: not an error, not the end (sysexits' "try again later")."""

HELP = "grounded captions -> instruction samples, by asking a teacher model"


def configure(parser: argparse.ArgumentParser) -> None:
    from medllava.instruct_gen.endpoint import add_flags

    add_flags(parser)
    add = parser.add_argument
    add(
        "--pilot", type=int, metavar="N",
        help="ask N samples of each kind, whose replies are kept, and tell from them what the rest takes",
    )
    add(
        "--tokenizer", type=Path, metavar="PATH",
        help="tokenizer.json of a local model, for the prompt tokens that --dry-run tells",
    )
    add(
        "--batch", action="store_true",
        help="through the provider's batch interface: submit what can be asked, collect what has ended; give the same"
        f" command until it ends with 0 (meanwhile {UNDER_WAY})",
    )
    add(
        "--batch-requests", type=int, default=50_000, metavar="N",
        help="with --batch: requests in a file (default: 50000, the most that OpenAI takes); fewer where your account"
        " may have fewer tokens in line",
    )
    add("--wait", action="store_true", help="with --batch: look every minute until all is there")


def run(args: argparse.Namespace) -> int:
    from medllava.errors import ConfigError
    from medllava.instruct_gen.asking import Plan, Trouble, ask_all
    from medllava.instruct_gen.assemble import write_results
    from medllava.instruct_gen.batching import refuse_while_under_way
    from medllava.instruct_gen.endpoint import Address, read_captions, read_recipe, tell_redactions
    from medllava.instruct_gen.finished import is_finished
    from medllava.instruct_gen.kinds import load_prompts
    from medllava.jsonl import read_json
    from medllava.llm.batches import MOST_REQUESTS
    from medllava.llm.cache import ReplyCache

    if not 1 <= args.batch_requests <= MOST_REQUESTS:
        raise ConfigError(f"--batch-requests {args.batch_requests}: expected 1 to {MOST_REQUESTS}")
    recipe = read_recipe(args)
    plan = Plan(read_captions(args, recipe), recipe, load_prompts(recipe))
    address = Address.of(args, recipe)
    if args.dry_run:
        return _dry_run(plan, args, address.base_url)
    if args.pilot is None and not args.batch and is_finished(plan, args.out):
        summary = read_json(args.out / "summary.json")
        print("finished before, and nothing has changed since: no call was made, nothing was written")
        _print_summary(summary, args.out)
        return _exit_code(summary, Trouble(), args.out)
    tell_redactions(plan.captions)
    address.announce(f"what was said in {len(plan.captions)} captions, with box coordinates", recipe.model)
    if args.pilot is not None or not args.batch:
        refuse_while_under_way(args.out)
    if args.pilot is not None:
        return _pilot(plan, address, args)
    with ReplyCache(args.out / "replies.jsonl") as cache:
        if args.batch:
            trouble, said = _batch(plan, cache, address, args)
            if trouble is None:
                print(f"batches are under way: {said}. The same command again goes on")
                return UNDER_WAY
        else:
            trouble = address.ask(recipe, cache, lambda model: ask_all(plan, model, cache))
        summary = write_results(plan, cache, trouble, args.out)
    _print_summary(summary, args.out)
    return _exit_code(summary, trouble, args.out)


def _batch(
    plan: Plan, cache: ReplyCache, address: Address, args: argparse.Namespace
) -> tuple[Trouble | None, str]:
    from medllava.instruct_gen.batching import run_batches
    from medllava.llm.batches import BatchQueue
    from medllava.llm.openai_api import resolve_api_key

    api_key = resolve_api_key(address.base_url, address.api_key_file)
    with (
        address.budget(plan.recipe, cache) or nullcontext() as budget,
        BatchQueue(args.out, cache, address.base_url, api_key, args.batch_requests) as queue,
    ):
        return run_batches(plan, cache, queue, budget, wait=args.wait)


def _dry_run(plan: Plan, args: argparse.Namespace, base_url: str) -> int:
    from medllava.instruct_gen.estimate import estimate_run, report, total
    from medllava.llm.cache import ReplyCache

    path = args.out / "replies.jsonl"
    with ReplyCache(path) if path.exists() else nullcontext(ReplyCache(path)) as cache:
        table = estimate_run(plan, cache, args.tokenizer)
    print("\n".join(report(table, plan.recipe, args.tokenizer, batch=args.batch)))
    print(f"no call was made; a run would send {total(table).calls:,.0f} to {base_url}, model {plan.recipe.model}")
    return 0


def _pilot(plan: Plan, address: Address, args: argparse.Namespace) -> int:
    """A few samples of each kind for real, whose replies are kept; then what the rest takes."""
    from medllava.errors import ServiceError
    from medllava.instruct_gen.asking import ask_pilot
    from medllava.instruct_gen.estimate import estimate_run, report
    from medllava.llm.cache import ReplyCache

    with ReplyCache(args.out / "replies.jsonl") as cache:
        trouble = address.ask(plan.recipe, cache, lambda model: ask_pilot(plan, model, cache, args.pilot))
        table = estimate_run(plan, cache, args.tokenizer)
        kept = len(cache)
    print("\n".join(report(table, plan.recipe, args.tokenizer, batch=args.batch)))
    print(f"{kept:,} replies are kept in {args.out}; the same command without --pilot asks for the rest")
    if trouble.stopped:
        raise ServiceError(f"the pilot was stopped by --max-usd: {trouble.stopped}")
    return 0


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    for title, counts in (("samples", summary["kept"]), ("dropped because", summary["dropped"])):
        if counts:
            print(title)
        for name, count in counts.items():
            print(f"  {name:<24}{count:>9,}")
    money = "" if summary["usd"] is None else f", ${summary['usd']:.2f}"
    tokens = f"{summary['prompt_tokens']:,} + {summary['completion_tokens']:,} tokens"
    print(f"{summary['replies']:,} replies, {tokens}{money} -> {out / 'samples.jsonl'}")
    print(f"see what is in it: python -m medllava.instruct_gen card --data {out} --narrated DIR")


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
