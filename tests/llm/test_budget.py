from __future__ import annotations

import asyncio
import json

import pytest

from medllava.llm.base import Request, Sampling, UnansweredError, for_each
from medllava.llm.budget import Budget, BudgetError, Price
from medllava.llm.openai_api import OpenAIModel

PRICE = Price(input=1.0, output=1.0)


def request(text="hello", max_tokens=100):
    return Request("m", ({"role": "user", "content": text},), sampling=Sampling(max_tokens=max_tokens))


MOST_USD = PRICE.most(request())


async def call(budget, text="hello", usd=None):
    async with budget.call(request(text)) as bill:
        await asyncio.sleep(0.001)
        if usd is not None:
            bill.usd, bill.answered = usd, True


def test_never_exceeded_with_many_calls_in_flight():
    async def go():
        budget, made, errors = Budget(PRICE, 1e-3, replies_usd=1e-4), [], []

        async def one(n):
            try:
                await call(budget, f"{n:05}", usd=60e-6)
                made.append(n)
            except BudgetError as error:
                errors.append(error)

        await for_each(range(64), one, 64)
        return budget, made, errors

    budget, made, errors = asyncio.run(go())
    assert budget.spent_usd == pytest.approx(1e-4 + len(made) * 60e-6) and budget.spent_usd <= 1e-3
    assert 1e-3 - budget.spent_usd < MOST_USD, "it goes on until what is left could not pay for one more call"
    assert len(errors) == 64 - len(made) and "limit of $0.00" in str(errors[0])


def test_a_free_fault_gives_its_money_back_and_a_lost_answer_does_not():
    async def go():
        budget = Budget(PRICE, 2.5 * MOST_USD)
        for _ in range(5):
            await call(budget, usd=0.0)
        assert budget.spent_usd == 0
        await call(budget)
        await call(budget)
        with pytest.raises(BudgetError):
            await call(budget)
        return budget

    budget = asyncio.run(go())
    assert budget.spent_usd == budget.lost_usd == pytest.approx(2 * MOST_USD)


def test_calls_lost_in_an_earlier_run_count(tmp_path):
    ledger = tmp_path / "sent.jsonl"

    async def go():
        with Budget(PRICE, ledger=ledger) as budget:
            await call(budget, "kept", usd=1e-6)
            await call(budget, "lost")
            async with budget.call(request("free")) as bill:
                bill.usd = 0.0
            await call(budget, "kept, then lost", usd=1e-6)

    asyncio.run(go())
    # A killed process: a call is open and its line is cut short in the next one.
    with ledger.open("a") as file:
        file.write(json.dumps({"key": request("open").key(), "usd": MOST_USD}) + '\n{"key": "')
    kept = {request("kept").key()}
    expected = PRICE.most(request("lost")) + PRICE.most(request("kept, then lost")) + MOST_USD
    with Budget(PRICE, replies_usd=1e-6, ledger=ledger, answered=kept) as budget:
        assert budget.lost_usd == pytest.approx(expected)
        assert budget.spent_usd == pytest.approx(expected + 1e-6)
    assert len(ledger.read_text().splitlines()) == 1
    with Budget(PRICE, ledger=ledger, answered=kept) as budget:
        assert budget.lost_usd == pytest.approx(expected)


def test_the_bill_of_a_faulty_endpoint_stays_within_the_limit(endpoint, answer):
    """The endpoint charges every answer it makes, also those that never arrive, at the most that they can cost."""
    charged = []

    def script(number, body):
        if number % 5 == 0:
            return 429, {"Retry-After": "0.01"}, {"error": {"message": "no"}}
        charged.append(PRICE.usd(len(body["messages"][0]["content"]) + 10, body["max_tokens"]))
        if number % 3 == 0:
            return 200, {}, b'{"choices": [{"mess' if number % 2 else None
        usage = {"prompt_tokens": len(body["messages"][0]["content"]) + 10, "completion_tokens": body["max_tokens"]}
        return 200, {}, {**answer("fine"), "usage": usage}

    endpoint.script = script
    stopped = []

    async def go():
        model = OpenAIModel(endpoint.url, concurrency=64, budget=Budget(PRICE, 0.02))

        async def one(n):
            try:
                await model.ask(request(f"{n:05}", max_tokens=200))
            except (BudgetError, UnansweredError) as error:
                stopped.append(error)

        try:
            await for_each(range(200), one, 64)
        finally:
            await model.close()
        return model.budget

    budget = asyncio.run(go())
    assert sum(charged) <= budget.spent_usd <= 0.02
    assert sum(charged) > 0.018, "and the money is used"
    assert any(isinstance(error, BudgetError) for error in stopped)
