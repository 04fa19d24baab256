from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medllava.serve.client import Model, Worker


def test_a_server_that_is_not_ours_is_asked_for_its_models(serve: Callable[[Any], str]) -> None:
    """vLLM and SGLang answer /health with an empty body."""

    async def health(_: Request) -> Response:
        return Response()

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "stage2", "object": "model"}]})

    url = serve(Starlette(routes=[Route("/health", health), Route("/v1/models", models)]))
    state = asyncio.run(Worker(url).state())
    assert (state.status, state.model) == ("ready", "stage2")


def test_a_worker_says_how_its_model_takes_regions(start_worker: Any, scripted: Any) -> None:
    scripted.manifest.regions, scripted.manifest.training_mpp = ("mark",), 0.25
    state = asyncio.run(Worker(start_worker(load=lambda: scripted).url).state())
    assert state.models == (Model("scripted", ("mark",), 0.25, 96),)
