from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from medllava.errors import ConfigError, ServiceError
from medllava.llm.base import RefusedError, Reply, Request, Sampling, UnansweredError
from medllava.llm.openai_api import OpenAIModel, is_loopback, resolve_api_key, resolve_base_url

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
ERROR = {"error": {"message": "no", "type": "x", "code": None}}


def request(text="hello", **options):
    return Request("m", ({"role": "system", "content": "be"}, {"role": "user", "content": text}), **options)


def ask(endpoint, *requests, **options) -> list[Reply]:
    async def all_of_them():
        model = OpenAIModel(endpoint.url, **options)
        try:
            return await asyncio.gather(*(model.ask(one) for one in requests))
        finally:
            await model.close()

    return asyncio.run(all_of_them())


def test_sends_the_request_and_reads_the_reply(endpoint):
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7, seed=3, extra_body={"min_p": 0.1})
    (reply,) = ask(endpoint, request(sampling=sampling), api_key="secret")
    assert reply == Reply(text="fine", model="served", prompt_tokens=11, completion_tokens=3)
    assert endpoint.requests == [{
        "model": "m", "messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}],
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3, "min_p": 0.1,
    }]
    assert endpoint.headers[0]["authorization"] == "Bearer secret"


def test_a_temperature_of_none_is_not_sent(endpoint):
    ask(endpoint, request(sampling=Sampling(temperature=None)))
    assert "temperature" not in endpoint.requests[0]


def test_structured_output_is_strict_json_schema(endpoint):
    ask(endpoint, request(schema=SCHEMA, schema_name="thing"))
    assert endpoint.requests[0]["response_format"] == {
        "type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}
    }


@pytest.mark.parametrize("accepted", ["json_object", None])
def test_falls_back_when_json_schema_is_refused_and_remembers(endpoint, answer, accepted):
    def script(number, body):
        form = body.get("response_format", {}).get("type")
        return (200, {}, answer('{"a": "b"}')) if form == accepted else (400, {}, ERROR)

    endpoint.script = script

    async def twice():
        model = OpenAIModel(endpoint.url)
        first = await model.ask(request(schema=SCHEMA))
        before = len(endpoint.requests)
        await model.ask(request("again", schema=SCHEMA))
        await model.close()
        return first, len(endpoint.requests) - before

    reply, calls = asyncio.run(twice())
    assert reply.text == '{"a": "b"}'
    assert calls == 1
    last = endpoint.requests[-1]["messages"]
    assert [message["role"] for message in last] == ["system", "user"]
    assert last[1]["content"].startswith("again") and '"additionalProperties": false' in last[1]["content"]


def test_max_completion_tokens_where_max_tokens_is_refused(endpoint, answer):
    def script(number, body):
        if "max_tokens" in body:
            return 400, {}, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens'", "code": "x"}}
        return 200, {}, answer("fine")

    endpoint.script = script
    assert ask(endpoint, request(schema=SCHEMA))[0].text == "fine"
    assert endpoint.requests[-1]["max_completion_tokens"] == 1024
    assert endpoint.requests[-1]["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize("fault", [500, 503, 429, "closed", "truncated", "not json"])
def test_a_transient_fault_is_survived(endpoint, answer, fault):
    def script(number, body):
        if number > 1:
            return 200, {}, answer("at last")
        if fault == "closed":
            return 200, {}, None
        if fault == "truncated":
            return 200, {}, b'{"choices": [{"mess'
        if fault == "not json":
            return 200, {"Content-Type": "text/html"}, b"<html>gateway</html>"
        return fault, {}, ERROR

    endpoint.script = script
    assert ask(endpoint, request())[0].text == "at last"
    assert len(endpoint.requests) == 2


def test_retry_after_is_honoured(endpoint, answer):
    endpoint.script = lambda n, b: (429, {"Retry-After": "1.2"}, ERROR) if n == 1 else (200, {}, answer("fine"))
    start = time.monotonic()
    ask(endpoint, request())
    assert time.monotonic() - start >= 1.2


def test_retries_run_out(endpoint):
    endpoint.script = lambda n, b: (500, {"Retry-After": "0.01"}, ERROR)
    with pytest.raises(UnansweredError, match="HTTP 500"):
        ask(endpoint, request(), max_retries=2)
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(("status", "kind"), [(400, RefusedError), (413, RefusedError), (401, ServiceError)])
def test_refusals_are_not_retried(endpoint, status, kind):
    endpoint.script = lambda n, b: (status, {}, ERROR)
    with pytest.raises(ServiceError, match=f"HTTP {status}") as caught:
        ask(endpoint, request())
    assert type(caught.value) is kind
    assert len(endpoint.requests) == 1


def test_a_quota_used_up_is_no_transient_fault(endpoint):
    endpoint.script = lambda n, b: (
        429, {"Retry-After": "0.01"}, {"error": {"message": "m", "code": "insufficient_quota"}}
    )
    with pytest.raises(ServiceError, match="is used up"):
        ask(endpoint, request(), max_retries=1)


def test_a_refusal_message_is_kept_as_such(endpoint, answer):
    endpoint.script = lambda n, b: (200, {}, answer(None, refusal="I will not."))
    (reply,) = ask(endpoint, request())
    assert (reply.text, reply.finish_reason) == ("I will not.", "refusal")


def test_tokens_are_estimated_where_the_endpoint_does_not_count(endpoint, answer):
    endpoint.script = lambda n, b: (200, {}, {**answer("two words"), "usage": None})
    (reply,) = ask(endpoint, request("one two three"))
    assert reply.completion_tokens == 2
    assert reply.prompt_tokens >= 4


def test_concurrency_is_bounded(endpoint, answer):
    def script(number, body):
        time.sleep(0.03)
        return 200, {}, answer("fine")

    endpoint.script = script
    ask(endpoint, *(request(str(n)) for n in range(20)), concurrency=4)
    assert 2 <= endpoint.most_at_once <= 4


def test_loopback_and_keys(monkeypatch, tmp_path: Path):
    assert all(is_loopback(f"http://{host}:1/v1") for host in ("127.0.0.1", "127.0.0.2", "localhost", "[::1]"))
    assert not any(is_loopback(f"http://{host}/v1") for host in ("api.openai.com", "127.evil.com", "10.0.0.1"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert resolve_base_url(None) == "https://api.openai.com/v1"
    assert resolve_api_key("http://127.0.0.1:1/v1") == "none"
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        resolve_api_key("https://api.openai.com/v1")
    (tmp_path / "key").write_text("abc\n")
    assert resolve_api_key("https://api.openai.com/v1", tmp_path / "key") == "abc"
    monkeypatch.setenv("OPENAI_API_KEY", "env")
    assert resolve_api_key("https://api.openai.com/v1") == "env"
    with pytest.raises(ConfigError, match="expected something like"):
        resolve_base_url("localhost:8000")
