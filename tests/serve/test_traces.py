"""What a chat leaves behind, and what it asks of a network: nothing, from the commands as a person starts them."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medllava.images import load_image, to_data_uri

Start = Callable[..., "subprocess.Popen[str]"]

SECRET = "Does Mrs Zyxwv-4711 have a gland here?"

# Loaded by every Python process that is started with its folder on PYTHONPATH.
WATCH = """
import os, sys
_log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND)

def _watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        os.write(_log, f"open {arguments[0]!r}\\n".encode())
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        os.write(_log, f"connect {arguments[1][0]}\\n".encode())
        if arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(101, "no network here")
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "::1", "localhost", None, b"127.0.0.1"):
        os.write(_log, f"connect {arguments[0]}\\n".encode())
        raise OSError(101, "no network here")

sys.addaudithook(_watch)
"""


@contextmanager
def watching(place: Path) -> Iterator[Start]:
    """Start commands that note each file they open for writing and each address they connect to, in ``watched.log``;
    in a folder and a home of their own."""
    site, home = place / "site", place / "home"
    for folder in (site, home, place / "here", place / "temporary"):
        folder.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)
    (place / "watched.log").touch()
    processes: list[subprocess.Popen[str]] = []
    repository = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ, "PYTHONPATH": f"{site}:{repository}", "WATCH_LOG": str(place / "watched.log"),
        "HOME": str(home), "TMPDIR": str(place / "temporary"), "XDG_CACHE_HOME": str(home / ".cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(module: str, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"medllava.serve.{module}", *arguments], text=True, cwd=place / "here",
            stdout=subprocess.PIPE, stderr=stderr, env=environment,
        )
        processes.append(process)
        return process

    try:
        yield run
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Start]:
    with watching(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with a name and a note that must not be found anywhere else."""
    notes = PngInfo()
    notes.add_text("Comment", "Zyxwv-4711")
    path = tmp_path_factory.mktemp("slide") / "Zyxwv-4711.png"
    values = np.random.default_rng(4711).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, pnginfo=notes)
    return path


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def chat(watched: Any, tiny: Path, slide: Path, folder: Path) -> tuple[str, list[str]]:
    """A conversation through the web page's endpoint, the worker's own API and the terminal; what they logged."""
    worker = watched("worker", "--model-path", str(tiny), "--port", "0", "--log-json")
    url = line_of(worker).removeprefix("listening on ").strip()
    web = watched("web", "--worker", url, "--port", "0")
    page = line_of(web).split()[3]
    assert line_of(worker).startswith("ready")
    client = Client(page, verbose=False, download_files=str(folder), analytics_enabled=False)
    uri = to_data_uri(load_image(slide))
    texts = [client.predict(uri, SECRET, api_name="/ask")["text"]]
    with pytest.raises(AppError):
        client.predict("data:image/png;base64,Zyxwv4711", SECRET, api_name="/ask")
    asker = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    content: Any = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": SECRET}]
    question: Any = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 9}
    texts.append(asker.chat.completions.create(**question).choices[0].message.content)
    assert list(asker.chat.completions.create(**question, stream=True))
    with pytest.raises(openai.BadRequestError):
        asker.chat.completions.create(**{**question, "temperature": 9})
    cli = watched("cli", "--model-path", str(tiny), "--image-file", str(slide), "--prompt", SECRET, "--json")
    out, told = cli.communicate(timeout=600)
    texts.append(json.loads(out)["text"])
    assert len(texts) == 3
    logs = [told]
    for process in (web, worker):
        process.terminate()
        rest, log = process.communicate(timeout=120)
        logs += [rest, log]
    return uri, logs


@dataclass(frozen=True)
class Chatted:
    """A chat that is over: its picture as it was sent, what the commands logged, their folder, and when it began."""

    uri: str
    logs: list[str]
    place: Path
    began: float


