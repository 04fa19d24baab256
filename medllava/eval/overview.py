"""One table of all benchmarks: a line for each report, and a line "not run" for each benchmark that has none.

Looks for every report.json below the folders that are given, and for what the encoder step wrote with --out. Benchmarks
are the definitions in eval/benchmarks. With --out, writes overview.md and overview.json.

example:
  medllava eval overview eval-out --out eval-out
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medllava.errors import DataError

HELP = "one table of all benchmarks, with those that were not run"

MOST_BYTES = 1_000_000
"""Of a file that may be the encoder step's; it has no other name than --out gave it."""

HEAD = ("benchmark", "model", "metric", "score", "95 % interval", "n", "unscored", "visual gain")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, help="folders with reports below them")
    parser.add_argument("--out", type=Path, help="folder for overview.md and overview.json")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval.benchmarks import known_files
    from medllava.jsonl import atomic_write, write_json

    lines = list(_found(arguments.folders))
    if not lines:
        told = ", ".join(map(str, arguments.folders))
        raise DataError(f"{told}: no report.json below; `medllava eval report --out` writes one")
    there = {line["benchmark"] for line in lines}
    known = [*known_files("benchmarks", ".yaml"), *known_files("benchmarks/encoder", ".yaml")]
    missing = [name for name in known if name not in there]
    text = as_markdown(lines, missing)
    print(text, end="")
    if arguments.out:
        write_json(arguments.out / "overview.json", {"run": lines, "not_run": missing})
        with atomic_write(arguments.out / "overview.md") as file:
            file.write(text)
    return 0


def _found(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """A line for each metric that is a verdict, of each report."""
    from medllava.jsonl import read_json

    paths = {path.resolve(): path for folder in folders for path in sorted(folder.rglob("*.json"))}
    for path in paths.values():
        if path.name == "report.json":
            yield from _report(path, read_json(path))
        elif path.stat().st_size < MOST_BYTES and b'"balanced_accuracy"' in path.read_bytes():
            value = read_json(path)
            if isinstance(value, dict) and {"tasks", "benchmark", "model"} <= value.keys():
                yield from _encoder(path, value)


def _report(path: Path, value: Any) -> Iterator[dict[str, Any]]:
    from pydantic import ValidationError

    from medllava.eval.records import Report
    from medllava.eval.vqa import FIRST_METRICS
    from medllava.jsonl import describe

    try:
        report = Report.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{path}: not a report of this program ({describe(error)})") from error
    made = report.provenance.get("benchmark", {})
    for name, found in report.metrics.items():
        if name in FIRST_METRICS or name == "judge":
            gained = report.visual_gain.get(name)
            yield {
                "benchmark": made.get("name", path.parent.name), "model": report.provenance.get("model", "unknown"),
                "metric": name, **found.model_dump(mode="json"),
                "visual_gain": gained.model_dump(mode="json") if gained else None, "report": str(path),
            }


def _encoder(path: Path, value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task, figures in value["tasks"].items():
        for name, found in figures.items():
            if name in {"balanced_accuracy", "image_to_text_recall_at_1"}:
                kept = {key: found[key] for key in ("value", "low", "high", "n")}
                yield {
                    "benchmark": value["benchmark"]["name"], "model": Path(value["model"]).name,
                    "metric": f"{task} {name}", **kept, "unscored": 0, "visual_gain": None, "report": str(path),
                }


def as_markdown(lines: Sequence[dict[str, Any]], missing: Sequence[str]) -> str:
    """The table; benchmarks without a report last."""
    from medllava.eval.latex import markdown_cell

    rows = [
        [
            line["benchmark"], line["model"], line["metric"], _number(line["value"]), _interval(line),
            str(line["n"]), str(line["unscored"]), _number((line["visual_gain"] or {}).get("value"), "+.3f"),
        ]
        for line in lines
    ]
    rows += [[name, "not run", *[""] * (len(HEAD) - 2)] for name in missing]
    rule = ["---", "---", "---", *["---:"] * (len(HEAD) - 3)]
    return "".join(f"| {' | '.join(map(markdown_cell, cells))} |\n" for cells in (HEAD, rule, *rows))


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _interval(line: dict[str, Any]) -> str:
    return "" if line["low"] is None else f"{line['low']:.3f} to {line['high']:.3f}"
