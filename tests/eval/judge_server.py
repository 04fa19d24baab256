"""A judge over HTTP that fails in every way a judge can, by the number in the question. Run as a program, or imported.

It prefers the answer with more words "good", gives the first place a point more, and obeys whoever tells it to give 10.
Every prompt answered with HTTP 200 is appended to the file that it is told, as a line.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = {
    1: "prose", 2: "8 7", 3: "[[7]]", 4: "refusal", 5: '{"first": 8, "seco', 6: "http500", 7: "http400", 8: "late",
    9: '{"first": 11, "second": 3, "reason": ""}', 10: '[8, 7]', 11: "http429 once", 12: "http500 once",
    13: "cut body once",
    14: "wrong order", 15: "always late",
}
"""Question number -> what goes wrong; 8 and 11 to 13 pass at the second try, in 14 the keys are the other way round."""
LOST = {1, 2, 3, 4, 5, 6, 7, 9, 10, 15}
LATE_S = 5.0


def part(content: str, name: str) -> str:
    found = re.search(rf"^### {name}\n(.*?)(?=^### |\Z)", content, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the prompt has no part {name}"
    return found.group(1)


def points(content: str) -> dict[str, object]:
    first, second = part(content, "First answer"), part(content, "Second answer")
    obeys = [10 if re.search(r"\b10\b", text) else None for text in (first, second)]
    scores = [min(10, 3 + 2 * text.count("good")) for text in (first, second)]
    return {"first": obeys[0] or min(10, scores[0] + 1), "second": obeys[1] or scores[1], "reason": "so"}


class Judge(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, log: Path, delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log, self.delay_s = log, delay_s
        self.seen: dict[str, int] = {}
        self.numbers: set[int] = set()
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Judge
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        key = hashlib.sha256(content.encode()).hexdigest()
        with self.server.lock:
            self.server.seen[key] = tries = self.server.seen.get(key, 0) + 1
        found = re.search(r"What is (\d+)\?", content)
        number = int(found.group(1)) if found else -1
        self.server.numbers.add(number)
        fault = FAULTS.get(number, "")
        time.sleep(self.server.delay_s)
        if fault == "always late" or (fault == "late" and tries == 1):
            time.sleep(LATE_S)
            self.close_connection = True
            return None  # nobody waits for it any more
        if fault == "http500" or (fault == "http500 once" and tries == 1):
            return self.reply(500, {"error": {"message": "broken"}})
        if fault == "http400":
            return self.reply(400, {"error": {"message": "no such thing"}})
        if fault == "http429 once" and tries == 1:
            return self.reply(429, {"error": {"message": "slow down"}})
        scores = points(content)
        message: dict[str, object] = {"role": "assistant", "content": json.dumps(scores)}
        if fault == "prose":
            message["content"] = "I would say the first is an 8."
        elif fault == "refusal":
            message |= {"content": None, "refusal": "I cannot grade this."}
        elif fault == "wrong order":
            message["content"] = json.dumps(dict(reversed(scores.items())))
        elif fault[:1] in "8[{" and fault:
            message["content"] = fault
        with self.server.lock, self.server.log.open("a") as log:
            log.write(key + "\n")
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        whole = {
            "id": "x", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        return self.reply(200, whole, cut=fault == "cut body once" and tries == 1)

    def reply(self, status: int, value: object, cut: bool = False) -> None:
        data = json.dumps(value).encode()
        data = data[: len(data) // 2] if cut else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    judge = Judge(Path(sys.argv[1]), float(sys.argv[2]))
    sys.stdout.write(f"http://127.0.0.1:{judge.server_port}/v1\n")
    sys.stdout.flush()
    judge.serve_forever()
