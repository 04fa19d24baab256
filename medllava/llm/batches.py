"""The provider's batch interface (OpenAI's ``/v1/batches`` and those like it): cheaper, and answered within a day.

Requests are uploaded as a file and collected in a later run. What is under way is in an append-only state file, written
before each step that cannot be taken back, and each batch carries a tag by which it is found again at the provider: a
run that is killed at any moment submits nothing twice.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai

from medllava.errors import ServiceError
from medllava.jsonl import Appender, read_rows, to_line
from medllava.llm.base import Reply, Request
from medllava.llm.budget import Price
from medllava.llm.cache import ReplyCache
from medllava.llm.openai_api import chat_body, is_loopback, to_reply

log = logging.getLogger(__name__)

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000
"""Of one batch; OpenAI takes 50,000 requests in 200 MB."""

QUEUE_FULL = "token_limit_exceeded"
"""Code of the fault of a batch that was rejected because others hold all tokens that an account may have in line."""

_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_AGAIN = frozenset({408, 409, 429})


@dataclass
class Job:
    """One batch. ``most_usd`` is what it can cost at most, which is held back while it is under way."""

    tag: str
    keys: tuple[bytes, ...]
    most_usd: float
    file_id: str | None = None
    batch_id: str | None = None
    ended: str | None = None


@dataclass
class Progress:
    """Where the batches under way are: requests answered and failed so far, of how many."""

    answered: int = 0
    failed: int = 0
    requests: int = 0
    statuses: list[str] = field(default_factory=list)


class BatchQueue:
    """Batches of one output folder; replies are kept in ``cache``. Use as a context manager.

    ``folder`` holds ``batches.jsonl`` (the state) and the files to upload; a batch has at most ``most_requests``.
    """

    def __init__(
        self, folder: Path, cache: ReplyCache, base_url: str, api_key: str, most_requests: int = MOST_REQUESTS
    ) -> None:
        self.folder = folder
        self.cache = cache
        self.base_url = base_url
        self.most_requests = most_requests
        self.refused: dict[str, str] = {}
        """Requests that the provider will not answer, by key, and why."""
        self.jobs = {job.tag: job for job in read_jobs(folder, self.refused)}
        self._state = Appender(folder / "batches.jsonl")
        http = openai.DefaultHttpxClient(trust_env=not is_loopback(base_url))
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=6, http_client=http)
        # A batch whose creation got no answer may exist: it must be looked for, not created again.
        self._once = self._client.with_options(max_retries=0)

    def __enter__(self) -> BatchQueue:
        self._state.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._state.__exit__()
        self._client.close()

    @property
    def under_way(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.ended]

    def waiting_keys(self) -> set[bytes]:
        return {key for job in self.under_way for key in job.keys}

    def submit(self, requests: Iterable[Request], price: Price | None, room_usd: float | None) -> tuple[int, bool]:
        """Send what is not under way, as far as ``room_usd`` lets (None: all). Returns how many, and whether all."""
        sent, waiting = 0, self.waiting_keys()
        rows: list[str] = []
        keys: list[bytes] = []
        size, most_usd = 0, 0.0
        for request in requests:
            key = bytes.fromhex(request.key())
            if key in waiting:
                continue
            usd = price.most(request, batch=True) if price else 0.0
            if room_usd is not None:
                if usd > room_usd:
                    self._begin(rows, keys, most_usd)
                    return sent + len(keys), False
                room_usd -= usd
            row = to_line(_row(request))
            if len(rows) == self.most_requests or size + len(row.encode()) > MOST_BYTES:
                self._begin(rows, keys, most_usd)
                sent += len(keys)
                rows, keys, size, most_usd = [], [], 0, 0.0
            waiting.add(key)
            rows.append(row)
            keys.append(key)
            size, most_usd = size + len(row.encode()), most_usd + usd
        self._begin(rows, keys, most_usd)
        return sent + len(keys), True

    def resume(self) -> None:
        """Finish submitting what an earlier run began."""
        known = {job.tag for job in self.under_way}
        for left in (self.folder / "batches").glob("*"):
            if left.stem not in known:  # of a run that was killed while it uploaded
                left.unlink()
        for job in self.under_way:
            if job.batch_id is None:
                job.batch_id = self._find(job)
                self._submit(job)

    def collect(self) -> Progress:
        """Keep the replies of batches that have ended; tell where the others are.

        Raises ServiceError where the provider rejected a whole batch; its requests are open again. A batch that only
        has to wait until others have ended is no error: its requests are sent again then.
        """
        progress = Progress()
        for job in self.under_way:
            batch = self._ask(partial(self._client.batches.retrieve, job.batch_id or ""), self._if_gone(job))
            if batch.status in _ENDED:
                self._end(job, batch)
                continue
            counts = batch.request_counts
            progress.requests += len(job.keys)
            progress.answered += counts.completed if counts else 0
            progress.failed += counts.failed if counts else 0
            progress.statuses.append(batch.status)
        return progress

    def _begin(self, rows: list[str], keys: list[bytes], most_usd: float) -> None:
        if not rows:
            return
        job = Job(f"medllava-{uuid.uuid4().hex}", tuple(keys), most_usd)
        file = self._file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows), encoding="utf-8")
        # Only batches are paid: as long as there is no more than an upload, or two of them, nothing is under way.
        job.file_id = self._upload(job)
        in_hex = [key.hex() for key in keys]
        self._note(job, event="begun", most_usd=most_usd, keys=in_hex, file_id=job.file_id)
        self.jobs[job.tag] = job
        self._submit(job)

    def _upload(self, job: Job) -> str:
        with self._file(job).open("rb") as file:
            uploaded = self._ask(lambda: self._client.files.create(file=(f"{job.tag}.jsonl", file), purpose="batch"))
        return str(uploaded.id)

    def _submit(self, job: Job) -> None:
        if job.batch_id is None:
            job.file_id = job.file_id or self._upload(job)
            try:
                created = self._ask(
                    lambda: self._once.batches.create(
                        input_file_id=job.file_id or "", endpoint="/v1/chat/completions", completion_window="24h",
                        metadata={"medllava": job.tag},
                    )
                )
            except ServiceError as error:
                if _is_refusal(error.__cause__):  # There is no such batch, and its requests are open again.
                    self._note(job, event="ended", status="refused", replies=0, refused={})
                    job.ended = "refused"
                raise
            job.batch_id = created.id
        self._note(job, event="submitted", batch_id=job.batch_id)

    def _find(self, job: Job) -> str | None:
        """The batch that a run which did not live to note it has made, if there is one."""

        def look() -> str | None:
            for batch in self._client.batches.list(limit=100):
                if (batch.metadata or {}).get("medllava") == job.tag or batch.input_file_id == job.file_id:
                    return batch.id
            return None

        found: str | None = self._ask(look)
        return found

    def _end(self, job: Job, batch: Any) -> None:
        refused: dict[str, str] = {}
        replies, failed, own = 0, 0, {key.hex() for key in job.keys}
        for file_id in (batch.output_file_id, batch.error_file_id):
            for key, response in self._rows(job, file_id) if file_id else ():
                if key not in own:
                    continue
                status, body = response.get("status_code"), response.get("body")
                reply = _reply(body) if status == 200 else None
                if reply is not None:
                    if key not in self.cache:
                        self.cache.put(key, reply)
                    replies += 1
                elif not isinstance(status, int) or status == 200 or status in _AGAIN or status >= 500:
                    failed += 1
                else:
                    fault = body.get("error") if isinstance(body, dict) else body
                    refused[key] = f"HTTP {status}: {fault.get('message') if isinstance(fault, dict) else fault}"
        self._note(job, event="ended", status=batch.status, replies=replies, refused=refused)
        job.ended = batch.status
        self.refused |= refused
        self._file(job).unlink(missing_ok=True)
        if failed or batch.status != "completed":
            log.warning("batch %s: %s; %d of %d answered", job.batch_id, batch.status, replies, len(job.keys))
        if batch.status == "failed":
            faults = (batch.errors.data if batch.errors else None) or []
            said = f"batch {job.batch_id} was rejected: {'; '.join(str(fault.message) for fault in faults[:3])}"
            full = any(fault.code == QUEUE_FULL for fault in faults)
            if full and self.under_way:
                log.warning("%s; it is sent again when the others have ended", said)
                return
            smaller = f"; give --batch-requests, fewer than {len(own):,}" if full else ""
            raise ServiceError(f"{self.base_url}: {said}{smaller}")

    def _rows(self, job: Job, file_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, response) of each line of a result file. Raises ServiceError where the file is cut short."""
        path = self._file(job).with_suffix(".results")
        path.parent.mkdir(parents=True, exist_ok=True)

        def download() -> None:
            with self._client.files.with_streaming_response.content(file_id) as response:
                try:
                    response.stream_to_file(path)
                except OSError:  # the disk
                    raise
                except Exception as error:  # The HTTP library's own, as the client has not wrapped it.
                    raise openai.APIConnectionError(request=response.http_request) from error

        self._ask(download, self._if_gone(job))
        unreadable = 0
        with path.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    key, response = row["custom_id"], row.get("response") or {}
                except (ValueError, KeyError, TypeError):
                    if not line.endswith(b"\n"):
                        raise ServiceError(
                            f"{self.base_url}: {file_id}, the results of batch {job.batch_id}, came cut short; the same"
                            " command again fetches them anew"
                        ) from None
                    unreadable += bool(line.strip())
                    continue
                if isinstance(key, str) and isinstance(response, dict):
                    yield key, response
                else:
                    unreadable += 1
        path.unlink()
        if unreadable:
            log.warning("batch %s: %d lines of %s tell of no request", job.batch_id, unreadable, file_id)

    def _if_gone(self, job: Job) -> str:
        return (
            f"batch {job.batch_id} was made at another address or with another key, or is gone: without"
            f" {self.folder / 'batches.jsonl'} its requests are asked, and paid for, again"
        )

    def _ask(
        self, call: Callable[[], Any], otherwise: str = "check --base-url, the key, and that it has a batch interface"
    ) -> Any:
        """What ``call`` returns. ``otherwise``: what to do where the provider refuses it."""
        try:
            return call()
        except openai.APIError as error:
            if _is_refusal(error):
                raise ServiceError(f"{self.base_url}: {error}; {otherwise}") from error
            raise ServiceError(
                f"{self.base_url}: the batch interface did not answer ({error.__cause__ or error});"
                " the same command again goes on from here"
            ) from error

    def _note(self, job: Job, **what: Any) -> None:
        self._state.write({"tag": job.tag, **what})

    def _file(self, job: Job) -> Path:
        return self.folder / "batches" / f"{job.tag}.jsonl"


