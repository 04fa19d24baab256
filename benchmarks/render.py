"""Write README.md and plots/ of this folder from results/*.json, and the table of figures in the project's README.

    python benchmarks/render.py [--folder DIR] [--check]

--check writes nothing and says whether the texts are those of the results, and so is each figure of any page that names
its row.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from medllava.__main__ import COMMANDS
from medllava.jsonl import atomic_write, read_json

HERE = Path(__file__).resolve().parent
PROJECT_README = HERE.parent / "README.md"
ORDER = ("narrate", "generate", "bookkeeping", "load", "train_step", "gpu_train", "serve", "eval", "start")
HEADLINES = {
    "narrate.cost_over_decode": "`narrate`: CPU against decoding every frame of the same video",
    "narrate.speedup_over_straightforward": "`narrate`: speed against the papers' way (OpenCV, SSIM, median stack)",
    "generate.share_of_limit_64": "`generate`: share of what the endpoint allows, 64 calls in flight",
    "train_step.packed_over_padded": "training: useful tokens per second, packed against padded to the longest",
    "serve.batch16_over_serial": "worker: tokens per second, 16 clients against one at a time",
    "serve.over_transformers_serve": "worker: tokens per second against `transformers serve`, 16 clients",
    "eval.batched_over_serial": "`eval answer`: questions per second, batched against one by one",
}
"""Rows that stand for their benchmark, and what they say."""
BEGIN, END = "<!-- written by benchmarks/render.py -->", "<!-- end of what benchmarks/render.py writes -->"
_NAME = re.compile(r"`([a-z_]+\.(?!jsonl?`)[a-z0-9_]+)`")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")

HEAD = """\
# Benchmarks

One script for each section of the street. Each does the same work in the same run with medllava and with what a person
would take instead (the baseline), and holds it against what the machine or the other side allows at best (the limit).

    make bench                          # all of them (about half an hour), then this page and its plots
    make bench ARGS="serve"             # one of them
    make bench ARGS=--quick             # only that they run; figures go to benchmarks/quick/

