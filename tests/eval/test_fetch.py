"""Downloads against a real HTTP server that breaks off, refuses, lies and forgets."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from medllava.errors import ConfigError
from medllava.eval import __main__ as commands
from medllava.eval.benchmarks import Benchmark, DataFile
from medllava.eval.fetch import Fetcher

CONTENT = {f"data/test-{n:02}.bin": bytes([n]) * (5000 + n) for n in range(20)}


def archive(names: dict[str, str]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        for name, text in names.items():
            file.writestr(name, text)
    return held.getvalue()


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {**CONTENT, "images.zip": archive({"a/1.txt": "one"}), "README.md": b"no"}
        self.lost: set[str] = set()
        self.cut: dict[str, int] = {}
        self.broken: set[str] = set()
        self.changed: set[str] = set()
        self.gets: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.gated = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.gated and self.headers.get("Authorization") != "Bearer let-me-in":
            return self.send(401, b"ask first")
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/some/set/tree"):
            rows = [
                {"type": "file", "path": name, "size": len(data),
                 "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}}
                for name, data in hub.files.items()
            ]
            return self.send(200, json.dumps(rows).encode())
        name = path.removeprefix("/datasets/some/set/resolve/main/").removeprefix("/plain/")
        hub.gets[name] += 1
        if name in hub.lost:
            return self.send(404, b"gone")
        if name in hub.broken:
            return self.send(500, b"broken")
        data = b"x" * len(hub.files[name]) if name in hub.changed else hub.files[name]
        begun = 0
        if self.headers.get("Range"):
            hub.ranges.append(f"{name} {self.headers['Range']}")
            begun = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send(206 if begun else 200, data[begun:], cut=hub.cut.pop(name, None))

    def send(self, status: int, data: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SET = Benchmark(name="some", files=(
    DataFile(hub="some/set", path="data/*.bin"), DataFile(hub="some/set", path="images.zip", unzip=True),
))


def fetch(hub: Hub, out: Path, benchmark: Benchmark = SET, token: str = "") -> dict[str, tuple[str, str]]:
    with httpx.Client(timeout=60) as client:
        found = Fetcher(client, out, hub.url, token, wait_s=0.001).fetch(benchmark)
    return {status.path: (status.state, status.reason) for status in found}


def test_lost_and_broken_files_do_not_stop_the_others(hub: Hub, tmp_path: Path) -> None:
    hub.lost = {"data/test-03.bin", "data/test-07.bin"}
    hub.broken = {"data/test-09.bin"}
    hub.changed = {"data/test-11.bin"}
    hub.cut = {"data/test-05.bin": 1000}
    found = fetch(hub, tmp_path)
    assert Counter(state for state, _ in found.values()) == {"have": 17, "missing": 3, "corrupt": 1}
    assert "HTTP 404" in found["data/test-03.bin"][1] and "HTTP 500" in found["data/test-09.bin"][1]
    assert "SHA-256" in found["data/test-11.bin"][1]
    assert not (tmp_path / "data" / "test-11.bin").exists(), "what is wrong is not left where it is read"
    assert "data/test-05.bin bytes=1000-" in hub.ranges, "gone on with where it broke off"
    assert (tmp_path / "data" / "test-05.bin").read_bytes() == CONTENT["data/test-05.bin"]
    assert (tmp_path / "images" / "a" / "1.txt").read_text() == "one"
    assert not (tmp_path / "README.md").exists()
    hub.lost, hub.broken, hub.changed = set(), set(), set()
    hub.gets.clear()
    assert {state for state, _ in fetch(hub, tmp_path).values()} == {"have"}
    assert sorted(hub.gets) == [f"data/test-{n:02}.bin" for n in (3, 7, 9, 11)], "only what was not there"


def test_a_killed_download_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "data" / "test-01.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT["data/test-01.bin"][:4000])
    assert fetch(hub, tmp_path)["data/test-01.bin"] == ("have", "")
    assert hub.ranges == ["data/test-01.bin bytes=4000-"]


def test_check_makes_no_call_and_finds_what_was_changed(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    definition = tmp_path / "some.yaml"
    definition.write_text('name: some\nfiles: [{hub: some/set, path: "data/*.bin"}]\n')
    line = ["fetch", str(definition), "--out", str(tmp_path / "out"), "--hub", hub.url]
    assert commands.main(line) == 0
    assert "20 have, 0 missing, 0 corrupt" in capsys.readouterr().out
    (tmp_path / "out" / "data" / "test-02.bin").unlink()
    (tmp_path / "out" / "data" / "test-04.bin").write_bytes(b"y" * 5004)
    hub.gets.clear()
    assert commands.main([*line, "--check"]) == 0
    said = capsys.readouterr().out
    assert "18 have, 1 missing, 1 corrupt" in said and "corrupt data/test-04.bin" in said
    assert not hub.gets
    assert commands.main([*line, "--check", "--strict"]) == 1
    assert commands.main([*line, "--strict"]) == 0
    assert sorted(hub.gets) == ["data/test-02.bin", "data/test-04.bin"]
    report = json.loads((tmp_path / "out" / "fetch_report.json").read_text())
    assert len(report) == 20 and {row["state"] for row in report} == {"have"}


def test_a_set_that_must_be_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    state, reason = fetch(hub, tmp_path)["data/*.bin"]
    assert state == "missing" and "ask for access there" in reason
    assert {state for state, _ in fetch(hub, tmp_path, token="let-me-in").values()} == {"have"}


def test_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    other = Benchmark(name="o", files=(DataFile(url=f"{hub.url}/plain/README.md", path="r.md"),))
    with httpx.Client(timeout=60) as client:
        Fetcher(client, tmp_path, "http://127.0.0.1:1", "secret", wait_s=0.001).fetch(other)
    assert hub.tokens == {None}


def test_a_plain_file_is_held_against_its_own_or_its_first_checksum(hub: Hub, tmp_path: Path) -> None:
    right = hashlib.sha256(b"no").hexdigest()
    url = f"{hub.url}/plain/README.md"
    wrong = Benchmark(name="o", files=(DataFile(url=url, path="r.md", sha256="0" * 64),))
    assert fetch(hub, tmp_path, wrong)["r.md"] == ("corrupt", "its SHA-256 is not the published one")
    told = Benchmark(name="o", files=(DataFile(url=url, path="r.md", sha256=right),))
    assert fetch(hub, tmp_path, told)["r.md"] == ("have", "")
    first = Benchmark(name="o", files=(DataFile(url=url, path="f.md"),))
    assert fetch(hub, tmp_path, first)["f.md"] == ("have", "")
    (tmp_path / "f.md").unlink()
    hub.changed = {"README.md"}
    assert fetch(hub, tmp_path, first)["f.md"] == ("corrupt", "its SHA-256 is not that of the first time")


def test_an_archive_that_leaves_its_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["images.zip"] = archive({"../../outside.txt": "x"})
    state, reason = fetch(hub, tmp_path / "deep" / "out")["images.zip"]
    assert state == "corrupt" and "would be written outside" in reason
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_set_without_files_says_where_they_are_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no files to fetch"):
        commands.main(["fetch", "grounding", "--out", str(tmp_path)])

