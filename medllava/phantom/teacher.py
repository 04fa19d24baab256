"""A small OpenAI-compatible server that answers the project's own teacher and judge prompts about the phantom.

It knows the phantom's grammar and nothing else: no truth file, no state. The same request gets the same reply. It
stands in for a language model in the demo and the tests, behind the same HTTP as a real one.

example:
  python -m medllava.phantom.teacher --port 8100
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from medllava.errors import ConfigError, run_cli

MODEL = "phantom-teacher"


class TeacherServer(ThreadingHTTPServer):
    """The server; ``port`` 0 takes a free one, which ``url`` then tells."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no fault of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Whole responses leave in one packet; without these two each would wait for the client's delayed acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: prompts and addresses are nobody's business."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "medllava"}]})
        else:
            self._refuse(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            return self._refuse(404, f"no such path: {self.path}")
        try:
            request = json.loads(body)
        except ValueError as error:
            return self._refuse(400, f"the body is not JSON: {error}")
        messages = request.get("messages") if isinstance(request, dict) else None
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            return self._refuse(400, "'messages' must be a list of objects with 'role' and 'content'")
        self._answer(request, messages)

    def _answer(self, request: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        from medllava.llm.base import Request, estimate_prompt_tokens, estimate_tokens
        from medllava.phantom.replies import reply_to

        text = reply_to(messages)
        model = str(request.get("model") or MODEL)
        form = request.get("response_format") or {}
        schema = (form.get("json_schema") or {}).get("schema") if isinstance(form, dict) else None
        prompt_tokens = estimate_prompt_tokens(Request(model, tuple(messages), schema))
        completion_tokens = estimate_tokens(text)
        usage = {
            "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        if request.get("stream"):
            return self._send_stream(model, text, usage, with_usage=bool(request.get("stream_options")))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        head = {"id": "chatcmpl-phantom", "object": "chat.completion", "created": 0, "model": model}
        self._send(200, {**head, "choices": [choice], "usage": usage})

    def _send_stream(self, model: str, text: str, usage: dict[str, int], *, with_usage: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in _stream_events(model, text, usage if with_usage else None):
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": None}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _stream_events(model: str, text: str, usage: dict[str, int] | None) -> Iterator[str]:
    """The server-sent events of a streamed reply: word by word, then the reason to stop, then the usage if asked."""
    head = {"id": "chatcmpl-phantom", "object": "chat.completion.chunk", "created": 0, "model": model}
    for piece in re.findall(r"\S+\s*|\s+", text):
        delta = {"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}
        yield json.dumps({**head, "choices": [delta]})
    yield json.dumps({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage:
        yield json.dumps({**head, "choices": [], "usage": usage})
    yield "[DONE]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medllava phantom.teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one and prints it")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    arguments = parser.parse_args(argv)
    try:
        server = TeacherServer(arguments.host, arguments.port)
    except OSError as error:
        raise ConfigError(f"--port {arguments.port}: cannot listen there ({error.strerror}); choose another") from error
    print(f"listening on {server.url}", flush=True)
    with server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
