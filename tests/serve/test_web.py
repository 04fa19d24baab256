"""The command that serves the web chat; what the page does is in test_browser.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from medllava.errors import MedllavaError
from medllava.serve.web import address_line, main

Wait = Callable[..., None]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command with a private folder for temporary files."""
    processes: list[subprocess.Popen[str]] = []
    folder = tmp_path / "temporary"
    folder.mkdir()

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "medllava.serve.web", "--port", "0", *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(folder)},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().split()[3]


def worker_of(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(pid for pid in map(int, children) if b"serve.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_one_command_starts_all_and_a_kill_takes_its_worker_along(start: Start, tiny: Path, wait: Wait) -> None:
    process = start("--model-path", str(tiny))
    url = address(process)
    page = httpx.get(url)
    assert page.status_code == 200
    worker = worker_of(process)
    process.kill()
    wait(lambda: gone(worker))


def test_the_private_folder_goes_and_takes_no_uploads(start: Start, worker: Any, tmp_path: Path) -> None:
    process = start("--worker", worker.url)
    url = address(process)
    folders = list((tmp_path / "temporary").glob("medllava-web-*"))
    assert len(folders) == 1 and folders[0].stat().st_mode & 0o077 == 0
    upload = httpx.post(f"{url}/gradio_api/upload", files={"files": ("patient.png", b"x" * 5000)})
    assert upload.status_code >= 400
    assert [path for path in folders[0].rglob("*") if path.is_file() and b"xxx" in path.read_bytes()] == []
    config = httpx.get(f"{url}/config").json()
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    process.send_signal(signal.SIGTERM)
    process.wait(100)
    assert process.returncode == 0
    assert list((tmp_path / "temporary").glob("medllava-web-*")) == []


def test_a_bad_checkpoint_ends_the_command_with_the_reason(start: Start, tmp_path: Path) -> None:
    process = start("--model-path", str(tmp_path / "nowhere"))
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (1, "")
    assert "nowhere: no such checkpoint folder" in err
    assert "Traceback" not in err


def test_passwords(start: Start, worker: Any, tmp_path: Path) -> None:
    logins = tmp_path / "logins"
    logins.write_text("anna:secret\n")
    url = address(start("--worker", worker.url, "--auth-file", str(logins)))
    assert httpx.get(f"{url}/config").status_code == 401
    with httpx.Client() as client:
        assert client.post(f"{url}/login", data={"username": "anna", "password": "wrong"}).status_code == 400
        assert client.post(f"{url}/login", data={"username": "anna", "password": "secret"}).status_code == 200
        assert client.get(f"{url}/config").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--examples", "/nowhere"], "--examples /nowhere: no such folder"),
        (["--auth-file", "/nowhere"], "--auth-file /nowhere: cannot be read"),
        (["--auth-file", "/dev/null"], "expected one user:password a line"),
        (["--questions", "/nowhere"], "--questions /nowhere: cannot be read"),
        (["--api-key-file", "/dev/null"], "holds no key"),
        (["--port", "99999"], "cannot listen on"),
        (["--collect-feedback", "/dev/null/votes.jsonl"], "--collect-feedback /dev/null/votes.jsonl: cannot be"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments: list[str], why: str) -> None:
    with pytest.raises(MedllavaError, match=why):
        main(["--worker", "http://127.0.0.1:9", *arguments])


def test_a_damaged_example_is_left_out(start: Start, worker: Any, tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    url = address(start("--worker", worker.url, "--examples", str(folder)))
    config = json.dumps(httpx.get(f"{url}/config").json())
    assert "example 1" in config and "example 2" not in config


def test_the_address_told_is_one_that_can_be_opened() -> None:
    assert address_line("127.0.0.1", 7860, "") == "web chat on http://127.0.0.1:7860 (Ctrl-C ends it)"
    behind = "web chat on http://127.0.0.1:7860 (behind the proxy under /chat; Ctrl-C ends it)"
    assert address_line("127.0.0.1", 7860, "/chat") == behind
    assert "http://[::1]:7860 " in address_line("::1", 7860, "")
