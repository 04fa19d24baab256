"""The web chat: open a field of view or a whole slide, mark a region, ask, and see the answer's boxes on the image.

    python -m medllava.serve.web --model-path demo-out/stage2
    python -m medllava.serve.web --model-path demo-out/stage2 --slides /data/slides
    python -m medllava.serve.web --worker http://127.0.0.1:8000 --worker http://127.0.0.1:8001

With --model-path it starts a worker of its own and ends it again. The page talks to workers only over HTTP. Pictures
and questions are kept in memory, for as long as the page is open; none is written to disk, and nothing is fetched from
a network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medllava.errors import ConfigError, DataError, MissingExtraError, ServiceError, run_cli
from medllava.images import load_image
from medllava.jsonl import Appender

if TYPE_CHECKING:
    from medllava.serve.tiles import ShownSlide

EXAMPLE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
QUESTIONS = (
    "What is in this region?",
    "What do you see in this image?",
    "Where is the gland?",
    "Mark the blood vessel in this image.",
    "Is there necrosis in this image?",
)


class OwnWorker:
    """A worker that this command starts on a free port, and ends. The page is there while its model loads."""

    def __init__(self, model_path: Path, options: Sequence[str]) -> None:
        self._model_path = model_path
        command = [sys.executable, "-m", "medllava.serve.worker", "--model-path", str(model_path), "--port", "0"]
        # Its standard input closes with this process, however that ends, and the worker ends with it.
        self._process = subprocess.Popen(
            [*command, "--stop-with-stdin", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._started = time.monotonic()

    def url(self) -> str:
        """Where it answers, once it listens. Raises ServiceError if it ends before; it has then said why on stderr."""
        url = self._line().removeprefix("listening on ").strip()
        if not url:
            raise self._ended()
        return url

    def watch(self) -> None:
        """Say when the model is there, and wait until the worker ends, which it should not: raises ServiceError."""
        if self._line().startswith("ready"):
            print(f"model loaded in {time.monotonic() - self._started:.0f} s", file=sys.stderr)
        self._process.wait()
        raise self._ended()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _ended(self) -> ServiceError:
        code = self._process.wait()
        killed = " (it was killed, most often because the memory ran out)" if code == -signal.SIGKILL else ""
        return ServiceError(f"the worker for {self._model_path} ended{killed}; its own message, if any, is above")


def read_logins(path: Path | None) -> list[tuple[str, str]] | None:
    """Pairs from a file with one ``user:password`` a line. Raises ConfigError."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--auth-file {path}: cannot be read ({error.strerror})") from error
    logins = [tuple(line.split(":", 1)) for line in lines]
    if not logins or any(len(login) != 2 or not all(login) for login in logins):
        raise ConfigError(f"--auth-file {path}: expected one user:password a line")
    return logins  # type: ignore[return-value]


def find_examples(folder: Path | None) -> list[Path]:
    """The pictures of a folder, by name; what cannot be opened is named and left out. Raises DataError if there is no
    such folder."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise DataError(f"--examples {folder}: no such folder")
    examples = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in EXAMPLE_TYPES):
        try:
            load_image(path)
        except DataError as error:
            print(f"warning: example left out: {error}", file=sys.stderr)
        else:
            examples.append(path)
    return examples


def open_slides(path: Path | None) -> list[ShownSlide]:
    """The slides of a folder, by name, or one slide; in a folder, what cannot be opened is named and left out. Raises
    DataError, MissingExtraError."""
    if path is None:
        return []
    try:
        from medllava.serve.tiles import ShownSlide
    except ImportError as error:
        raise MissingExtraError("fastapi", "serve", error) from error
    from medllava.slides import Slide, find_slides

    slides: list[ShownSlide] = []
    for each in find_slides(path):
        try:
            slide = ShownSlide(Slide(each), len(slides))
            _ = slide.thumbnail
        except DataError as error:
            if path.is_file():
                raise
            print(f"warning: slide left out: {error}", file=sys.stderr)
        else:
            slides.append(slide)
            scale = f"{slide.slide.mpp:g} µm per pixel" if slide.slide.mpp else "no µm per pixel told"
            print(f"slide {each.name}: {slide.size[0]} x {slide.size[1]}, {scale}", file=sys.stderr)
    if not slides:
        raise DataError(f"--slides {path}: none of the files there can be opened as a slide")
    return slides


def check_feedback(path: Path | None) -> None:
    """Raises ConfigError if votes cannot be appended to that file."""
    if path is None:
        return
    try:
        with Appender(path):
            pass
    except OSError as error:
        raise ConfigError(f"--collect-feedback {path}: cannot be written ({error.strerror})") from error


def free_port(host: str, port: int) -> int:
    """``port`` if it can be listened on, any free one for 0. Raises ConfigError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error
        return int(probe.getsockname()[1])


