"""Several runs side by side, and for each against the first: paired differences with intervals and p-values.

Runs are folders of answers (answers.jsonl, questions.jsonl) or answers files. Only questions that two runs share are
compared, each with itself; the p-value is that of a sign-flip permutation test over groups (videos or cases), the
interval that of a bootstrap over groups. With --out, writes compare.json, compare.md, compare.tex and compare.html,
which also shows questions that one run has right and another has not, with their pictures.

example:
  medllava eval compare answers-base answers-tuned --out compared
  medllava eval compare red unmarked --names marked unmarked
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medllava.errors import ConfigError, DataError
from medllava.eval.records import Metric, Question, Report

if TYPE_CHECKING:
    from medllava.eval.metrics import Row
    from medllava.geometry import Box

HELP = "several runs side by side, with paired tests"

FLIPS = 10_000
MOST_SHOWN = 60
"""Questions on which the runs disagree that compare.html shows."""
MOST_BYTES = 10_000_000
"""Of their pictures, each counted once."""


@dataclass(frozen=True)
class Paired:
    """The second run minus the first on the ``n`` questions scored in both; ``p`` is two-sided."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    only_first: int
    only_second: int


@dataclass(frozen=True)
class Run:
    name: str
    report: Report
    rows: list[Row]


@dataclass(frozen=True)
class Disagreement:
    """A question that some run has right and another has not; for each run what came of it, its answer and its box."""

    question: Question
    outcomes: tuple[str, ...]
    texts: tuple[str, ...]
    boxes: tuple[Box | None, ...]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="folders of answers, or answers.jsonl files; two or more")
    parser.add_argument("--names", nargs="+", help="what to call them (default: their folders' names)")
    parser.add_argument("--questions", "--gt", dest="questions", type=Path, help="one question file for all runs")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: the first run's)")
    parser.add_argument("--out", type=Path, help="folder for compare.json, .md, .tex and .html")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and permutations; default 0")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval.provenance import read_run
    from medllava.jsonl import atomic_write, write_json

    if len(arguments.runs) < 2:
        raise ConfigError("compare needs two runs or more")
    files = [path / "answers.jsonl" if path.is_dir() else path for path in arguments.runs]
    names = arguments.names or _names(files)
    if len(names) != len(files) or len(set(names)) < len(names):
        raise ConfigError(f"--names: give {len(files)} different names")
    runs = [_run_of(name, file, arguments) for name, file in zip(names, files, strict=True)]
    tests = {run.name: compare(runs[0].rows, run.rows, seed=arguments.seed) for run in runs[1:]}
    shared = {name: max((test.n for test in found.values()), default=0) for name, found in tests.items()}
    for name, count in shared.items():
        if not count:
            raise DataError(f"{name} and {runs[0].name} have no scored question in common: are they of one benchmark?")
    text = as_markdown(runs, tests)
    if arguments.out:
        write_json(arguments.out / "compare.json", {
            "runs": [{"name": run.name, **run.report.model_dump(mode="json")} for run in runs],
            "paired": {name: {key: asdict(test) for key, test in found.items()} for name, found in tests.items()},
            "first": runs[0].name, "seed": arguments.seed, "permutations": FLIPS,
        })
        images = arguments.images or Path(read_run(files[0]).get("images", files[0].parent))
        for file_name, content in (
            ("compare.md", text), ("compare.tex", as_latex(runs, tests)),
            ("compare.html", as_html(runs, tests, images)),
        ):
            with atomic_write(arguments.out / file_name) as file:
                file.write(content)
    print(text)
    return 0


def _run_of(name: str, file: Path, arguments: argparse.Namespace) -> Run:
    from medllava.eval.score import score_files

    report, rows = score_files(file, arguments.questions, seed=arguments.seed)
    return Run(name, report, rows)


def _names(files: Sequence[Path]) -> list[str]:
    names = [file.parent.name if file.name == "answers.jsonl" else file.stem for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]


