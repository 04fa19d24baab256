"""What the pages and the commands' own help say: links lead somewhere, examples are commands that parse."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from medllava.__main__ import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("", "docs", "instruct_gen", "train", "serve", "eval", "benchmarks")
PAGES = sorted(page for folder in FOLDERS for page in (REPOSITORY / folder).glob("*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), f"no file {target}"
        assert not anchor or anchor in anchors(linked), f"{linked.name} has no heading #{anchor}"


class Shown(Exception):
    """Carries a command's parser out of its ``main``."""


def parser_of(module: str, arguments: list[str]) -> argparse.ArgumentParser:
    def show(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Shown(parser)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, show)
        with pytest.raises(Shown) as shown:
            importlib.import_module(module).main(arguments)
    parser = shown.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command and step as it is typed, with its parser."""
    for name, (module, _) in COMMANDS.items():
        parser = parser_of(module, [])
        yield name, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from ((f"{name} {step}", of_step) for step, of_step in action.choices.items())
    yield "train preview", parser_of(COMMANDS["train"][0], ["preview"])


PARSERS = dict(commands())


@pytest.mark.parametrize("name", PARSERS)
def test_help_shows_a_command_that_can_be_typed(name: str) -> None:
    parser = PARSERS[name]
    told = f"{parser.description or ''}\n{parser.epilog or ''}".replace("\\\n", " ")
    # `medllava eval answer ...` or `python -m medllava.eval answer ...`
    found = re.findall(r"(?m)^(?:examples?: )? *(?:python -m medllava\.|medllava )(\S.*)$", told)
    assert found, f"no example:\n{told}"
    for line in found:
        words = shlex.split(re.sub(r"<.*", "", line), comments=True)
        typed = max((other for other in PARSERS if words[: len(other.split())] == other.split()), key=len)
        PARSERS[typed].parse_args(words[len(typed.split()) :])  # a wrong word ends the test with argparse's message


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_is_explained(name: str) -> None:
    bare = [
        "/".join(action.option_strings) or action.dest
        for action in PARSERS[name]._actions
        if not (action.help or isinstance(action, argparse._SubParsersAction) or action.choices)
    ]
    assert not bare


def test_lists_of_commands_name_every_step() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"(?m)^\| `medllava .*$", readme))
    in_table = {word for span in re.findall(r"`([^`]*)`", rows) for word in span.split()}
    for name in PARSERS:
        command, _, step = name.partition(" ")
        assert (step or command) in in_table, f"the README's table does not name {name}"
        assert re.search(rf"\b{step}\b", COMMANDS[command][1]), f"`medllava --help` does not name {name}"
