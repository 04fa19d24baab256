"""``medllava STAGE ...`` is the same as ``python -m medllava.STAGE ...``."""

from __future__ import annotations

import difflib
import importlib
import sys

from medllava import __version__
from medllava.errors import run_cli

COMMANDS = {
    "demo": ("medllava.demo", "the whole street once: videos, data, training, scores, web chat"),
    "doctor": ("medllava.doctor", "versions, devices, which extras work and why not"),
    "phantom": ("medllava.phantom.__main__", "make narrated videos with known truth"),
    "phantom.questions": ("medllava.phantom.questions", "benchmark questions from that truth"),
    "phantom.teacher": ("medllava.phantom.teacher", "a server that stands in for a teacher model"),
    "instruct_gen": (
        "medllava.instruct_gen.__main__", "videos to data: narrate | correct | generate | card | check | export"
    ),
    "train": ("medllava.train.__main__", "one stage from a recipe; --plan what it takes; preview what is supervised"),
    "model": ("medllava.model.__main__", "inspect | merge | export | convert | assemble | tiny: checkpoints"),
    "serve.cli": ("medllava.serve.cli", "chat in the terminal, or one shot"),
    "serve.worker": ("medllava.serve.worker", "OpenAI-compatible server for many at once"),
    "serve.web": ("medllava.serve.web", "the web chat, with its own worker or others; whole slides with --slides"),
    "eval": (
        "medllava.eval.__main__",
        "fetch | answer | score | judge | report | rescore | compare | overview | encoder | harness",
    ),
}


def usage() -> str:
    lines = [f"  {name:<19}{text}" for name, (_, text) in COMMANDS.items()]
    return (
        f"medllava {__version__}\n\nusage: medllava COMMAND ...    (each takes --help)\n\n" + "\n".join(lines)
        + "\n\nexample: medllava serve.cli --model-path demo-out/stage2 --image-file a.png --prompt 'What is here?'"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] == "serve" and len(arguments) > 1:
        arguments = [f"serve.{arguments[1]}", *arguments[2:]]
    if arguments[0] not in COMMANDS:
        meant = [name for name in COMMANDS if name.partition(".")[0] == arguments[0]]
        meant = meant or difflib.get_close_matches(arguments[0], COMMANDS)
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"choose one of: {', '.join(COMMANDS)}"
        print(f"error: no command {arguments[0]!r}; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    code: int = run_cli(lambda: module.main(arguments[1:]))
    return code


if __name__ == "__main__":
    sys.exit(main())