def compare(first: Sequence[Row], second: Sequence[Row], *, seed: int = 0) -> dict[str, Paired]:
    """Every metric that both have, on real pictures, question by question. Questions are the same if their ids, their
    words and their references are: a number alone may mean another question in another file."""
    from medllava.eval.metrics import estimate, stratum
    from medllava.eval.vqa import METRICS

    before = {row.question.id: row for row in first if row.condition == "real" and row.scores is not None}
    after = {row.question.id: row for row in second if row.condition == "real" and row.scores is not None}
    found = {}
    for name in METRICS:
        one = {key: row.scores[name] for key, row in before.items() if row.scores and name in row.scores}
        two = {key: row.scores[name] for key, row in after.items() if row.scores and name in row.scores}
        both = [key for key in two if key in one and _same(before[key].question, after[key].question)]
        if not one or not two:
            continue
        differences = [two[key] - one[key] for key in both]
        groups = [after[key].question.group for key in both]
        strata = [stratum(name, after[key].question) for key in both]
        estimated = estimate(differences, groups, strata, seed=seed)
        found[name] = Paired(
            estimated.value, estimated.low, estimated.high, len(both),
            sign_flip(differences, groups, strata, seed=seed), len(one) - len(both), len(two) - len(both),
        )
    return found


def _same(one: Question, other: Question) -> bool:
    return (one.question.split(), one.answer.split()) == (other.question.split(), other.answer.split())


def sign_flip(
    differences: Sequence[float], groups: Sequence[str], strata: Sequence[str] = (), *, flips: int = FLIPS,
    seed: int = 0,
) -> float | None:
    """Two-sided p-value of no difference: the sign of all differences of a group is flipped at random, as often as not.

    Where strata are given the statistic is the mean of their means. With few groups all flips are tried (exact).
    """
    import numpy as np

    names, group = np.unique(np.asarray(groups), return_inverse=True)
    labels, label = np.unique(np.asarray(strata or [""] * len(differences)), return_inverse=True)
    if len(names) < 2:
        return None
    weights = 1 / (np.bincount(label)[label] * len(labels))
    totals = np.zeros(len(names))
    np.add.at(totals, group, np.asarray(differences, dtype=float) * weights)
    totals = totals[totals != 0]
    if not len(totals):
        return 1.0
    exact = 2 ** len(totals) <= flips
    if exact:
        bits = np.arange(2 ** len(totals))[:, None] >> np.arange(len(totals)) & 1
        drawn = (2 * bits - 1) @ totals
    else:
        rng = np.random.default_rng(seed)
        size = max(1, 4_000_000 // len(totals))
        drawn = np.concatenate([
            (2.0 * rng.integers(0, 2, (min(size, flips - start), len(totals)), dtype=np.int8) - 1) @ totals
            for start in range(0, flips, size)
        ])
    as_far = int(np.sum(np.abs(drawn) >= abs(totals.sum()) - 1e-12))
    return as_far / len(drawn) if exact else (as_far + 1) / (flips + 1)


# --------------------------------------------------------------------------------------------------------------- tables


def _metrics(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.report.metrics))


def _cell(found: Metric | None) -> str:
    if found is None or found.value is None:
        return "-"
    interval = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
    return f"{found.value:.3f}{interval}"


def p_value(value: float | None) -> str:
    """A p-value as tables print it."""
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    return [[name, *(_cell(run.report.metrics.get(name)) for run in runs)] for name in _metrics(runs)]


def _test_rows(runs: Sequence[Run], tests: dict[str, dict[str, Paired]]) -> list[list[str]]:
    return [
        [
            name, f"{second} - {runs[0].name}", "-" if test.value is None else f"{test.value:+.3f}",
            "-" if test.low is None else f"{test.low:+.3f} to {test.high:+.3f}", p_value(test.p), str(test.n),
        ]
        for second, found in tests.items()
        for name, test in found.items()
    ]


_TEST_HEAD = ["metric", "difference", "value", "95 % interval", "p", "questions in both"]