This page is written by `benchmarks/render.py` from `benchmarks/results/`, where each file also names the commit, the
versions and the machine that its figures come from. A ratio is ours over the baseline. What was tried, what it did and
what did not help: [NOTES.md](NOTES.md).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="that holds results/ (default: this one)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    results = read_results(given.folder / "results")
    texts = {given.folder / "README.md": render(results)}
    if given.folder == HERE:
        texts[PROJECT_README] = with_table(PROJECT_README.read_text(encoding="utf-8"), results)
    if given.check:
        old = [str(path) for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
        faults = [f"{path}: not what the results say; run benchmarks/render.py" for path in old]
        for page in (*PROJECT_README.parent.glob("*.md"), *PROJECT_README.parent.glob("*/*.md")):
            faults += [f"{page}: {fault}" for fault in unfounded(page.read_text("utf-8"), results)]
        print("\n".join(faults))
        return int(bool(faults))
    for path, text in texts.items():
        with atomic_write(path) as file:
            file.write(text)
    plot(results, given.folder / "plots")
    return 0


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files by name, in the order of the page."""
    found = {path.stem: read_json(path) for path in folder.glob("*.json")}
    return {name: found[name] for name in sorted(found, key=lambda name: (name not in ORDER, _place(name), name))}


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else 0


def render(results: dict[str, dict[str, Any]]) -> str:
    """The page of all results."""
    parts = [HEAD, "## In short\n\n" + headlines(results)]
    for name, result in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        note = result.get("note")
        parts.append("\n\n".join([
            f"## {name}", *([f"{note}."] if note else []), _table(result["rows"]),
            *([f"![{name}: ratios to the baseline](plots/{name}.png)"] if _plotted(result["rows"]) else []),
            f"Commit {result['commit'][:12] or 'unknown'}; {result['machine']}; {versions}.",
        ]) + "\n")
    return "\n".join(parts)


def headlines(results: dict[str, dict[str, Any]]) -> str:
    """The rows that stand for their benchmark, as a table."""
    rows = {row["figure"]: row for result in results.values() for row in result["rows"]}
    lines = ["| what | measured | target | holds | row |", "|---|---:|---:|---|---|"]
    for figure, meaning in HEADLINES.items():
        if figure in rows:
            row = rows[figure]
            unit = "" if row["unit"] in ("times", "share") else f" {row['unit']}"
            lines.append(f"| {meaning} | {shown(row['value'])}{unit} | {_target(row)} | {_holds(row)} | `{figure}` |")
    return "\n".join(lines) + "\n"


def with_table(text: str, results: dict[str, dict[str, Any]]) -> str:
    """The project's README with the table of headlines between its two marks, if it has them."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{mark}\n{headlines(results)}{end}{after}" if mark and end else text


def unfounded(text: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """What a text quotes that no result says. The name of a row in backticks vouches for the nearest number before it
    on its line, which must be the row's value or ratio, rounded."""
    rows = {row["figure"]: row for result in results.values() for row in result["rows"]}
    faults = []
    for line in text.splitlines():
        start = 0
        for match in _NAME.finditer(line):
            name, before = match.group(1), line[start : match.start()]
            start = match.end()
            if name.partition(".")[0] not in ORDER or name in COMMANDS:
                continue
            numbers = _NUMBER.findall(before)
            if name not in rows:
                faults.append(f"{name}: no such row")
            elif before.count("|") and len(cells := [cell for cell in before.split("|") if cell.strip()]) > 1:
                quoted = _NUMBER.findall(cells[1])
                if quoted and not _says(rows[name], quoted[0]):
                    faults.append(f"{name}: {quoted[0]} is not what was measured")
            elif numbers and not _says(rows[name], numbers[-1]):
                faults.append(f"{name}: {numbers[-1]} is not what was measured")
    return faults


def _says(row: dict[str, Any], number: str) -> bool:
    digits = len(number.partition(".")[2])
    quoted = float(number.replace(",", ""))
    known = [value for value in (row["value"], row["ratio"]) if value is not None]
    return number == shown(row["value"]) or any(abs(value - quoted) <= 0.5001 * 10**-digits for value in known)


def shown(value: float | None) -> str:
    """Three significant digits, thousands with a comma; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| figure | medllava | unit | baseline | ratio | limit | target | holds |"]
    lines.append("|---|---:|---|---|---:|---:|---:|---|")
    for row in rows:
        baseline = f"{row['baseline']}: {shown(row['baseline_value'])}" if row["baseline"] else ""
        limit = shown(row["limit"]) if isinstance(row["limit"], int | float) else ""
        lines.append(
            f"| {row['figure']} | {shown(row['value'])} | {row['unit']} | {baseline} | {shown(row['ratio'])} | {limit}"
            f" | {_target(row)} | {_holds(row)} |"
        )
    return "\n".join(lines)


def _target(row: dict[str, Any]) -> str:
    if row["target"] is None:
        return ""
    less = row.get("better") == "less" or row["limit"] in ("max", "<=")
    return f"{'at most' if less else 'at least'} {shown(row['target'])}"


def _holds(row: dict[str, Any]) -> str:
    return {True: "yes", False: "**no**", None: ""}[row["holds"]]


def _plotted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["ratio"]]


def plot(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """One picture per benchmark: ratios to the baseline on a logarithmic axis, and the target where it is one of the
    ratio (that is, of a figure counted in times)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for name, result in results.items():
        rows = _plotted(result["rows"])
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.32 * len(rows)))
        for place, row in enumerate(rows):
            colour = {True: "#3b7dd8", False: "#d1495b", None: "#9aa5b1"}[row["holds"]]
            axes.barh(place, row["ratio"], color=colour, height=0.65)
            axes.text(row["ratio"], place, " " + shown(row["ratio"]), va="center", fontsize=7)
            if row["target"] is not None and row["ratio"] == row["value"]:
                axes.plot([row["target"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_yticks(range(len(rows)), [row["figure"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("ours / baseline (dotted: as fast; black stroke: target)", fontsize=8)
        axes.set_title(name, fontsize=10, loc="left")
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
