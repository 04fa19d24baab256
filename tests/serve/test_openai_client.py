"""What the unmodified ``openai`` client may ask beyond questions, and each field that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import openai
import pytest
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from medllava.errors import ConfigError
from medllava.images import load_image, to_data_uri
from medllava.serve.schema import ChatRequest
from medllava.serve.worker import main

ASKED: list[Any] = [{"role": "user", "content": "Where is the gland?"}]


@pytest.fixture
def client(worker: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0)


def test_every_field_of_the_client_is_known() -> None:
    """A field that is not served is refused for what it is, and not as one that the API does not have."""
    assert set(get_type_hints(CompletionCreateParamsStreaming)) <= set(ChatRequest.model_fields)


@pytest.mark.parametrize("detail", get_args(get_type_hints(ImageURL)["detail"]))
def test_every_detail_of_a_picture(client: openai.OpenAI, photograph: Path, detail: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": to_data_uri(load_image(photograph)), "detail": detail}}
    asked: Any = [{"role": "user", "content": [picture, {"type": "text", "text": "Where is the gland?"}]}]
    assert client.chat.completions.create(model="scripted", messages=asked).choices


def test_one_model_by_its_name(client: openai.OpenAI, worker: Any, start_worker: Any) -> None:
    model = client.models.retrieve("scripted")
    assert (model.id, model.object) == ("scripted", "model")
    assert model.model_dump() == client.models.list().data[0].model_dump()
    with pytest.raises(openai.NotFoundError, match="this worker serves 'scripted'"):
        client.models.retrieve("owner/other")
    closed = start_worker(api_keys=("key",))
    assert httpx.get(f"{closed.url}/v1/models/scripted").status_code == 401


def test_values_that_change_nothing(client: openai.OpenAI, worker: Any) -> None:
    nothing: Any = {
        "top_p": 0, "reasoning_effort": "none", "tools": [], "tool_choice": "none", "stop": [], "frequency_penalty": 0,
        "response_format": {"type": "text"}, "user": "me", "store": False, "metadata": {"a": "b"}, "logit_bias": {},
        "prompt_cache_options": {"mode": "implicit"},
    }
    assert client.chat.completions.create(model="scripted", messages=ASKED, **nothing).choices
    assert worker.answerer.asked[-1][2]["top_p"] == 0


@pytest.mark.parametrize(
    ("header", "status"), [("Bearer key", 200), ("bearer key", 200), ("Basic key", 401), ("key", 401), ("Bearer", 401)]
)
def test_how_a_key_is_sent(start_worker: Any, header: str, status: int) -> None:
    url = f"{start_worker(api_keys=('key',)).url}/v1/models"
    assert httpx.get(url, headers={"Authorization": header}).status_code == status


@pytest.mark.parametrize("flags", ["--max-batch 0", "--max-waiting -1", "--max-new-tokens 0", "--max-request-mb 0"])
def test_a_limit_that_lets_nothing_through(flags: str) -> None:
    with pytest.raises(ConfigError, match=f"{flags}: expected"):
        main(["--model-path", "m", *flags.split()])


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function", "function": {"name": "f"}}]), ("response_format", {"type": "json_object"}),
     ("presence_penalty", 1), ("moderation", {"model": "m"}), ("seed", "x")],
)
def test_a_refusal_names_its_field(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="scripted", messages=ASKED, **{field: value})
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        field, "invalid_request", "invalid_request_error"
    )


def test_the_id_of_a_request_is_told_with_answers_and_faults(
    client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="medllava.serve.requests")
    answer = client.chat.completions.create(model="scripted", messages=ASKED)
    assert answer._request_id == answer.id
    stream = client.chat.completions.create(model="scripted", messages=ASKED, stream=True)
    assert {chunk.id for chunk in stream} == {stream.response.headers["x-request-id"]}
    told = [answer.id, stream.response.headers["x-request-id"]]
    for question in ("divide by zero", "too many words"):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": question}])
        told.append(str(caught.value.request_id))
    assert {record.facts["id"] for record in caplog.records if hasattr(record, "facts")} == set(told)
