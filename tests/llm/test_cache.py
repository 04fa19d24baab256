from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from medllava.errors import ConfigError
from medllava.llm.base import Reply, Request, Sampling, UnansweredError, estimate_tokens, for_each
from medllava.llm.budget import Price
from medllava.llm.cache import CachedModel, ReplyCache


def request(text="hello", **options):
    return Request("m", ({"role": "user", "content": text},), **options)


class Scripted:
    """Replies with its prompt in capitals; counts."""

    def __init__(self, fail=(), tokens=(10, 10)):
        self.asked = []
        self.fail = fail
        self.tokens = tokens

    async def ask(self, request):
        self.asked.append(request.messages[0]["content"])
        await asyncio.sleep(0.001)
        if request.messages[0]["content"] in self.fail:
            raise UnansweredError("no")
        prompt, completion = self.tokens
        text = request.messages[0]["content"].upper()
        return Reply(text=text, model="m", prompt_tokens=prompt, completion_tokens=completion)


def test_the_key_holds_everything_that_changes_the_reply():
    changes = [
        request("other"), request(schema={"type": "object"}), request(sampling=Sampling(temperature=0.1)),
        request(sampling=Sampling(max_tokens=5)), request(sampling=Sampling(seed=1)),
        request(sampling=Sampling(extra_body={"x": 1})), Request("n", request().messages),
        Request("m", ({"role": "system", "content": "hello"},)),
    ]
    keys = {one.key() for one in [request(), *changes]}
    assert len(keys) == len(changes) + 1
    assert request().key() == request().key()


def test_replies_survive_and_a_broken_last_line_is_dropped(tmp_path):
    path = tmp_path / "out" / "replies.jsonl"
    keys = [request(str(n)).key() for n in range(3)]
    with ReplyCache(path) as cache:
        for n, key in enumerate(keys):
            cache.put(key, Reply(text=f"réply {n}\n", model="m", prompt_tokens=1, completion_tokens=2))
            assert path.read_bytes().count(b"\n") == n + 1, "written before put returns"
    path.write_bytes(path.read_bytes()[:-20])
    with ReplyCache(path) as cache:
        assert len(cache) == 2
        assert cache.get(keys[2]) is None
        assert (cache.prompt_tokens, cache.completion_tokens) == (2, 4)
        cache.put(keys[2], Reply(text="new", model="m"))
        assert [cache.get(key).text for key in keys] == ["réply 0\n", "réply 1\n", "new"]
    with ReplyCache(path) as cache:
        assert [cache.get(key).text for key in keys] == ["réply 0\n", "réply 1\n", "new"]


def test_an_unreadable_line_costs_only_its_own_reply(tmp_path, caplog):
    path = tmp_path / "replies.jsonl"
    keys = [request(str(n)).key() for n in range(2)]
    with ReplyCache(path) as cache:
        for key in keys:
            cache.put(key, Reply(text="x", model="m"))
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + "garbage\n" + second)
    with ReplyCache(path) as cache:
        assert cache.get(keys[0]) and cache.get(keys[1])
    assert "1 unreadable" in caplog.text


def test_money_is_counted_by_tariff_whatever_the_order(tmp_path):
    replies = [
        Reply(text="a", model="m", prompt_tokens=100, completion_tokens=10, cached_tokens=60),
        Reply(text="b", model="m", prompt_tokens=1000, completion_tokens=20, batch=True),
        Reply(text="c", model="m", prompt_tokens=7, completion_tokens=3),
    ]
    price = Price(input=2.0, output=8.0, cached_input=0.5)
    usd = []
    for order in (replies, replies[::-1]):
        with ReplyCache(tmp_path / f"{len(usd)}.jsonl") as cache:
            for reply in order:
                cache.put(request(reply.text).key(), reply)
            usd.append(cache.usd(price))
    assert usd[0] == usd[1]
    assert usd[0] == pytest.approx(sum(price.of(reply) for reply in replies))
    assert price.of(replies[0]) == pytest.approx((40 * 2 + 60 * 0.5 + 10 * 8) / 1e6)
    assert price.of(replies[1]) == pytest.approx((1000 * 2 + 20 * 8) / 2e6)


def test_two_writers_are_kept_apart(tmp_path):
    path = tmp_path / "r.jsonl"
    with ReplyCache(path), pytest.raises(ConfigError, match="another run"), ReplyCache(path):
        pass


def test_equal_requests_in_flight_become_one_call(tmp_path):
    inner = Scripted(fail=("bad",))

    async def go():
        with ReplyCache(tmp_path / "r.jsonl") as cache:
            model = CachedModel(inner, cache)
            replies = await asyncio.gather(*(model.ask(request()) for _ in range(5)))
            replies.append(await model.ask(request()))
            failed = await asyncio.gather(*(model.ask(request("bad")) for _ in range(2)), return_exceptions=True)
            return replies, failed

    replies, failed = asyncio.run(go())
    assert {reply.text for reply in replies} == {"HELLO"}
    assert all(isinstance(error, UnansweredError) for error in failed)
    assert inner.asked == ["hello", "bad"]


def test_for_each_draws_lazily_and_raises_the_first_error():
    drawn, done = [], []

    def items():
        for n in range(100):
            drawn.append(n)
            yield n

    async def work(n):
        await asyncio.sleep(0.001)
        if n == 10:
            raise UnansweredError("ten")
        done.append(n)

    with pytest.raises(UnansweredError, match="ten"):
        asyncio.run(for_each(items(), work, 4))
    assert len(drawn) < 20
    assert set(range(8)) <= set(done)


def test_token_estimate():
    assert estimate_tokens("") == 0
    assert estimate_tokens("The gland, 12345 [0.12]") == 1 + 1 + 1 + 2 + 1 + 1 + 1 + 1 + 1
    assert estimate_tokens("adenocarcinoma") == 2


def test_a_key_is_that_of_the_whole_request_as_json():
    """Replies paid for are found by it: it must never change."""
    for schema in (None, {}, {"b": "ä", "a": {"d": 1}}, {"b": "ä", "a": {"d": 2}}):
        asked = Request(model='m"', messages=({"role": "user", "content": "ö\n"},), schema=schema)
        parts = {
            "model": asked.model, "messages": asked.messages, "schema": schema,
            "sampling": asked.sampling.model_dump(mode="json", exclude_none=True),
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        assert asked.key() == asked.key() == digest
