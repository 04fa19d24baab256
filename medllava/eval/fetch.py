"""Get a benchmark's files: resumed where they broke off, checked by size and SHA-256, with a report of what is there.

The Hugging Face hub tells sizes and checksums of its files; of others the checksum is in the definition, or the one of
the first download is kept in --out/fetched.json and held against later ones. Nothing else in this package downloads
anything. Sets that must be asked for say where; give the token of an account that has been let in.

example:
  medllava eval fetch path_vqa --out data/path_vqa
  medllava eval fetch path_vqa --out data/path_vqa --check
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medllava.errors import ConfigError, DataError, ServiceError
from medllava.jsonl import file_sha256

if TYPE_CHECKING:
    import httpx

    from medllava.eval.benchmarks import Benchmark, DataFile

HELP = "download a benchmark's files, resumed and checked; report what is there, missing or corrupt"

HUB = "https://huggingface.co"
TRIES = 4

log = logging.getLogger(__name__)

State = Literal["have", "missing", "corrupt"]


@dataclass(frozen=True)
class Item:
    """One file to be had. ``size`` and ``sha256`` are None where nobody tells them."""

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    unzip: bool = False


@dataclass(frozen=True)
class Status:
    path: str
    state: State
    reason: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="name in eval/benchmarks, or path of a YAML definition")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--check", action="store_true", help="download nothing: only say what is there")
    parser.add_argument("--strict", action="store_true", help="exit 1 unless everything is there")
    parser.add_argument("--hub", default=os.environ.get("HF_ENDPOINT", HUB), help="the hub or a mirror (HF_ENDPOINT)")
    parser.add_argument("--token-file", type=Path, help="file with the hub's token (default: HF_TOKEN)")


def run(arguments: argparse.Namespace) -> int:
    import httpx

    from medllava.eval.benchmarks import load_benchmark
    from medllava.jsonl import write_json

    benchmark = load_benchmark(arguments.benchmark)
    if not benchmark.files:
        asked = f"ask for the data at {benchmark.request}" if benchmark.request else "give your own with --questions"
        raise ConfigError(f"benchmark {benchmark.name} names no files to fetch; {asked}")
    token = os.environ.get("HF_TOKEN", "")
    if arguments.token_file:
        try:
            token = arguments.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"--token-file {arguments.token_file}: cannot be read ({error.strerror})") from error
    with httpx.Client(follow_redirects=True, timeout=60) as client:
        fetcher = Fetcher(client, arguments.out, arguments.hub.rstrip("/"), token)
        found = fetcher.check(benchmark) if arguments.check else fetcher.fetch(benchmark)
    write_json(arguments.out / "fetch_report.json", [asdict(status) for status in found])
    for status in found:
        print(f"{status.state:<8}{status.path}{'  ' + status.reason if status.reason else ''}")
    counts = {state: sum(status.state == state for status in found) for state in ("have", "missing", "corrupt")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    complete = counts["have"] == len(found)
    if not complete and benchmark.request:
        print(f"this set may have to be asked for: {benchmark.request}")
    return 1 if arguments.strict and not complete else 0


class Fetcher:
    """Downloads into ``out``; what it knows of each file is in ``out/fetched.json``."""

    def __init__(self, client: httpx.Client, out: Path, hub: str, token: str = "", wait_s: float = 1.0) -> None:
        self.client = client
        self.out = out
        self.hub = hub
        self.token = token
        self.wait_s = wait_s
        self._record = out / "fetched.json"
        self._known: dict[str, dict[str, Any]] = {}
        if self._record.exists():
            from medllava.jsonl import read_json

            self._known = read_json(self._record)

    def fetch(self, benchmark: Benchmark) -> list[Status]:
        """Get what is missing or corrupt; one file's failure does not stop the others."""
        found = []
        for file in benchmark.files:
            try:
                items = list(self._items(file))
            except ServiceError as error:
                found.append(Status(file.path, "missing", str(error)))
                continue
            found += [self._get(item) for item in items]
        return found

    def check(self, benchmark: Benchmark) -> list[Status]:
        """What is there, by the record of earlier downloads alone: no call is made."""
        found = []
        for file in benchmark.files:
            items = [
                Item(path, row["url"], row.get("size"), row.get("sha256"), file.unzip)
                for path, row in self._known.items()
                if fnmatch.fnmatch(path, file.path)
            ]
            if not items and file.url:
                items = [Item(file.path, file.url, None, file.sha256, file.unzip)]
            found += [self._state(item) for item in items] or [Status(file.path, "missing", "never fetched")]
        return found

    def _items(self, file: DataFile) -> Iterator[Item]:
        if file.url:
            yield Item(file.path, file.url, None, file.sha256, file.unzip)
            return
        if not file.hub:
            raise ConfigError(f"file {file.path}: needs 'url' or 'hub'")
        url: str | None = f"{self.hub}/api/datasets/{file.hub}/tree/main?recursive=true"
        some = False
        while url:
            response = self._ask("GET", url)
            for row in response.json():
                if row.get("type") == "file" and fnmatch.fnmatch(row["path"], file.path):
                    some = True
                    lfs = row.get("lfs") or {}
                    place = f"{self.hub}/datasets/{file.hub}/resolve/main/{row['path']}"
                    yield Item(row["path"], place, lfs.get("size", row.get("size")), lfs.get("oid"), file.unzip)
            url = response.links.get("next", {}).get("url")
        if not some:
            raise ServiceError(f"{self.hub}/datasets/{file.hub} has no file {file.path}")

    def _state(self, item: Item) -> Status:
        path = self.out / item.path
        if not path.is_file():
            return Status(item.path, "missing", "" if item.path in self._known else "never fetched")
        wanted = item.sha256 or self._known.get(item.path, {}).get("sha256")
        if item.size is not None and path.stat().st_size != item.size:
            return Status(item.path, "corrupt", f"{path.stat().st_size:,} bytes, expected {item.size:,}")
        if wanted and file_sha256(path) != wanted:
            return Status(item.path, "corrupt", "its SHA-256 is another one")
        return Status(item.path, "have", "" if wanted else "no checksum to hold it against")

    def _get(self, item: Item) -> Status:
        state = self._state(item)
        if state.state == "have" and item.path in self._known:
            return self._unzipped(item, state)
        try:
            state = self._download(item)
        except ServiceError as error:
            return Status(item.path, "missing", str(error))
        return self._unzipped(item, state) if state.state == "have" else state

    def _download(self, item: Item) -> Status:
        """Into a .part file, gone on with where it broke off, and renamed only when it is whole and right."""
        from tqdm import tqdm

        path = self.out / item.path
        part = path.with_name(path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        fault = ""
        for tried in range(TRIES):
            if tried:
                time.sleep(self.wait_s * 2 ** (tried - 1))
            begun = part.stat().st_size if part.exists() else 0
            if item.size is not None and begun > item.size:
                part.unlink()
                begun = 0
            try:
                if item.size is None or begun < item.size:
                    with tqdm(total=item.size, initial=begun, desc=item.path, unit="B", unit_scale=True) as progress:
                        fault = self._append(item, part, begun, progress)
                    if fault:
                        continue
            except _Interrupted as error:
                fault = str(error)
                continue
            fault = self._wrong(item, part)
            if not fault:
                part.replace(path)
                self._note(item, path)
                return Status(item.path, "have")
            part.unlink()
        return Status(item.path, "corrupt" if "SHA-256" in fault or "bytes" in fault else "missing", fault)

    def _append(self, item: Item, part: Path, begun: int, progress: Any) -> str:
        """One try. Returns what is wrong with the answer, or nothing."""
        import httpx

        headers = {**self._headers(item.url), **({"Range": f"bytes={begun}-"} if begun else {})}
        expected: int | None = None
        try:
            with self.client.stream("GET", item.url, headers=headers) as response:
                if response.status_code == 416:
                    part.unlink(missing_ok=True)
                    return "HTTP 416"
                self._refuse(response, item.url)
                if response.status_code != 206:
                    begun = 0
                length = response.headers.get("content-length")
                expected = begun + int(length) if length and not response.headers.get("content-encoding") else None
                with part.open("ab" if begun else "wb") as file:
                    for chunk in response.iter_raw():  # As it comes: what arrived before a break is kept.
                        file.write(chunk)
                        progress.update(len(chunk))
        except httpx.HTTPError as error:
            raise _Interrupted(f"{item.url}: {type(error).__name__} {error}".strip()) from error
        got = part.stat().st_size
        return f"{got:,} bytes came of {expected:,}" if expected is not None and got < expected else ""

    def _wrong(self, item: Item, part: Path) -> str:
        size = part.stat().st_size
        if item.size is not None and size != item.size:
            return f"{size:,} bytes, expected {item.size:,}"
        wanted = item.sha256 or self._known.get(item.path, {}).get("sha256")
        if wanted and file_sha256(part) != wanted:
            return f"its SHA-256 is not {'the published one' if item.sha256 else 'that of the first time'}"
        return ""

    def _refuse(self, response: httpx.Response, url: str) -> None:
        if response.status_code in {401, 403}:
            raise ServiceError(f"{url}: HTTP {response.status_code}: ask for access there, then give --token-file")
        if response.status_code >= 500 or response.status_code == 429:
            raise _Interrupted(f"{url}: HTTP {response.status_code}")
        if response.status_code >= 400:
            raise ServiceError(f"{url}: HTTP {response.status_code}")

    def _ask(self, method: str, url: str) -> httpx.Response:
        import httpx

        fault = ""
        for tried in range(TRIES):
            if tried:
                time.sleep(self.wait_s * 2 ** (tried - 1))
            try:
                response = self.client.request(method, url, headers=self._headers(url))
                self._refuse(response, url)
                response.json()
                return response
            except (httpx.HTTPError, _Interrupted, json.JSONDecodeError) as error:
                fault = str(error) or type(error).__name__
        raise ServiceError(f"{url}: no answer after {TRIES} tries ({fault})")

    def _headers(self, url: str) -> dict[str, str]:
        # The token is the hub's: no other host gets it.
        plain = {"Accept-Encoding": "identity"}
        return {**plain, "Authorization": f"Bearer {self.token}"} if self.token and url.startswith(self.hub) else plain

    def _note(self, item: Item, path: Path) -> None:
        from medllava.jsonl import write_json

        self._known[item.path] = {"url": item.url, "size": path.stat().st_size, "sha256": file_sha256(path)}
        write_json(self._record, self._known)

    def _unzipped(self, item: Item, state: Status) -> Status:
        """Unpack an archive once, into a folder of its own name."""
        if not item.unzip:
            return state
        path = self.out / item.path
        target = path.with_suffix("")
        done = target / ".unpacked"
        if done.exists() and done.read_text() == self._known[item.path]["sha256"]:
            return state
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if not (target / member.filename).resolve().is_relative_to(target.resolve()):
                        raise DataError(f"{path}: member {member.filename!r} would be written outside {target}")
                    archive.extract(member, target)
        except (zipfile.BadZipFile, DataError) as error:
            return Status(item.path, "corrupt", str(error))
        done.write_text(self._known[item.path]["sha256"])
        return state


class _Interrupted(Exception):
    """A fault that may pass: the download is gone on with."""