def read_jobs(folder: Path, refused: dict[str, str] | None = None) -> list[Job]:
    """The batches that ``folder`` knows of; refused requests are added to ``refused``."""
    jobs: dict[str, Job] = {}
    path = folder / "batches.jsonl"
    for _, row in read_rows(path) if path.exists() else ():
        if row["event"] == "begun":
            keys = tuple(bytes.fromhex(key) for key in row["keys"])
            jobs[row["tag"]] = Job(row["tag"], keys, row["most_usd"])
            continue
        job = jobs[row["tag"]]
        job.file_id = row.get("file_id", job.file_id)
        job.batch_id = row.get("batch_id", job.batch_id)
        if row["event"] == "ended":
            job.ended, job.keys = row["status"], ()
            if refused is not None:
                refused |= row["refused"]
    return list(jobs.values())


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the provider said no, and would do so again."""
    if not isinstance(error, openai.APIStatusError):
        return False
    return 400 <= error.status_code < 500 and error.status_code not in _AGAIN


def _row(request: Request) -> dict[str, Any]:
    body = chat_body(request)
    body |= body.pop("extra_body", {})
    return {"custom_id": request.key(), "method": "POST", "url": "/v1/chat/completions", "body": body}


def _reply(body: Any) -> Reply | None:
    try:
        return to_reply(body, Request("", ())).model_copy(update={"batch": True})
    except (ValueError, KeyError, IndexError, TypeError):
        return None
