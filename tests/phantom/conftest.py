from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medllava.phantom.__main__ import main


@pytest.fixture(scope="session")
def flags() -> list[str]:
    """What makes the videos of the ``videos`` fixture."""
    return ["--fields", "3", "--seed", "5"]


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    """Four short phantom videos with everything beside them."""
    out = tmp_path_factory.mktemp("videos")
    assert main(["--out", str(out), "--videos", "4", "--workers", "1", *flags]) == 0
    return out


@pytest.fixture(scope="session")
def truths(videos: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(videos.glob("*.truth.json"))]
