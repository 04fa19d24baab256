"""Figures of a worker for Prometheus, and one line per request for its log: counts and times, no content."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from medllava.serve.engine import Engine

requests_log = logging.getLogger("medllava.serve.requests")

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


@dataclass
class Call:
    """What may be told about one request: when, how much and how it ended."""

    id: str
    model: str | None = None
    stream: bool = False
    images: int = 0
    answers: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int = 200
    code: str | None = None
    received_s: float | None = None
    """From its first byte to its last."""
    queue_s: float | None = None
    first_token_s: float | None = None
    at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)


class Metrics:
    """Counts the calls of one worker."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "medllava_requests", "Requests that ended, by model, status and error code", ("model", "status", "code"),
            registry=self._registry,
        )
        self._prompt = Counter("medllava_prompt_tokens", "Tokens read, pictures included", registry=self._registry)
        self._generated = Counter("medllava_generated_tokens", "Tokens generated", registry=self._registry)
        self._first = Histogram(
            "medllava_first_token_seconds", "From a request's arrival to its first token", buckets=_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "medllava_request_seconds", "From a request's arrival to its end", buckets=_SECONDS, registry=self._registry
        )

    def end(self, call: Call) -> None:
        """Count a call that is over, and log it."""
        seconds = time.monotonic() - call.started
        self._requests.labels(call.model or "", str(call.status), call.code or "").inc()
        self._prompt.inc(call.prompt_tokens)
        self._generated.inc(call.completion_tokens)
        self._whole.observe(seconds)
        if call.first_token_s is not None:
            self._first.observe(call.first_token_s)
        told = {name: value for name, value in vars(call).items() if name != "started" and value is not None}
        told |= {name: round(value, 3) for name, value in told.items() if isinstance(value, float)}
        requests_log.info("request", extra={"facts": {**told, "total_s": round(seconds, 3)}})

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine knows at this moment; called by the registry."""
        yield GaugeMetricFamily("medllava_requests_waiting", "Requests in line", value=self._engine.waiting)
        yield GaugeMetricFamily("medllava_requests_answering", "Requests being answered", value=self._engine.answering)
        yield CounterMetricFamily("medllava_steps", "Passes that gave one token to each row", value=self._engine.steps)
        yield CounterMetricFamily("medllava_row_steps", "Tokens of these passes", value=self._engine.row_steps)


class JsonLines(logging.Formatter):
    """Log records as JSON objects, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname, "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(entry | getattr(record, "facts", {}), ensure_ascii=False)
