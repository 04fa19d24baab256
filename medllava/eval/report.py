"""Write report.json, .md, .tex, .html and chart.svg for saved answers, with pictures of right, wrong, unclear ones.

The page is one file: pictures and style are inside it and it asks nothing of any network.

example:
  medllava eval report --answers answers/answers.jsonl --out report
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import DataError, MissingExtraError
from medllava.eval.records import Metric, Report

if TYPE_CHECKING:
    from medllava.eval.metrics import Row

HELP = "write the report as JSON, Markdown and one HTML page with pictures"

REFERENCE_COLOUR, ANSWER_COLOUR = "#1a9850", "#e6194b"
JUDGE = "mean grade 0..1 by a text model that sees the reference but not the picture"
ROTATION = {
    "mean": "accuracy over all orders", "same_answer": "the same option named in every order",
    "all_right": "right in every order",
}
_RIGHT_IOU = 0.5
_THUMBNAIL = 480


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=Path, help="answers.jsonl (default: the one in --out)")
    parser.add_argument("--benchmark", help="definition that names the question file and its pictures")
    parser.add_argument("--questions", "--gt", dest="questions", type=Path, help="default: questions.jsonl beside it")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: the one they were asked with)")
    parser.add_argument("--judged", type=Path, help="judge.json of the judge step, to be shown as one more metric")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--gallery", type=int, default=8, help="pictures of right and of wrong answers each; default 8")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default 0")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval.benchmarks import load_benchmark
    from medllava.eval.metrics import verdicts
    from medllava.eval.provenance import read_run
    from medllava.eval.score import as_text, read_answers, score_files
    from medllava.jsonl import read_json, write_json, write_records

    answers = arguments.answers or arguments.out / "answers.jsonl"
    made = read_run(answers)
    questions, images = arguments.questions, arguments.images
    if arguments.benchmark:
        benchmark = load_benchmark(arguments.benchmark)
        questions, images = questions or benchmark.questions, images or benchmark.images
    report, rows = score_files(answers, questions, seed=arguments.seed)
    if arguments.judged:
        judged = Report.model_validate(read_json(arguments.judged))
        notes = (*report.notes, *(f"Judge: {note}" for note in judged.notes))
        report = report.model_copy(update={"metrics": {**report.metrics, **judged.metrics}, "notes": notes})
    texts = {
        answer.question_id: answer.text for answer in read_answers(answers) if answer.condition == "real"
    }
    title = arguments.title or f"Evaluation: {made.get('benchmark', {}).get('name', 'answers')}"
    write_report(
        arguments.out, report, rows, texts, images or Path(made.get("images", answers.parent)), title=title,
        gallery=arguments.gallery, date=made.get("date"),
    )
    write_records(arguments.out / "verdicts.jsonl", verdicts(rows))
    write_json(arguments.out / "report.json", report.model_dump(mode="json"))
    print(as_text(report))
    print(f"\n{arguments.out / 'report.html'}")
    return 0


def write_report(
    out: Path,
    report: Report,
    rows: list[Row],
    texts: dict[str, str],
    images: Path,
    *,
    title: str,
    gallery: int = 8,
    date: str | None = None,
) -> None:
    """Write chart.svg, report.md, report.tex and report.html into ``out``; ``texts`` maps question ids to answers."""
    from medllava.eval.chart import bar_chart
    from medllava.jsonl import atomic_write

    chart = bar_chart(report)
    for name, text in (
        ("chart.svg", chart),
        ("report.md", as_markdown(report, title)),
        ("report.tex", as_latex(report, title)),
        ("report.html", _as_html(report, rows, texts, images, title, chart, gallery, date)),
    ):
        with atomic_write(out / name) as file:
            file.write(text)


def as_markdown(report: Report, title: str) -> str:
    """The tables and notes of the report as Markdown."""
    from medllava.eval.vqa import METRICS

    conditions = list(report.ablations)
    lines = [f"# {title}", "", f"Model: {report.provenance.get('model', 'unknown')}", ""]
    lines += [f"- {note}" for note in report.notes] + ([""] if report.notes else [])
    lines += [
        "| metric | score | 95 % interval | constant answer | questions | unclear | unscored |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in report.metrics.items():
        constant = report.baselines.get(name, {}).get("constant")
        unclear = report.unclear.get("real", {}).get(name, "")
        lines.append(
            f"| {name} | {number(found.value)} | {interval(found)} | {number(constant)} | {found.n} | {unclear} |"
            f" {found.unscored} |"
        )
    if conditions:
        lines += [
            "", "## With and without the picture", "",
            f"| metric | real | {' | '.join(conditions)} | visual gain | 95 % interval |",
            "| --- |" + " ---: |" * (len(conditions) + 3),
        ]
        for name, found in report.metrics.items():
            cells = [number(report.ablations[condition][name].value) if name in report.ablations[condition] else ""
                     for condition in conditions]
            gained = report.visual_gain.get(name)
            cells += [signed(gained.value), interval(gained, True)] if gained else ["", ""]
            lines.append(f"| {name} | {number(found.value)} | {' | '.join(cells)} |")
    if report.rotation:
        lines += ["", "## With the options in every order", "", "| | value | 95 % interval | questions |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        for name, found in report.rotation.items():
            lines.append(f"| {ROTATION[name]} | {number(found.value)} | {interval(found)} | {found.n} |")
    if report.abstention:
        shares = ", ".join(f"{name} {number(found.value)}" for name, found in report.abstention.items())
        lines += ["", f"Share of answers that say they cannot tell: {shares}."]
    for category, values in report.by_category.items():
        names = list(dict.fromkeys(name for found in values.values() for name in found))
        lines += ["", f"## By {category}", "", f"| {category} | questions | {' | '.join(names)} |"]
        lines += ["| --- |" + " ---: |" * (len(names) + 1)]
        for value, by_name in values.items():
            cells = [number(by_name[name].value) if name in by_name else "" for name in names]
            lines.append(f"| {value} | {_questions_of(by_name)} | {' | '.join(cells)} |")
    lines += ["", "![Scores with the picture and without it](chart.svg)", "", "## What the metrics are", ""]
    lines += [f"- `{name}`: {METRICS[name]}" for name in report.metrics if name in METRICS]
    lines += ["", "## How the answers were made", ""]
    lines += [f"- {key}: `{value}`" for key, value in _flat(report.provenance)]
    return "\n".join(lines) + "\n"


def _questions_of(by_name: dict[str, Metric]) -> int:
    """Questions of one value of a category: each kind of question has a metric of its own."""
    from medllava.eval.vqa import FIRST_METRICS

    firsts = [found.n for name, found in by_name.items() if name in FIRST_METRICS]
    return sum(firsts) if firsts else max((found.n for found in by_name.values()), default=0)


def as_latex(report: Report, title: str) -> str:
    """The scores as a LaTeX table (booktabs), with intervals, the blank picture and the visual gain."""
    from medllava.eval.latex import table

    blank = report.ablations.get("blank", {})
    rows = []
    for name, found in report.metrics.items():
        without, gained = blank.get(name), report.visual_gain.get(name)
        rows.append([
            name, number(found.value), interval(found), str(found.n), number(without.value) if without else "",
            f"{gained.value:+.3f}" if gained and gained.value is not None else "",
        ])
    head = ["metric", "score", "95 % interval", "n", "blank picture", "visual gain"]
    return table(head, rows, f"{title}. Model: {report.provenance.get('model', 'unknown')}.")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def interval(found: Metric, sign: bool = False) -> str:
    if found.low is None or found.high is None:
        return ""
    form = signed if sign else number
    return f"{form(found.low)} to {form(found.high)}"


def _as_html(
    report: Report, rows: list[Row], texts: dict[str, str], images: Path, title: str, chart: str, gallery: int,
    date: str | None,
) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "eval", error) from error
    from medllava.eval.chart import LABELS
    from medllava.eval.judge_pairs import METRICS as PAIRS
    from medllava.eval.vqa import METRICS

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, interval=interval)
    real = [row for row in rows if row.condition == "real"]
    scored = [row for row in real if row.scores is not None]
    right = _spread([row for row in scored if _is_right(row)], gallery)
    wrong = _spread([row for row in scored if not _is_right(row) and row.read is not None], gallery)
    unclear = _spread([row for row in scored if row.read is None], gallery)
    cards = {row.question.id: _card(row, texts, images) for row in (*right, *wrong, *unclear)}
    return environment.get_template("report.html").render(
        title=title, report=report, definitions={**METRICS, **PAIRS, "judge": JUDGE}, labels=LABELS,
        rotation=ROTATION,
        chart=chart.replace("<svg ", '<svg class="chart" ', 1),
        model=report.provenance.get("model", "unknown model"), date=date,
        questions=len(real), groups=len({row.question.group for row in real}),
        boxes=any(card["boxes"] for card in cards.values()),
        galleries=[
            ("Right answers", [cards[row.question.id] for row in right]),
            ("Wrong answers", [cards[row.question.id] for row in wrong]),
            ("Unclear answers", [cards[row.question.id] for row in unclear]),
        ],
        provenance=_flat(report.provenance),
    )


def _is_right(row: Row) -> bool:
    score = next(iter((row.scores or {}).values()), 0.0)
    return score >= (_RIGHT_IOU if row.question.kind in {"box", "open"} else 1.0)


def _spread(rows: list[Row], most: int) -> list[Row]:
    """Up to ``most`` rows, taken in turn from each kind of question, preferring videos not shown yet."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.question.kind, []).append(row)
    chosen: list[Row] = []
    while len(chosen) < most and any(by_kind.values()):
        for waiting in by_kind.values():
            if waiting and len(chosen) < most:
                shown = {row.question.group for row in chosen}
                fresh = next((place for place, row in enumerate(waiting) if row.question.group not in shown), 0)
                chosen.append(waiting.pop(fresh))
    return chosen


def _card(row: Row, texts: dict[str, str], images: Path) -> dict[str, Any]:
    from medllava.eval.vqa import first_box
    from medllava.images import load_image, to_data_uri

    question, text = row.question, texts.get(row.question.id, "")
    picture = None
    if question.image:
        try:
            image = load_image(images / question.image)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            picture = to_data_uri(image, "JPEG")
        except DataError:
            # A report can be written where the pictures are not; the card then shows the words alone.
            picture = None
    answered = first_box(text)
    boxes = [(box, colour) for box, colour in ((question.box, REFERENCE_COLOUR), (answered, ANSWER_COLOUR)) if box]
    return {
        "picture": picture, "boxes": boxes, "right": _is_right(row), "kind": question.kind, "id": question.id,
        "question": question.question, "answer": text, "reference": question.answer,
        "reason": row.reason if row.read is None or question.kind in {"box", "open"} else "",
    }


def _flat(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The provenance as lines: nested parts as compact JSON."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True))
        for key, value in provenance.items()
        if value is not None
    ]
