"""``generate --batch`` against a provider's batch interface over HTTP, through the real client."""

from __future__ import annotations

import argparse
import json
import random
import re
import threading
from collections import Counter
from pathlib import Path

import pytest

from medllava.errors import ConfigError, ServiceError
from medllava.geometry import QUADRANTS
from medllava.instruct_gen import generate
from medllava.instruct_gen.records import GroundedCaption, Phrase
from medllava.jsonl import read_rows, write_records
from medllava.llm.base import Request
from medllava.llm.batches import BatchQueue
from medllava.llm.cache import ReplyCache
from medllava.phantom import grammar
from medllava.phantom.replies import reply_to
from medllava.phantom.teacher import TeacherServer

ROOT = Path(__file__).parents[2]
RESULTS = ("samples.jsonl", "dropped.jsonl", "case_facts.jsonl", "llava.json", "train.json", "val.json", "split.json")
USAGE = {"prompt_tokens": 700, "completion_tokens": 60, "prompt_tokens_details": {"cached_tokens": 200}}


class Provider(TeacherServer):
    """Files and batches in memory. ``rows(custom_id, attempt)`` gives a fault of a row: a status, "expired" or None;
    ``drop`` names a POST path whose next answer is lost after its work is done."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.polls_before_end = 1
        self.status = "completed"
        self.most_in_line = 99
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.rows = lambda key, attempt: None
        self.drop = None
        self.live = 0
        provider, honest = self, self.RequestHandlerClass

        class Handler(honest):
            def do_POST(self):
                if self.path == "/v1/chat/completions":
                    provider.live += 1
                    return super().do_POST()
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/files":
                    answer = provider.add_file(re.search(rb"filename=.*?\r\n\r\n(.*)\r\n--", body, re.DOTALL).group(1))
                else:
                    answer = provider.add_batch(json.loads(body))
                if provider.drop == self.path:
                    provider.drop, self.close_connection = None, True
                    return None
                return self._send(200, answer)

            def do_GET(self):
                if match := re.fullmatch(r"/v1/files/(.+)/content", self.path):
                    data = provider.files[match.group(1)]
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    return None
                if match := re.fullmatch(r"/v1/batches/(.+)", self.path):
                    return self._send(200, provider.look(provider.batches[match.group(1)]))
                return self._send(200, {"object": "list", "data": list(provider.batches.values()), "has_more": False})

        self.RequestHandlerClass = Handler

    def add_file(self, data):
        id = f"file-{len(self.files)}"
        self.files[id] = data
        return {"id": id, "object": "file", "bytes": len(data), "created_at": 0, "filename": "x", "purpose": "batch",
                "status": "processed"}  # fmt: skip

    def add_batch(self, body):
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        id = f"batch-{len(self.batches)}"
        self.batches[id] = {
            "id": id, "object": "batch", "created_at": 0, "status": "in_progress", "polls": 0, **body,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        if sum(batch["status"] == "in_progress" for batch in self.batches.values()) > self.most_in_line:
            self.batches[id]["errors"] = {"data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit"}]}
            self.batches[id]["status"] = "failed"
            return self.batches[id]
        for line in self.files[body["input_file_id"]].splitlines():
            self.asked[json.loads(line)["custom_id"]] += 1
        return self.batches[id]

    def look(self, batch):
        batch["polls"] += 1
        if batch["polls"] <= self.polls_before_end or batch["status"] != "in_progress":
            return batch
        batch["status"] = self.status
        out, errors = [], []
        for line in self.files[batch["input_file_id"]].splitlines() if self.status != "failed" else ():
            row = json.loads(line)
            assert row["method"] == "POST" and row["url"] == "/v1/chat/completions"
            key, fault = row["custom_id"], self.rows(row["custom_id"], self.asked[row["custom_id"]])
            told = {"id": "r", "custom_id": key, "response": None, "error": None}
            if fault == "expired":
                errors.append({**told, "error": {"code": "batch_expired", "message": "not in time"}})
            elif fault:
                errors.append({**told, "response": {"status_code": fault, "body": {"error": {"message": "no"}}}})
            else:
                self.paid[key] += 1
                message = {"role": "assistant", "content": reply_to(row["body"]["messages"])}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                body = {"model": row["body"]["model"], "choices": [choice], "usage": USAGE}
                out.append({**told, "response": {"status_code": 200, "body": body}})
        random.Random(0).shuffle(out)
        for name, rows in (("output_file_id", out), ("error_file_id", errors)):
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            batch[name] = self.add_file(data)["id"] if rows else None
        if self.status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "x", "message": "too many enqueued tokens"}]}
        return batch


@pytest.fixture
def provider():
    with Provider() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def captions(tmp_path):
    rng, rows = random.Random(0), []
    for number in range(9):
        video, diagnosis = number // 3, list(grammar.DIAGNOSES)[number // 3]
        texts = [f"In the {rng.choice(QUADRANTS)} there is {grammar.article(kind)}, look {number}."
                 for kind in rng.sample(list(grammar.FINDINGS), 3)] + [f"So this is {diagnosis}."]  # fmt: skip
        phrases = tuple(Phrase(text=text, start_s=n, end_s=n + 1) for n, text in enumerate(texts, start=10 * number))
        rows.append(GroundedCaption(
            id=f"v{video}-{number}", video=f"v{video}.mp4", image=f"{number}.png", crop_px=(0, 0, 9, 9), phrases=phrases
        ))  # fmt: skip
    write_records(tmp_path / "captions.jsonl", rows)
    return tmp_path / "captions.jsonl"


def run(captions, out, provider, *more):
    parser = argparse.ArgumentParser()
    generate.configure(parser)
    flags = [str(one) for one in more if "=" not in str(one)]
    return generate.run(parser.parse_args([
        "--captions", str(captions), "--out", str(out), "--config", str(ROOT / "instruct_gen/recipes/demo.yaml"),
        "--base-url", provider.url, *flags, "kinds.grounding=null", "kinds.complex_reasoning.fraction=1.0",
        "kinds.iterative_abduction.fraction=1.0", "usd_per_million={input: 2.0, output: 8.0, cached_input: 1.0}",
        *(str(one) for one in more if "=" in str(one)),
    ]))  # fmt: skip


def until_the_end(captions, out, provider, *more):
    for turn in range(40):
        if run(captions, out, provider, "--batch", *more) == 0:
            return turn
    raise AssertionError("it never ends")


def written(out):
    return {name: (out / name).read_bytes() for name in RESULTS}


def test_rounds_of_batches_end_in_the_files_of_a_live_run(tmp_path, captions, provider, capsys):
    out = tmp_path / "out"
    assert run(captions, out, provider, "--batch") == generate.UNDER_WAY
    assert "batches are under way" in capsys.readouterr().out and not (out / "samples.jsonl").exists()
    assert len(provider.batches) == 1 and len(provider.asked) == 3, "the facts of three videos first"
    with pytest.raises(ConfigError, match="under way"):
        run(captions, out, provider)
    assert run(captions, out, provider, "--batch") == generate.UNDER_WAY
    assert until_the_end(captions, out, provider) >= 4
    assert provider.live == 0 and set(provider.paid.values()) == {1} and provider.paid == provider.asked
    replies = len(provider.paid)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["replies"] == replies and summary["cached_tokens"] == 200 * replies
    assert summary["usd"] == pytest.approx(replies * (500 * 2 + 200 * 1 + 60 * 8) / 1e6 / 2, abs=1e-4), "half price"
    assert list((out / "batches").iterdir()) == []
    run(captions, tmp_path / "live", provider)
    assert written(out) == written(tmp_path / "live")
    before = len(provider.batches)
    assert run(captions, out, provider, "--batch") == 0 and len(provider.batches) == before


def test_wait_goes_through_all_rounds(tmp_path, captions, provider, monkeypatch):
    monkeypatch.setattr("medllava.instruct_gen.batching.POLL_S", 0.01)
    assert run(captions, tmp_path / "out", provider, "--batch", "--wait") == 0
    assert (tmp_path / "out/samples.jsonl").exists()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_a_run_that_dies_while_submitting_submits_nothing_twice(tmp_path, captions, provider, path, monkeypatch):
    """The answer to an upload or to the creation of a batch never comes: as if the process had been killed then."""
    monkeypatch.setattr("openai._constants.INITIAL_RETRY_DELAY", 0.01)
    out = tmp_path / "out"
    provider.drop = path
    if path == "/v1/files":
        assert run(captions, out, provider, "--batch") == generate.UNDER_WAY
    else:
        with pytest.raises(ServiceError, match="the same command again"):
            run(captions, out, provider, "--batch")
    assert len(provider.batches) == 1
    until_the_end(captions, out, provider)
    assert set(provider.asked.values()) == {1}


def test_a_state_cut_short_at_any_line_is_taken_up(tmp_path, captions, provider):
    """Killed after any step of submitting: what was noted so far is the beginning of the state file."""
    provider.polls_before_end = 3
    for lines in (1, 2):
        out = tmp_path / f"out{lines}"
        run(captions, out, provider, "--batch")
        state = (out / "batches.jsonl").read_text().splitlines(keepends=True)
        (out / "batches.jsonl").write_text("".join(state[:lines]) + '{"tag": "medll')
        before = len(provider.batches)
        assert run(captions, out, provider, "--batch") == generate.UNDER_WAY
        assert len(provider.batches) == before, "it is found by its tag or its file"
        until_the_end(captions, out, provider)


def test_expired_and_failed_rows_are_asked_again_and_refused_ones_are_not(tmp_path, captions, provider):
    refused = set()

    def rows(key, attempt):
        dice = int(key[:2], 16) % 8
        if dice == 0 and len(refused | {key}) <= 3 and provider.batches.get("batch-1"):
            refused.add(key)
            return 400
        return {1: "expired", 2: 500, 3: 429}.get(dice) if attempt == 1 else None

    provider.rows = rows
    until_the_end(captions, tmp_path / "out", provider)
    assert max(provider.paid.values()) == 1 and all(provider.asked[key] == 1 for key in refused) and refused
    assert max(provider.asked.values()) == 2
    dropped = [row for _, row in read_rows(tmp_path / "out/dropped.jsonl")]
    assert sum(row["reason"].startswith("refused: HTTP 400: no") for row in dropped) == len(refused)
    assert not any(row["reason"].startswith(("no reply", "not asked")) for row in dropped)


def test_a_rejected_batch_is_told_and_can_be_sent_again(tmp_path, captions, provider):
    provider.status = "failed"
    run(captions, tmp_path / "out", provider, "--batch")
    with pytest.raises(ServiceError, match="rejected: too many enqueued tokens"):
        run(captions, tmp_path / "out", provider, "--batch")
    provider.status = "completed"
    until_the_end(captions, tmp_path / "out", provider)


def test_more_than_the_account_may_have_in_line_is_sent_piece_by_piece(
    tmp_path, captions, provider, monkeypatch, caplog
):
    monkeypatch.setattr("medllava.instruct_gen.batching.POLL_S", 0.01)
    provider.most_in_line = 1
    assert run(captions, tmp_path / "out", provider, "--batch", "--wait", "--batch-requests", 25) == 0
    assert "Enqueued token limit; it is sent again when the others have ended" in caplog.text
    assert max(len(provider.files[batch["input_file_id"]].splitlines()) for batch in provider.batches.values()) == 25
    assert set(provider.paid.values()) == {1}
    assert run(captions, tmp_path / "live", provider) == 0
    assert written(tmp_path / "out") == written(tmp_path / "live")
    provider.most_in_line = 0
    with pytest.raises(ServiceError, match="Enqueued token limit; give --batch-requests, fewer than 3"):
        run(captions, tmp_path / "none", provider, "--batch", "seed=5")
    with pytest.raises(ConfigError, match="--batch-requests 0: expected 1 to 50000"):
        run(captions, tmp_path / "none", provider, "--batch", "--batch-requests", 0)


def test_the_limits_of_one_file_hold(tmp_path, monkeypatch):
    """107,131 requests of Quilt's size make three files of OpenAI's; here the limits are 1,000 times smaller."""
    monkeypatch.setattr("medllava.llm.batches.MOST_BYTES", 9_000)
    sent = []
    monkeypatch.setattr(BatchQueue, "_upload", lambda queue, job: "file-1")
    monkeypatch.setattr(BatchQueue, "_submit", lambda queue, job: sent.append(
        (len(job.keys), len(queue._file(job).read_bytes()))
    ))
    requests = [Request("m", ({"role": "user", "content": f"{n} " + "x" * (n % 400)},)) for n in range(107)]
    with ReplyCache(tmp_path / "replies.jsonl") as cache, BatchQueue(tmp_path, cache, "http://h/v1", "k", 50) as queue:
        assert queue.submit(iter(requests), None, None) == (107, True)
        assert queue.submit(iter(requests), None, None) == (0, True), "what is under way is not sent again"
    assert sum(count for count, _ in sent) == 107 and len(sent) > 3
    assert all(count <= 50 and size <= 9_000 for count, size in sent)


def test_max_usd_holds_by_what_a_batch_can_cost_at_most(tmp_path, captions, provider):
    out = tmp_path / "out"
    with pytest.raises(ServiceError, match="stopped by --max-usd"):
        until_the_end(captions, out, provider, "--max-usd", "0.05")
    spent = json.loads((out / "summary.json").read_text())["usd"]
    assert 0.02 < spent <= 0.05
    assert until_the_end(captions, out, provider, "--max-usd", "5") > 0
    assert set(provider.paid.values()) == {1}


def ended(provider, spoil):
    """A provider whose batches go through ``spoil`` once they have ended."""
    honest = provider.look

    def look(batch):
        running = batch["status"] == "in_progress"
        honest(batch)
        if running and batch["status"] != "in_progress":
            spoil(batch)
        return batch

    provider.look = look


def test_lines_that_tell_of_no_request_cost_nothing_but_themselves(tmp_path, captions, provider):
    """In both files, beside a row that comes twice and one that is absent, which is asked again."""
    odd = b'{"custom_id": null, "response": null}\n{"custom_id": "mine-1"}\n[]\n<html>\n{"error": 5}\n'
    absent = set()

    def spoil(batch):
        name = batch["output_file_id"]
        first, *others = provider.files[name].splitlines(keepends=True)
        if not absent and others:
            absent.add(json.loads(first)["custom_id"])
            first = b""
        provider.files[name] = b"".join([first, odd, *others, *others[:1]])
        batch["error_file_id"] = provider.add_file(odd)["id"]

    ended(provider, spoil)
    until_the_end(captions, tmp_path / "out", provider)
    assert {key for key, times in provider.asked.items() if times > 1} == absent
    assert provider.asked[absent.pop()] == 2


def test_results_that_come_cut_short_are_fetched_again_and_not_asked_again(tmp_path, captions, provider):
    honest, cuts = provider.RequestHandlerClass, ["a lost connection", "a whole answer that ends in a line"]

    class Cut(honest):
        def do_GET(self):
            if not (match := re.fullmatch(r"/v1/files/(.+)/content", self.path)) or not cuts:
                return super().do_GET()
            data = provider.files[match.group(1)]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) if len(cuts) == 2 else len(data) - 5))
            self.end_headers()
            self.wfile.write(data[:-5])
            cuts.pop()
            self.close_connection = True
            return None

    provider.RequestHandlerClass = Cut
    out = tmp_path / "out"
    assert run(captions, out, provider, "--batch") == generate.UNDER_WAY
    with pytest.raises(ServiceError, match="the same command again goes on"):
        run(captions, out, provider, "--batch")
    with pytest.raises(ServiceError, match="came cut short; the same command again fetches them anew"):
        run(captions, out, provider, "--batch")
    until_the_end(captions, out, provider)
    assert set(provider.asked.values()) == {1}


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_where_a_provider_takes_no_batch_nothing_is_under_way(tmp_path, captions, provider, path):
    """Another endpoint, or the same one asked live, can go on."""
    honest = provider.RequestHandlerClass

    class Refusing(honest):
        def do_POST(self):
            if self.path != path:
                return super().do_POST()
            self.rfile.read(int(self.headers["Content-Length"]))
            return self._send(404, {"error": {"message": "Not Found"}})

    provider.RequestHandlerClass = Refusing
    out = tmp_path / "out"
    with pytest.raises(ServiceError, match="404 - Not Found; check --base-url, the key, and that it has a batch"):
        run(captions, out, provider, "--batch")
    provider.RequestHandlerClass = honest
    assert run(captions, out, provider) == 0 and not provider.batches
    assert run(captions, out, provider, "--batch", "seed=5") == generate.UNDER_WAY
    assert len(list((out / "batches").iterdir())) == 1, "what was refused is not kept"


def test_a_batch_that_the_provider_does_not_know_is_told_with_the_way_out(tmp_path, captions, provider):
    out = tmp_path / "out"
    assert run(captions, out, provider, "--batch") == generate.UNDER_WAY
    honest = provider.RequestHandlerClass

    class Forgetful(honest):
        def do_GET(self):
            return self._send(404, {"error": {"message": "No batch found"}})

    provider.RequestHandlerClass = Forgetful
    with pytest.raises(ServiceError, match=r"No batch found; batch batch-0 was made .* or is gone: without .*jsonl"):
        run(captions, out, provider, "--batch")
