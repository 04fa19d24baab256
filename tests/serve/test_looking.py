from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from medllava.conversation import Turn
from medllava.errors import ServiceError
from medllava.geometry import Box
from medllava.images import load_image, to_data_uri
from medllava.model.answerer import Answerer
from medllava.serve.client import Worker
from medllava.serve.intake import Limits


def request(image: Path, **more: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": "Where is the gland?"},
        {"type": "image_url", "image_url": {"url": to_data_uri(load_image(image))}},
    ]
    return {"model": "scripted", "messages": [{"role": "user", "content": content}], "answer": "There.", **more}


def look(worker: Any, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{worker.url}/v1/medllava/looking", json=body, **options)


def test_what_an_answer_depends_on(worker: Any, photograph: Path) -> None:
    reply = look(worker, request(photograph, cells=4, fill="blur"))
    assert reply.status_code == 200
    told = reply.json()
    assert (told["object"], told["model"], told["answer"], told["tokens"]) == (
        "medllava.looking", "scripted", "There.", 3
    )
    assert (told["log_likelihood"], told["blank"]) == (-0.5, -4.0)
    assert told["drops"][0] == [0, 0, 0, 2.5] and told["peak"] == [0.75, 0, 1, 0.25]
    images, turns, answer, options = worker.answerer.looker.asked[0]
    assert images[0].size == (900, 300) and turns[0].text.startswith("<image>") and answer == "There."
    assert options == {"picture": -1, "cells": 4, "fill": "blur", "attention": True}


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"answer": ""}, 400, "invalid_request"), ({"cells": 1}, 400, "invalid_request"),
        ({"fill": "red"}, 400, "invalid_request"), ({"colour": 1}, 400, "unknown_parameter"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": "no picture"}]}, 400, "invalid_request"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request"),
        ({"answer": "too much memory"}, 507, "out_of_memory"),
    ],
)
def test_refusals_are_shaped_as_openais(
    worker: Any, photograph: Path, more: dict[str, Any], status: int, code: str
) -> None:
    reply = look(worker, request(photograph, **more))
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert look(worker, request(photograph)).status_code == 200


def test_it_needs_the_key_and_its_place_in_line(start_worker: Any, photograph: Path, wait: Any) -> None:
    worker = start_worker(api_keys=("k",), limits=Limits(max_batch=1, max_waiting=1))
    key = {"Authorization": "Bearer k"}
    assert look(worker, request(photograph)).status_code == 401
    worker.answerer.looker.steps, worker.answerer.looker.pause_s = 40, 1.0
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(look(worker, request(photograph), headers=key).status_code))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    wait(lambda: len(found) >= 3)
    worker.answerer.looker.pause_s = 0.0
    for thread in threads:
        thread.join()
    assert set(found) == {200, 429} and 2 <= found.count(200) <= 3
    assert httpx.get(f"{worker.url}/health").json()["answering"] == 0


def test_a_client_that_leaves_ends_it(worker: Any, photograph: Path, wait: Any) -> None:
    worker.answerer.looker.steps = 10_000
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{worker.url}/v1/medllava/looking", json=request(photograph), timeout=0.7)
    wait(lambda: httpx.get(f"{worker.url}/health").json()["answering"] == 0)


def test_answers_go_on_in_between(worker: Any, photograph: Path) -> None:
    worker.answerer.looker.steps, worker.answerer.looker.pause_s = 100, 0.3
    done: list[str] = []

    def looking() -> None:
        look(worker, request(photograph))
        done.append("looked")

    def asking() -> None:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "Where?"}]}
        httpx.post(f"{worker.url}/v1/chat/completions", json=body)
        done.append("answered")
        worker.answerer.looker.pause_s = 0.0

    threads = [threading.Thread(target=looking), threading.Thread(target=asking)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["answered", "looked"]


def test_the_schema_tells_of_it(worker: Any) -> None:
    schema = httpx.get(f"{worker.url}/openapi.json").json()
    body = schema["paths"]["/v1/medllava/looking"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/LookingRequest"}
    assert {"answer", "cells", "messages"} <= schema["components"]["schemas"]["LookingRequest"]["properties"].keys()


def test_a_real_model_looks_alike_here_and_there(start_worker: Any, tiny: Path, photograph: Path) -> None:
    model = Answerer.load(tiny, device="cpu")
    worker = start_worker(load=lambda: model)
    told = look(worker, request(photograph, model=tiny.name)).json()
    here = Answerer.load(tiny, device="cpu").where_did_it_look("Where is the gland?", photograph, answer="There.")
    assert told["log_likelihood"] == pytest.approx(here.log_likelihood, abs=1e-4)
    assert told["attention"] is not None and len(told["drops"]) == 7
    for mine, theirs in zip(here.drops, told["drops"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_the_client_of_the_web_chat(worker: Any, photograph: Path) -> None:
    turns = [Turn(role="user", text="Where is the gland?")]
    uri = to_data_uri(load_image(photograph))
    found = asyncio.run(Worker(worker.url).looking(turns, {0: uri}, "There.", cells=4))
    assert found.drops[0][3] == 2.5 and found.peak == Box(x1=0.75, y1=0, x2=1, y2=0.25)
    with pytest.raises(ServiceError, match="out of memory"):
        asyncio.run(Worker(worker.url).looking(turns, {0: uri}, "too much memory"))
    with pytest.raises(ServiceError, match="No worker can be reached"):
        asyncio.run(Worker("http://127.0.0.1:9").looking(turns, {0: uri}, "There."))