@pytest.fixture(scope="module")
def chatted(tiny: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Chatted:
    began, place = time.time(), tmp_path_factory.mktemp("watched")
    with watching(place) as start:
        return Chatted(*chat(start, tiny, slide, tmp_path_factory.mktemp("client")), place, began)


def test_after_a_chat_nothing_on_disk_or_in_a_log_holds_it(
    chatted: Chatted, slide: Path, tmp_path: Path, holding: Any
) -> None:
    uri, logs, place, began = chatted.uri, chatted.logs, chatted.place, chatted.began
    pixels = base64.b64decode(uri.partition(",")[2])
    signs = [b"Zyxwv", b"Mrs ", pixels[3000:3040], uri[3000:3040].encode(), slide.read_bytes()[3000:3040]]
    assert any("chatcmpl" in log for log in logs)
    for log in logs:
        assert not any(sign in log.encode() for sign in signs), log
    roots = [*(Path(place) for place in ("/tmp", "/dev/shm", "/var/tmp", Path.home())), place]
    found = holding(signs[:1] + signs[2:], roots, began)
    assert {path for path in found if path.suffix != ".py"} - {slide} == set()
    (tmp_path / "leak").write_bytes(b".." + pixels[2900:3100])
    assert tmp_path / "leak" in holding(signs[:1] + signs[2:], [tmp_path], began)  # the search finds what it looks for
    # Not even for a moment: no process opened a file for writing, but Gradio's folder, the list of fonts of a library
    # of Gradio's, and the files of random names with which Python tries a folder for temporary files.
    written = {line.partition(" ")[2] for line in (place / "watched.log").read_text().splitlines() if "open" in line}
    assert [name for name in written if "Zyxwv" in name] == []
    allowed = re.compile(r"'/dev/null'|\d+|.*/medllava-web-.*|.*/\.cache/matplotlib/.*|'.*/temporary/[a-z0-9_]{8}'")
    assert [name for name in written if not allowed.fullmatch(name)] == []
    assert list((place / "here").rglob("*")) == []
    assert [path for path in (place / "temporary").rglob("*") if path.is_file()] == []


def test_nothing_is_asked_of_a_network(chatted: Chatted) -> None:
    """A connection to anywhere else is refused and noted."""
    log = (chatted.place / "watched.log").read_text().splitlines()
    asked = {line.split()[1] for line in log if line.startswith("conn")}
    assert asked and asked <= {"127.0.0.1", "::1", "localhost"}


ALONE = """
import fcntl, json, os, socket, struct, subprocess, sys, time
# The loopback device of this network namespace, which has no other.
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError:
    pass
else:
    sys.exit("there is a network")
model, picture, folder = sys.argv[1:]
web = subprocess.Popen(
    [sys.executable, "-m", "medllava.serve.web", "--model-path", model, "--port", "0"], stdout=subprocess.PIPE,
    text=True,
)
url = web.stdout.readline().split()[3]
from gradio_client import Client
from medllava.images import load_image, to_data_uri
client = Client(url, verbose=False, download_files=folder, analytics_enabled=False)
for _ in range(2000):
    try:
        reply = client.predict(to_data_uri(load_image(picture)), "What is here?", api_name="/ask")
        break
    except Exception as error:
        if "loading" not in str(error):
            raise
        time.sleep(0.2)
assert reply["model"] == "tiny", reply
web.terminate()
web.wait(120)
done = subprocess.run(
    [sys.executable, "-m", "medllava.serve.cli", "--model-path", model, "--image-file", picture, "--prompt", "x",
     "--json"], capture_output=True, text=True, check=True,
)
assert json.loads(done.stdout)["model"] == "tiny"
print("answered without a network")
"""


def test_all_runs_where_there_is_no_network(tiny: Path, slide: Path, tmp_path: Path, repository: Path) -> None:
    alone = ["unshare", "--net", "--map-root-user"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("this system lets no user make a network namespace; see the test before this one")
    done = subprocess.run(
        [*alone, sys.executable, "-c", ALONE, str(tiny), str(slide), str(tmp_path)], cwd=repository, timeout=600,
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "answered without a network" in done.stdout


def test_no_name_reaches_a_file_through_the_web(worker: Any, watched: Any, tmp_path: Path, tiny: Path) -> None:
    """Paths in every place where a browser may send a name, at the page and at the worker."""
    secret = tmp_path / "here" / "secret.png"
    Image.new("RGB", (30, 20), "red").save(secret)
    held = secret.read_bytes()
    # Its complaints about nonsense are not read here, and must not fill a pipe.
    process = watched("web", "--worker", worker.url, "--port", "0", stderr=subprocess.DEVNULL)
    page = line_of(process).split()[3]
    names = [
        str(secret), f"..{secret}", "../" * 12 + str(secret).lstrip("/"), "secret.png", "./secret.png",
        "%2e%2e%2f" * 12 + str(secret).lstrip("/").replace("/", "%2f"), f"file://{secret}", "/etc/passwd",
        "..%5c..%5cetc%5cpasswd", "/proc/self/environ",
    ]
    places = [
        "gradio_api/file=", "file=", "gradio_api/file/", "file/", "static/", "assets/", "svelte/", "proxy=",
        "gradio_api/proxy=", "gradio_api/stream/", "gradio_api/custom_component/x/client/component/", "slides/0/",
        "tiles/", "gradio_api/deep_link?session_hash=", "",
    ]
    base = page.removeprefix("http://")
    host, port = base.split(":")
    import http.client

    for place in places:
        for name in names:
            asker = http.client.HTTPConnection(host, int(port), timeout=60)  # httpx would tidy the path up
            asker.request("GET", f"/{place}{name}".replace(" ", "%20"))
            reply = asker.getresponse()
            body = reply.read()
            asker.close()
            assert held not in body and b"root:x:" not in body and b"WATCH_LOG" not in body, (place, name)
            assert reply.status < 500 or place == "", (place, name, reply.status)
    upload = httpx.post(f"{page}/gradio_api/upload", files={"files": ("../../../../tmp/evil.png", held)})
    assert upload.status_code >= 400 or "medllava-web-" in upload.text
    assert not list(tmp_path.rglob("evil.png")) and not Path("/tmp/evil.png").exists()
    client = Client(page, verbose=False, download_files=str(tmp_path / "client"), analytics_enabled=False)
    for name in (str(secret), f"file://{secret}", "/etc/passwd", worker.url):
        with pytest.raises(AppError, match="data URI"):
            client.predict(name, "What is here?", api_name="/ask")
    # The page's own handlers, called as a browser does, with a path where a picture should be.
    config = httpx.get(f"{page}/config").json()
    for dependency in config["dependencies"]:
        count = len(dependency["inputs"])
        for data in (str(secret), {"uri": str(secret)}, [str(secret)]):
            body = {
                "fn_index": dependency["id"], "session_hash": "abc", "data": [data] * count,
                "event_data": {"uri": str(secret), "number": str(secret), "text": str(secret), "kind": str(secret)},
            }
            httpx.post(f"{page}/gradio_api/queue/join", json=body)
    said = b""
    try:
        with httpx.stream("GET", f"{page}/gradio_api/queue/data?session_hash=abc", timeout=5) as stream:
            for part in stream.iter_bytes():
                said += part
    except httpx.HTTPError:
        pass
    pixels = base64.b64encode(held)[40:80]
    assert said and pixels not in said
    assert b"data:image/png;base64" not in said and b"data:image/jpeg;base64" not in said


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "tiny/../../x", "\x00", "a" * 5000, "", "tiny\n"])
def test_a_model_name_is_no_path(start_worker: Any, name: str) -> None:
    worker = start_worker()
    body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
    reply = httpx.post(f"{worker.url}/v1/chat/completions", json=body)
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
    assert len(reply.text) < 1000
