"""Replies kept on disk as they arrive, so that no finished call is ever paid for twice."""

from __future__ import annotations

import asyncio
import fcntl
import logging
from functools import partial
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from medllava.errors import ConfigError
from medllava.jsonl import Appender, to_line
from medllava.llm.base import Reply, Request, TextModel
from medllava.llm.budget import Price
from medllava.llm.pace import Pace

log = logging.getLogger(__name__)


class _Line(BaseModel):
    """A line of the file. Read in one go, which takes half of what reading it as JSON first does."""

    key: str
    reply: Reply


class KeptReplies:
    """Replies of a file, read as they are asked for. Can be sent to another process, which opens the file for itself.

    ``offsets``: where in the file the line of each key, as bytes, begins; what is added to it later is found as well.
    """

    def __init__(self, path: Path, offsets: dict[bytes, int]) -> None:
        self.path = path
        self.offsets = offsets
        self._file: IO[bytes] | None = None

    def __reduce__(self) -> tuple[type[KeptReplies], tuple[Path, dict[bytes, int]]]:
        return KeptReplies, (self.path, self.offsets)

    def get(self, key: str) -> Reply | None:
        """The reply kept under ``key``, or None."""
        offset = self.offsets.get(bytes.fromhex(key))
        if offset is None:
            return None
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(offset)
        return _Line.model_validate_json(self._file.readline()).reply

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class ReplyCache:
    """Replies by request key in one append-only JSON Lines file; use as a context manager.

    Each reply reaches the operating system before ``put`` returns, so a killed process loses none; a half-written
    last line is cut off at the next start. Memory holds a key and a file offset per reply, not the replies.
    Raises ConfigError if another process has the file open for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._batch_tokens = [0, 0, 0]
        self.kept = KeptReplies(path, {})
        self._appender = Appender(path)

    def __enter__(self) -> ReplyCache:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.path.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(f"{self.path}: another run is writing here; wait, or choose another --out") from error
        self._appender.__enter__()
        self._end = 0
        unreadable = 0
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    row = _Line.model_validate_json(line)
                    self._remember(row.key, row.reply)
                except ValueError:
                    unreadable += 1
                self._end += len(line)
        if unreadable:
            log.warning("%s: %d unreadable lines; those calls will be made again", self.path, unreadable)
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()
        self._appender.__exit__()
        self._lock.close()

    def __len__(self) -> int:
        return len(self.kept.offsets)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bytes.fromhex(key) in self.kept.offsets

    def get(self, key: str) -> Reply | None:
        """The reply kept under ``key``, or None."""
        return self.kept.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep ``reply`` under ``key``, now."""
        row: dict[str, Any] = {"key": key, "reply": reply.model_dump(mode="json")}
        self._appender.write(row)
        self._remember(key, reply)
        self._end += len(to_line(row).encode())

    def usd(self, price: Price) -> float:
        """What all kept replies cost. Depends on them alone, not on the order in which they came."""
        whole = (self.prompt_tokens, self.completion_tokens, self.cached_tokens)
        live = [total - batch for total, batch in zip(whole, self._batch_tokens, strict=True)]
        return price.usd(*live) + price.usd(*self._batch_tokens, batch=True)

    def _remember(self, key: str, reply: Reply) -> None:
        self.kept.offsets[bytes.fromhex(key)] = self._end
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.cached_tokens += reply.cached_tokens
        if reply.batch:
            tokens = (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens)
            self._batch_tokens = [total + own for total, own in zip(self._batch_tokens, tokens, strict=True)]


class CachedModel:
    """A text model that answers from ``cache`` where it can; equal requests in flight at once become one call."""

    def __init__(self, inner: TextModel, cache: ReplyCache, pace: Pace | None = None) -> None:
        """``pace`` is the endpoint's, for those who show how many calls are in flight."""
        self.inner = inner
        self.cache = cache
        self.pace = pace
        self._pending: dict[str, asyncio.Task[Reply]] = {}

    async def ask(self, request: Request) -> Reply:
        key = request.key()
        kept = self.cache.get(key)
        if kept is not None:
            return kept
        if key not in self._pending:
            task = asyncio.create_task(self._ask(key, request))
            self._pending[key] = task
            task.add_done_callback(partial(self._ended, key))
        return await asyncio.shield(self._pending[key])

    async def drain(self) -> None:
        """Begin no further call and wait for those in flight: what is paid for is kept when a run ends early."""
        if self.pace:
            self.pace.close()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)

    def _ended(self, key: str, task: asyncio.Task[Reply]) -> None:
        self._pending.pop(key, None)
        if not task.cancelled():
            task.exception()  # Seen, also where whoever waited for it was cancelled: asyncio would print a traceback.

    async def _ask(self, key: str, request: Request) -> Reply:
        reply = await self.inner.ask(request)
        self.cache.put(key, reply)
        return reply
