"""Starting and stopping: in any order, without a network, under a proxy, and what a start takes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from medllava.errors import ConfigError
from medllava.images import to_data_uri
from medllava.model import checkpoint
from medllava.serve.client import Worker
from medllava.serve.page import build, launch
from medllava.serve.web import free_port

Wait = Callable[..., None]
SEEN_S = 5.0


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Serve the web chat for workers on some ports; returns its address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pages: list[Any] = []

    def start(*ports: int) -> str:
        page = build([Worker(f"http://127.0.0.1:{port}") for port in ports], (), ())
        pages.append(page)
        port = free_port("127.0.0.1", 0)
        launch(page, "127.0.0.1", port)
        return f"http://127.0.0.1:{port}"

    yield start
    for page in pages:
        page.close(verbose=False)


def open_client(url: str, folder: Path) -> Client:
    return Client(url, verbose=False, download_files=str(folder), analytics_enabled=False)


def answer_of(client: Client, image: str = "") -> Any:
    return client.predict(image, "Where is the gland?", api_name="/ask")


@pytest.mark.parametrize("order", list(itertools.permutations(("first", "second", "web"))), ids="-".join)
def test_all_orders_of_two_workers_and_the_web(
    at_port: Any, web: Callable[..., str], tmp_path: Path, wait: Wait, order: tuple[str, ...]
) -> None:
    ports = {name: free_port("127.0.0.1", 0) for name in ("first", "second")}
    client: Client | None = None
    started: set[str] = set()
    for name in order:
        if name == "web":
            client = open_client(web(*ports.values()), tmp_path)
        else:
            at_port(ports[name], name)
            started.add(name)
            wait(lambda name=name: httpx.get(f"http://127.0.0.1:{ports[name]}/health").status_code == 200)
        if client and started:
            began = time.monotonic()
            reply = answer_of(client)
            assert reply["text"].startswith("A gland") and reply["model"] in started
            assert time.monotonic() - began < SEEN_S
        elif client:
            with pytest.raises(AppError, match="reached|running"):
                answer_of(client)


def test_a_restarted_and_a_replaced_worker_are_seen_within_five_seconds(
    at_port: Any, web: Callable[..., str], tmp_path: Path
) -> None:
    port = free_port("127.0.0.1", 0)
    stop = at_port(port, "old")
    client = open_client(web(port), tmp_path)
    picture = to_data_uri(Image.new("RGB", (30, 20)))
    assert answer_of(client, picture)["model"] == "old"
    for model in ("old", "new"):
        stop()
        with pytest.raises(AppError):
            answer_of(client)
        stop = at_port(port, model)
        began = time.monotonic()
        while True:
            try:
                reply = answer_of(client, picture)
                break
            except AppError:
                assert time.monotonic() - began < SEEN_S
        assert reply["model"] == model and reply["boxes"]
        assert time.monotonic() - began < SEEN_S


def test_the_worker_behind_a_proxy(start_worker: Any, proxy: Callable[[str], str]) -> None:
    worker = start_worker(root_path="/chat")
    asker = openai.OpenAI(base_url=f"{proxy(worker.url)}/chat/v1", api_key="none", max_retries=0)
    assert [model.id for model in asker.models.list()] == ["scripted"]
    question: Any = {"model": "scripted", "messages": [{"role": "user", "content": "Where?"}]}
    assert asker.chat.completions.create(**question).choices[0].message.content == "A gland. [0.10, 0.20, 0.40, 0.60]"
    pieces = [chunk.choices[0].delta.content or "" for chunk in asker.chat.completions.create(**question, stream=True)]
    assert "".join(pieces) == "A gland. [0.10, 0.20, 0.40, 0.60]"
    # As a proxy that does not cut the path off would ask.
    assert httpx.get(f"{worker.url}/chat/v1/models").status_code == 200
    assert httpx.get(f"{worker.url}/openapi.json").json()["servers"] == [{"url": "/chat"}]


# -- the commands


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def run(module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"medllava.serve.{module}", "--port", "0", *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_the_page_is_there_while_the_model_loads_and_usable_soon_after(start: Any, tiny: Path, tmp_path: Path) -> None:
    """Measured: seconds from the worker's readiness to the page's first answer."""
    process = start("web", "--model-path", str(tiny))
    url = line_of(process).split()[3]
    assert httpx.get(url).status_code == 200
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(int(pid) for pid in children if b"serve.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    client = open_client(url, tmp_path)
    while True:
        try:
            assert answer_of(client)["model"] == "tiny"
            break
        except AppError as error:
            assert "loading" in str(error)
            time.sleep(0.1)
    # Without a worker of its own the command ends, and says so.
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "model loaded in" in err and "ended (it was killed" in err and "Traceback" not in err


def test_a_damaged_checkpoint_ends_the_web_command(start: Any, tmp_path: Path) -> None:
    process = start("web", "--model-path", str(tmp_path))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert str(tmp_path) in err and "error:" in err and "Traceback" not in err


def test_nothing_but_flags_opens_the_page_to_others(start: Any, worker: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("PATIENT-4711")
    process = start(
        "web", "--worker", worker.url, GRADIO_SHARE="True", GRADIO_ALLOWED_PATHS="/", GRADIO_SERVER_NAME="0.0.0.0",
        GRADIO_ANALYTICS_ENABLED="True", GRADIO_MCP_SERVER="True", GRADIO_ROOT_PATH="/elsewhere",
    )
    line = line_of(process)
    url = line.split()[3]
    assert url.startswith("http://127.0.0.1:") and "elsewhere" not in line
    config = httpx.get(f"{url}/config").json()
    assert (config["analytics_enabled"], config.get("mcp_server", False)) == (False, False)
    assert not config.get("share_url")
    assert httpx.get(f"{url}/gradio_api/file={secret}").status_code >= 400
    done = subprocess.run(
        [sys.executable, "-m", "medllava.serve.web", "--worker", worker.url, "--share"], capture_output=True, text=True,
        timeout=600, check=False,
    )
    assert done.returncode == 2 and "--share" in done.stderr


# -- devices


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert checkpoint.best_device() == best


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(tiny: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here .*; leave it out"):
        checkpoint.load(tiny, device=device)


@pytest.mark.parametrize("flag", ["--load-4bit", "--load-8bit"])
def test_few_bits_on_a_processor_work_or_say_what_is_missing(tiny: Path, flag: str) -> None:
    command = [sys.executable, "-m", "medllava.serve.cli", "--model-path", str(tiny), "--device", "cpu", flag]
    done = subprocess.run(
        [*command, "--prompt", "What is here?", "--max-new-tokens", "2"], capture_output=True, text=True, timeout=600,
        check=False,
    )
    if done.returncode:
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "medllava[gpu]" in done.stderr
    else:
        assert done.stderr == ""