def as_markdown(runs: Sequence[Run], tests: dict[str, dict[str, Paired]]) -> str:
    head = ["metric", *(run.name for run in runs)]
    lines = ["# Runs side by side", "", *_table(head, _rows(runs)), "", "## Paired differences", ""]
    lines += _table(_TEST_HEAD, _test_rows(runs, tests))
    left_out = [
        f"- {name}: {max(test.only_first for test in found.values())} questions only in {runs[0].name},"
        f" {max(test.only_second for test in found.values())} only in {name}"
        for name, found in tests.items()
        if any(test.only_first or test.only_second for test in found.values())
    ]
    for run in runs:
        left_out += [f"- {run.name}: {note}" for note in run.report.notes]
    return "\n".join([*lines, *(["", *left_out] if left_out else [])]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    from medllava.eval.latex import markdown_cell

    aligned = "| --- |" + " ---: |" * (len(head) - 1)
    lines = [f"| {' | '.join(map(markdown_cell, row))} |" for row in (head, *rows)]
    return [lines[0], aligned, *lines[1:]]


def as_latex(runs: Sequence[Run], tests: dict[str, dict[str, Paired]]) -> str:
    """A booktabs table: a row per metric, a column per run; a star where a run differs from the first (p < 0.05)."""
    from medllava.eval.latex import table

    rows = []
    for name in _metrics(runs):
        cells = [name]
        for run in runs:
            found = run.report.metrics.get(name)
            test = tests.get(run.name, {}).get(name)
            star = "$^*$" if test and test.p is not None and test.p < 0.05 else ""
            cells.append(_cell(found) + star)
        rows.append(cells)
    caption = f"Scores with 95 % intervals. * differs from {runs[0].name} (paired permutation test, p < 0.05)."
    return table(["metric", *(run.name for run in runs)], rows, caption)


def _told(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def disagreements(runs: Sequence[Run]) -> list[Disagreement]:
    """The questions, on their own pictures and scored in every run, that one run has right and another has not, in the
    order of the first run's file."""
    from medllava.eval.gallery import outcome
    from medllava.eval.vqa import first_box

    real = [{row.question.id: row for row in run.rows if row.condition == "real" and row.scores} for run in runs]
    found = []
    for name, first in real[0].items():
        rows = [by_id[name] for by_id in real if name in by_id and _same(first.question, by_id[name].question)]
        outcomes = [outcome(row) for row in rows]
        if len(rows) < len(runs) or len({each == "right" for each in outcomes}) < 2:
            continue
        texts = [row.text for row in rows]
        boxes = [first_box(text) if first.question.kind == "box" else None for text in texts]
        found.append(Disagreement(first.question, tuple(outcomes), tuple(texts), tuple(boxes)))
    return found


def as_html(
    runs: Sequence[Run], tests: dict[str, dict[str, Paired]], images: Path, *, most: int = MOST_SHOWN
) -> str:
    """One page that asks nothing of any network: a plot, tables, ``most`` of the questions on which the runs disagree
    with their pictures from the folder ``images``, and what made each run."""
    from medllava.eval.chart import PALETTE, dot_chart
    from medllava.eval.gallery import small_pictures
    from medllava.eval.report import environment

    chart = dot_chart(
        {name: {run.name: run.report.metrics[name] for run in runs if name in run.report.metrics}
         for name in _metrics(runs)}, "Scores of all runs",
    )
    every = disagreements(runs)
    # Evenly from all of them: a question file often has one kind after the other.
    shown = [every[place * len(every) // most] for place in range(most)] if len(every) > most else every
    names = list(dict.fromkeys(each.question.image for each in shown if each.question.image))
    return str(environment().get_template("compare.html").render(
        runs=runs, chart=chart.replace("<svg ", '<svg class="chart" ', 1), colours=PALETTE,
        scores=_rows(runs), test_head=_TEST_HEAD, tests=_test_rows(runs, tests),
        shown=shown, disagree=len(every), pictures=small_pictures(names, images, MOST_BYTES),
        made=[[key, *(_told(run.report.provenance.get(key)) for run in runs)]
              for key in dict.fromkeys(key for run in runs for key in run.report.provenance)],
    ))
