"""The lines of curl and Python in the READMEs, taken out of the files and run against a real worker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medllava.images import to_data_uri
from medllava.model.answerer import Answerer
from medllava.model.tiny import tiny_checkpoint

CURL = shutil.which("curl")


def blocks(path: Path) -> list[str]:
    """The indented blocks of a page, without the indentation."""
    found = re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", path.read_text(encoding="utf-8"))
    return [re.sub("(?m)^    ", "", block).strip("\n") + "\n" for block in found]


def curl_lines(path: Path) -> list[str]:
    """The command lines with curl, continued lines joined."""
    # A command goes on over a backslash at the end of a line and while a quotation is open.
    lines = [""]
    for line in "".join(blocks(path)).splitlines():
        lines[-1] += line.removesuffix("\\")
        if not line.endswith("\\") and lines[-1].count("'") % 2 == 0:
            lines.append("")
    return [line for line in lines if re.search(r"^curl |\| *curl ", line)]


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    """A small model of the name that the pages use."""
    folder = tmp_path_factory.mktemp("demo-out") / "stage2"
    tiny_checkpoint(folder)
    return Answerer.load(folder, device="cpu")


@pytest.fixture
def real(start_worker: Any, stage2: Answerer, tmp_path: Path) -> Any:
    """Its worker, and a folder with a picture to ask about and the file of a question."""
    image = Image.effect_noise((120, 90), 60).convert("RGB")
    image.save(tmp_path / "tissue.png")
    content = [{"type": "image_url", "image_url": {"url": to_data_uri(image)}}, {"type": "text", "text": "Where?"}]
    question = {"model": "stage2", "messages": [{"role": "user", "content": content}], "answer": "here", "cells": 2}
    (tmp_path / "question.json").write_text(json.dumps(question))
    return start_worker(load=lambda: stage2)


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
@pytest.mark.parametrize("page", ["README.md", "serve/README.md"])
def test_the_lines_with_curl(real: Any, repository: Path, tmp_path: Path, page: str) -> None:
    lines = curl_lines(repository / page)
    assert lines
    for line in lines:
        assert "http://127.0.0.1:8000" in line
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line.replace("http://127.0.0.1:8000", real.url)], cwd=tmp_path,
            capture_output=True, text=True, timeout=600, check=True,
        )
        body = done.stdout
        if body.startswith("{"):
            reply = json.loads(body)
            assert "error" not in reply, line
            assert reply.get("object") in {"list", "chat.completion"} or "drops" in reply
        else:
            assert body.startswith("data: {") and body.rstrip().endswith("data: [DONE]"), line


def test_the_python_of_the_serve_page(real: Any, repository: Path, tmp_path: Path) -> None:
    (block,) = [block for block in blocks(repository / "serve" / "README.md") if "from openai import OpenAI" in block]
    done = subprocess.run(
        [sys.executable, "-c", block.replace("http://127.0.0.1:8000", real.url)], cwd=tmp_path, capture_output=True,
        text=True, timeout=600, check=True,
    )
    assert done.stdout.strip() and done.stderr == ""
