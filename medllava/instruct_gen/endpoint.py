"""What the commands that ask a text model share: their flags, their recipe and captions, the way to the endpoint."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from medllava.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from medllava.instruct_gen.captions import CaptionFile
    from medllava.instruct_gen.concepts import Vocabulary
    from medllava.instruct_gen.recipe import GenerateRecipe
    from medllava.llm.budget import Budget
    from medllava.llm.cache import CachedModel, ReplyCache

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that asks a text model about captions."""
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
    add(
        "--redact", action="store_true",
        help="put [NAME], [DATE], [PHONE], [EMAIL], [NUMBER] for these in what was said, before anything is sent",
    )
    add(
        "--redact-model", metavar="NAME_OR_DIR",
        help="spaCy model that finds names too, for example en_core_web_lg (without: titles, introductions, lists)",
    )
    add(
        "--vocabulary", type=Path, metavar="TSV",
        help="terms: what may be corrected to, and which names are eponyms (default: vocabulary/histopathology.tsv"
        " beside the recipe's prompts)",
    )
    add("overrides", nargs="*", metavar="key=value", help="change a key of the recipe")


def read_recipe(args: argparse.Namespace) -> GenerateRecipe:
    """The recipe with the flags' values in it; its ``prompts`` is a path as the process sees it."""
    from medllava.config import load_recipe
    from medllava.instruct_gen.recipe import GenerateRecipe

    flags = {"model": args.model, "concurrency": args.concurrency, "seed": args.seed}
    overrides = [*args.overrides, *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    recipe = load_recipe(args.config, GenerateRecipe, overrides)
    return recipe.model_copy(update={"prompts": args.config.parent / recipe.prompts})


def read_vocabulary(args: argparse.Namespace, recipe: GenerateRecipe) -> Vocabulary:
    """The vocabulary of the flag, or the one that lies beside the recipe's prompts."""
    from medllava.instruct_gen.concepts import Vocabulary

    path = args.vocabulary or recipe.prompts.parent / "vocabulary" / "histopathology.tsv"
    if args.vocabulary is None and not path.is_file():
        raise ConfigError(f"{path}: no such vocabulary; name yours with --vocabulary")
    return Vocabulary.read(path)


def read_captions(
    args: argparse.Namespace, recipe: GenerateRecipe, vocabulary: Vocabulary | None = None
) -> CaptionFile:
    """The captions of the flag, read as they are needed, and redacted if that is asked for."""
    from medllava.instruct_gen.captions import CaptionFile

    if not (args.redact or args.redact_model):
        return CaptionFile(args.captions, recipe.max_captions)
    from medllava.instruct_gen.redact import RedactedFile, Redactor

    redactor = Redactor(vocabulary or read_vocabulary(args, recipe), args.redact_model)
    return RedactedFile(args.captions, recipe.max_captions, redactor)


def tell_redactions(captions: CaptionFile) -> None:
    """Print what was taken out of the captions, if anything was to be."""
    from medllava.instruct_gen.redact import RedactedFile

    if isinstance(captions, RedactedFile):
        found = captions.counted()
        print("redacted: " + (", ".join(f"{count:,} {label}" for label, count in found.items()) or "nothing found"))


@dataclass(frozen=True)
class Address:
    """Where the calls go, and what they may cost."""

    base_url: str
    api_key_file: Path | None
    max_usd: float | None

    @classmethod
    def of(cls, args: argparse.Namespace, recipe: GenerateRecipe) -> Address:
        from medllava.llm.openai_api import resolve_base_url

        if args.max_usd is not None and recipe.usd_per_million is None:
            raise ConfigError(
                f"{args.config}: --max-usd needs the price, usd_per_million: {{input: ..., output: ...}}"
            )
        return cls(resolve_base_url(args.base_url), args.api_key_file, args.max_usd)

    def announce(self, what: str, model: str) -> None:
        """Say what will leave this machine, and where it goes; a server on this machine must be listening."""
        from medllava.llm.openai_api import is_loopback, resolve_api_key

        resolve_api_key(self.base_url, self.api_key_file)
        if is_loopback(self.base_url):
            self._check_listening()
        else:
            print(
                f"notice: {what} (no image, no video, no file name) will be sent to {self.base_url}, model {model}",
                file=sys.stderr,
            )

    def ask(
        self, recipe: GenerateRecipe, cache: ReplyCache, work: Callable[[CachedModel], Awaitable[Result]]
    ) -> Result:
        """What ``work`` makes of a model behind the budget that keeps its replies in ``cache``."""
        return asyncio.run(self._ask(recipe, cache, work))

    def budget(self, recipe: GenerateRecipe, cache: ReplyCache) -> Budget | None:
        """The money for calls whose replies go to ``cache``, None where the recipe has no price."""
        from medllava.llm.budget import Budget

        price = recipe.usd_per_million
        if price is None:
            return None
        # Kept also without a limit: a later run with one must know what this one may have cost.
        ledger = cache.path.with_suffix(".sent.jsonl")
        return Budget(price, self.max_usd, replies_usd=cache.usd(price), ledger=ledger, answered=cache)

    async def _ask(
        self, recipe: GenerateRecipe, cache: ReplyCache, work: Callable[[CachedModel], Awaitable[Result]]
    ) -> Result:
        from medllava.llm.cache import CachedModel
        from medllava.llm.openai_api import OpenAIModel, resolve_api_key

        api_key = resolve_api_key(self.base_url, self.api_key_file)
        with self.budget(recipe, cache) or nullcontext() as budget:
            endpoint = OpenAIModel(self.base_url, api_key, concurrency=recipe.concurrency, budget=budget)
            cached = CachedModel(endpoint, cache, endpoint.pace)
            try:
                return await work(cached)
            finally:
                await cached.drain()
                await endpoint.close()
                if budget and budget.lost_usd:
                    log.warning(
                        "calls whose answers were lost on the way may have cost up to $%.4f more than the replies kept",
                        budget.lost_usd,
                    )

    def _check_listening(self) -> None:
        """Find out at once, instead of after all retries, that a server on this machine was not started."""
        parts = urlsplit(self.base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
        except OSError as error:
            raise ServiceError(
                f"{self.base_url}: nothing answers there ({error.strerror or error}); start it first"
            ) from error