def address_line(host: str, port: int, root_path: str) -> str:
    """Where the page is, for people."""
    place = f"[{host}]" if ":" in host else host
    # The proxy cuts its path off; here, there is nothing under it.
    proxied = f"behind the proxy under {root_path}; " if root_path else ""
    return f"web chat on http://{place}:{port} ({proxied}Ctrl-C ends it)"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Gradio's folder for files, readable by this user only and removed at the end. The page uses none of it."""
    folder = Path(tempfile.mkdtemp(prefix="medllava-web-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="medllava serve.web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-path", type=Path, help="checkpoint folder or hub id: start a worker for it")
    source.add_argument("--worker", action="append", metavar="URL", help="a running worker; repeat for several")
    options.add_argument("--port", type=int, default=7860, help="0 takes any free port (default 7860)")
    options.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default 127.0.0.1)")
    options.add_argument("--examples", type=Path, metavar="DIR", help="folder of pictures to offer")
    options.add_argument("--slides", type=Path, metavar="PATH", help="folder of whole slides, or one, to offer")
    options.add_argument("--questions", type=Path, metavar="FILE", help="sample questions to offer, one a line")
    options.add_argument(
        "--collect-feedback", type=Path, metavar="FILE",
        help="offer thumbs up and down; append each vote with question, answer, region and model to FILE, no picture",
    )
    options.add_argument("--root-path", default="", help="path that a proxy serves the page under, such as /chat")
    options.add_argument("--auth-file", type=Path, help="file with one user:password a line: the page asks for them")
    options.add_argument("--api-key-file", type=Path, help="file whose first line is the workers' API key")
    options.add_argument("--device", help="with --model-path: cuda, cuda:1, mps, cpu or auto")
    options.add_argument("--load-4bit", action="store_true", help="with --model-path: language model in 4 bits")
    options.add_argument("--load-8bit", action="store_true", help="with --model-path: language model in 8 bits")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    examples = find_examples(options.examples)
    slides = open_slides(options.slides)
    logins = read_logins(options.auth_file)
    check_feedback(options.collect_feedback)
    questions: Sequence[str] = QUESTIONS
    if options.questions:
        try:
            lines = options.questions.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"--questions {options.questions}: cannot be read ({error.strerror})") from error
        questions = [line.strip() for line in lines if line.strip()]
    from medllava.serve.worker import LOOPBACK, read_keys

    keys = read_keys(options.api_key_file)
    port = free_port(options.host, options.port)
    if options.host not in LOOPBACK and not logins:
        print(f"warning: {options.host} lets other machines in without a password; see --auth-file", file=sys.stderr)

    # A stopped service gets the same orderly end as Ctrl-C: the worker ends, the private folder goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        stack.enter_context(private_folder())
        # Gradio takes settings from the environment, too (GRADIO_SHARE, GRADIO_ALLOWED_PATHS, ...); here, flags do.
        for name in [name for name in os.environ if name.startswith("GRADIO_") and name != "GRADIO_TEMP_DIR"]:
            del os.environ[name]
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_OFFLINE"] = "1"
        own: OwnWorker | None = None
        if options.model_path:
            passed = ["--device", options.device] if options.device else []
            passed += ["--load-4bit"] * options.load_4bit + ["--load-8bit"] * options.load_8bit
            own = stack.enter_context(contextlib.closing(OwnWorker(options.model_path, passed)))
        try:
            from medllava.serve.client import Worker
            from medllava.serve.page import build, launch
        except ImportError as error:
            raise MissingExtraError("gradio and openai", "serve", error) from error
        urls = options.worker or []
        if own:
            urls = [own.url()]
        page = build(
            [Worker(url, keys[0] if keys else None) for url in urls], examples, questions, slides=slides,
            feedback=options.collect_feedback,
        )
        launch(page, options.host, port, root_path=options.root_path, logins=logins, slides=slides)
        print(address_line(options.host, port, options.root_path), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                if own:
                    own.watch()
                time.sleep(3600)
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
