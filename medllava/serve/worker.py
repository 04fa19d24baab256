"""Serves a model, or several, over HTTP in the OpenAI chat-completions format.

    python -m medllava.serve.worker --model-path demo-out/stage2 --port 8000

The first line on standard output is "listening on http://HOST:PORT"; the model loads while the server already answers
(503 and "still loading"), and "ready: MODEL" follows. Pictures come as data URIs. Nothing of a question is stored.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medllava.errors import CheckpointError, ConfigError, MissingExtraError, is_out_of_memory, run_cli
from medllava.model.hub import display_name, local_folder

if TYPE_CHECKING:
    from medllava.model.answerer import Answerer

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="medllava serve.worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--model-path", required=True, action="append", help="checkpoint folder or hub id; repeat to serve several"
    )
    options.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR",
        help="LoRA folder on the first --model-path, asked for as model NAME; repeat for several",
    )
    options.add_argument("--port", type=int, default=8000, help="0 takes any free port (default 8000)")
    options.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default 127.0.0.1)")
    options.add_argument("--api-key-file", type=Path, help="file with one accepted key a line")
    options.add_argument("--root-path", default="", help="path that a proxy serves this under, such as /worker1")
    options.add_argument("--max-image-mb", type=float, default=20.0, help="largest encoded picture (default 20)")
    options.add_argument("--max-new-tokens", type=int, default=256, help="where a request names none (default 256)")
    options.add_argument("--max-images", type=int, default=8, help="pictures per request (default 8)")
    options.add_argument("--max-request-mb", type=float, default=64.0, help="largest request (default 64)")
    options.add_argument(
        "--allow-image-host", action="append", default=[], metavar="HOST[=ADDRESS]",
        help="fetch pictures from https://HOST/...; ADDRESS for a host of this network (default: from nowhere)",
    )
    options.add_argument("--max-batch", type=int, default=16, help="answers made at the same time (default 16)")
    options.add_argument("--max-waiting", type=int, default=64, help="questions that may wait in line (default 64)")
    options.add_argument("--max-wait-s", type=float, default=300.0, help="longest wait in line (default 300)")
    options.add_argument(
        "--drain-s", type=int, default=30, help="how long a stopped worker finishes answers under way (default 30)"
    )
    options.add_argument(
        "--log-json", action="store_true", help="log JSON lines on stderr, one per request, without its content"
    )
    options.add_argument("--device", help="cuda, cuda:1, mps, cpu, or auto: all cards together (default: the best one)")
    quantised = options.add_mutually_exclusive_group()
    quantised.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    quantised.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    options.add_argument(
        "--stop-with-stdin", action="store_true", help="end when standard input closes, that is with the parent process"
    )
    return options


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of an API key file, one a line; none if there is no file. Raises ConfigError."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise ConfigError(f"--api-key-file {path}: cannot be read ({error.strerror})") from error
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key; write one a line")
    return keys


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=DIR`` of each adapter. Raises ConfigError."""
    adapters = {}
    for entry in given:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder) or name in adapters:
            raise ConfigError(f"--adapter {entry}: expected NAME=DIR, each name once")
        adapters[name] = Path(folder)
    return adapters


def log_to_stderr(*, as_json: bool) -> None:
    """Warnings as text; or JSON lines, with one for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    if as_json:
        from medllava.serve.metrics import JsonLines, requests_log

        handler.setFormatter(JsonLines())
        requests_log.setLevel(logging.INFO)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # TCP by name: only then asyncio sends small pieces at once (TCP_NODELAY). Else each waits, on Linux up to 40 ms,
    # for the client's receipt of the one before, the first text for that of the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def load_fault(error: Exception, path: Path) -> Exception:
    """What to report when the model could not be loaded."""
    if is_out_of_memory(error):
        return CheckpointError(f"{path}: not enough memory to load the model; try --load-4bit or another --device")
    return error


def check_limits(options: argparse.Namespace) -> None:
    """Raises ConfigError where a limit lets nothing through."""
    for name, least in (
        ("max_batch", 1), ("max_new_tokens", 1), ("max_waiting", 0), ("max_images", 0), ("drain_s", 0),
    ):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more")
    for name in ("max_image_mb", "max_request_mb", "max_wait_s"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name):g}: expected more than 0")


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    check_limits(options)
    try:
        import uvicorn

        from medllava.serve.app import create_app
        from medllava.serve.fetch import parse_hosts
        from medllava.serve.intake import Limits
    except ImportError as error:
        raise MissingExtraError("fastapi and uvicorn", "serve", error) from error

    adapters = named_folders(options.adapter)
    folders = [local_folder(name) for name in options.model_path]
    for folder in [*folders, *adapters.values()]:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
    names = [display_name(folder) for folder in folders] + list(adapters)
    if len(set(names)) < len(names):
        raise ConfigError(f"two models of the same name among {', '.join(names)}; rename a folder or an adapter")
    hosts = parse_hosts(options.allow_image_host)
    keys = read_keys(options.api_key_file)
    if options.host not in LOOPBACK and not keys:
        print(
            f"warning: {options.host} lets other machines use this worker without a key; see --api-key-file",
            file=sys.stderr,
        )
    log_to_stderr(as_json=options.log_json)

    def load() -> list[Answerer]:
        from medllava.model.answerer import Answerer

        how = {"device": options.device, "load_4bit": options.load_4bit, "load_8bit": options.load_8bit}
        first, *others = folders
        loaded = Answerer.load_adapters(first, adapters, **how) if adapters else [Answerer.load(first, **how)]
        return [*loaded, *(Answerer.load(folder, **how) for folder in others)]

    outcomes: list[Sequence[Answerer] | Exception] = []

    def on_load(outcome: Sequence[Answerer] | Exception) -> None:
        outcomes.append(outcome)
        if isinstance(outcome, Exception):
            server.should_exit = True
        else:
            print("ready: " + ", ".join(answerer.model_id for answerer in outcome), flush=True)

    app = create_app(
        load,
        limits=Limits(
            max_image_mb=options.max_image_mb, max_images=options.max_images, max_request_mb=options.max_request_mb,
            max_new_tokens=options.max_new_tokens, max_batch=options.max_batch, max_waiting=options.max_waiting,
            max_wait_s=options.max_wait_s,
        ),
        image_hosts=hosts,
        api_keys=keys,
        root_path=options.root_path,
        on_load=on_load,
    )
    # access_log=False: not even addresses are written. A stopped server takes nothing new and finishes what it has.
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="on",
            timeout_graceful_shutdown=options.drain_s,
        )
    )
    # The thread of the models shares the interpreter with that of the connections and should get it back soon.
    sys.setswitchinterval(0.0005)
    listener = listen(options.host, options.port)
    print(f"listening on {url_of(listener)}", flush=True)
    if options.stop_with_stdin:
        def stop_at_end_of_input() -> None:
            sys.stdin.read()
            server.should_exit = True

        threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    failure = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    if failure is not None:
        raise load_fault(failure, folders[0])
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
