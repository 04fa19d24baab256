"""Write report.json, .md, .tex, .html and chart.svg for saved answers, with a gallery of right, wrong and unclear ones.

The page is one file: pictures, style and script are inside it and it asks nothing of any network. Its gallery is
filtered by outcome, category and words, and holds small copies of the pictures up to --gallery-mb. --model-card writes
the scores into the head of a checkpoint's README.md, where the Hugging Face hub reads them.

example:
  medllava eval report --answers answers/answers.jsonl --out report
  medllava eval report --answers answers/answers.jsonl --out report --model-card stage2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, MissingExtraError
from medllava.eval.records import Metric, Report
from medllava.eval.score import configure_bertscore, words_told

if TYPE_CHECKING:
    from medllava.eval.metrics import Row

HELP = "write the report as JSON, Markdown and one HTML page with pictures"

JUDGE = "mean grade 0..1 by a text model that sees the reference but not the picture"
ROTATION = {
    "mean": "accuracy over all orders", "same_answer": "the same option named in every order",
    "all_right": "right in every order", "difference": "accuracy in the order as published, minus in the others",
}


REPLIES = (
    "Empty: no letter and no digit. Looping: the same 1 to 40 words at least 4 times in a row, at least 8 words in all,"
    " as half of the reply or its end. Cut off: at the token limit. All of them are scored as they are."
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=Path, help="answers.jsonl (default: the one in --out)")
    parser.add_argument("--benchmark", help="definition that names the question file and its pictures")
    parser.add_argument("--questions", "--gt", dest="questions", type=Path, help="default: questions.jsonl beside it")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: the one they were asked with)")
    parser.add_argument("--judged", type=Path, help="judge.json of the judge step, to be shown as one more metric")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--gallery", type=int, default=10_000, help="most answers in the gallery; default %(default)s")
    parser.add_argument(
        "--gallery-mb", type=float, default=20, help="most megabytes of pictures in the page; default %(default)s"
    )
    parser.add_argument("--model-card", type=Path, help="checkpoint folder whose README.md gets the scores, too")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default 0")
    configure_bertscore(parser)


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval.benchmarks import load_benchmark
    from medllava.eval.metrics import verdicts
    from medllava.eval.provenance import read_run
    from medllava.eval.score import as_text, score_files
    from medllava.jsonl import read_json, write_json, write_records

    answers = arguments.answers or arguments.out / "answers.jsonl"
    made = read_run(answers)
    questions, images = arguments.questions, arguments.images
    if arguments.benchmark:
        benchmark = load_benchmark(arguments.benchmark)
        questions, images = questions or benchmark.questions, images or benchmark.images
    bert = (arguments.bertscore_model, arguments.bertscore_layer) if arguments.bertscore_model else None
    report, rows = score_files(answers, questions, seed=arguments.seed, bert=bert)
    if arguments.judged:
        judged = Report.model_validate(read_json(arguments.judged))
        notes = (*report.notes, *(f"Judge: {note}" for note in judged.notes))
        report = report.model_copy(update={"metrics": {**report.metrics, **judged.metrics}, "notes": notes})
    if arguments.gallery < 0 or arguments.gallery_mb < 0:
        raise ConfigError("--gallery and --gallery-mb must not be negative")
    title = arguments.title or f"Evaluation: {made.get('benchmark', {}).get('name', 'answers')}"
    write_report(
        arguments.out, report, rows, images or Path(made.get("images", answers.parent)), title=title,
        gallery=arguments.gallery, gallery_mb=arguments.gallery_mb, date=made.get("date"),
    )
    write_records(arguments.out / "verdicts.jsonl", verdicts(rows))
    write_json(arguments.out / "report.json", report.model_dump(mode="json"))
    print(as_text(report))
    if arguments.model_card:
        print(f"\n{write_model_card(arguments.model_card, report)}")
    print(f"\n{arguments.out / 'report.html'}")
    return 0


def write_report(
    out: Path,
    report: Report,
    rows: list[Row],
    images: Path,
    *,
    title: str,
    gallery: int = 10_000,
    gallery_mb: float = 20,
    date: str | None = None,
) -> None:
    """Write chart.svg, report.md, report.tex and report.html into ``out``. ``gallery``: most answers in the page,
    ``gallery_mb``: of pictures."""
    from medllava.eval.chart import bar_chart
    from medllava.jsonl import atomic_write

    chart = bar_chart(report)
    for name, text in (
        ("chart.svg", chart),
        ("report.md", as_markdown(report, title)),
        ("report.tex", as_latex(report, title)),
        ("report.html", _as_html(report, rows, images, title, chart, gallery, gallery_mb, date)),
    ):
        with atomic_write(out / name) as file:
            file.write(text)


def as_markdown(report: Report, title: str) -> str:
    """The tables and notes of the report as Markdown."""
    from medllava.eval.latex import markdown_cell
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
    if report.answer_words:
        lines += ["", words_told(report)]
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
    if report.calibration:
        lines += ["", "## Does it know what it knows?", "", "| metric | expected calibration error | answers |"]
        lines += ["| --- | ---: | ---: |"]
        lines += [f"| {name} | {found.error:.3f} | {found.n} |" for name, found in report.calibration.items()]
    if report.replies:
        lines += ["", "## Replies that say nothing, or go round", "", REPLIES, ""]
        lines += ["| condition | replies | empty | looping | cut off |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, told in report.replies.items():
            lines.append(f"| {name} | {told.answered} | {told.empty} | {told.looping} | {told.cut_off} |")
    if report.abstention:
        shares = ", ".join(f"{name} {number(found.value)}" for name, found in report.abstention.items())
        lines += ["", f"Share of answers that say they cannot tell: {shares}."]
    for category, values in report.by_category.items():
        names = list(dict.fromkeys(name for found in values.values() for name in found))
        lines += ["", f"## By {category}", "", f"| {markdown_cell(category)} | questions | {' | '.join(names)} |"]
        lines += ["| --- |" + " ---: |" * (len(names) + 1)]
        for value, by_name in values.items():
            cells = [number(by_name[name].value) if name in by_name else "" for name in names]
            lines.append(f"| {markdown_cell(value)} | {_questions_of(by_name)} | {' | '.join(cells)} |")
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


def environment() -> Any:
    """Jinja with this folder's templates, in which everything is escaped. Raises MissingExtraError."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "eval", error) from error
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    made.filters.update(number=number, signed=signed, interval=interval)
    return made


def _as_html(
    report: Report, rows: list[Row], images: Path, title: str, chart: str, gallery: int, gallery_mb: float,
    date: str | None,
) -> str:
    from medllava.eval.chart import LABELS, calibration_chart, category_chart
    from medllava.eval.gallery import SIDE, as_script, items, small_pictures
    from medllava.eval.judge_pairs import METRICS as PAIRS
    from medllava.eval.metrics import BLIND
    from medllava.eval.vqa import METRICS

    real = [row for row in rows if row.condition == "real"]
    shown = items(rows)[:gallery]
    names = list(dict.fromkeys(item["picture"] for item in shown if "picture" in item))
    pictures = small_pictures(names, images, int(gallery_mb * 1e6))
    return str(environment().get_template("report.html").render(
        title=title, report=report, definitions={**METRICS, **PAIRS, "judge": JUDGE}, labels=LABELS,
        rotation=ROTATION, replies=REPLIES, chart=chart.replace("<svg ", '<svg class="chart" ', 1),
        categories={name: category_chart(values) for name, values in report.by_category.items()},
        calibration={name: calibration_chart(found) for name, found in report.calibration.items()},
        model=report.provenance.get("model", "unknown model"), date=date, words=words_told(report),
        questions=len(real), groups=len({row.question.group for row in real}),
        answers=len(shown), side=SIDE, with_picture=len(pictures), of_pictures=len(names), limit_mb=gallery_mb,
        boxes=any("box" in item or "answered" in item for item in shown),
        items=as_script(shown), pictures=as_script(pictures), labels_script=as_script(LABELS),
        provenance=_flat(report.provenance), blind=BLIND,
    ))


def write_model_card(folder: Path, report: Report) -> Path:
    """Put the scores into the head of ``folder``'s README.md as a model-index; those of other benchmarks stay. Raises
    ConfigError if the folder is none, or its card's head is no YAML."""
    import yaml

    from medllava.eval.harness import model_index
    from medllava.jsonl import atomic_write

    if not folder.is_dir():
        raise ConfigError(f"--model-card {folder}: no such checkpoint folder")
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.resolve().name}\n"
    head, body = "", text
    if text.startswith("---\n") and "\n---" in text[3:]:
        head, _, body = text[4:].partition("\n---")
        body = body.removeprefix("\n")
    try:
        values = yaml.safe_load(head) or {}
        (made,) = yaml.safe_load(model_index(report, folder.resolve().name))["model-index"]
        (result,) = made["results"]
        (before,) = values.get("model-index") or [{"name": made["name"], "results": []}]
        others = [one for one in before["results"] if one["dataset"]["type"] != result["dataset"]["type"]]
        values["model-index"] = [{"name": before["name"], "results": [*others, result]}]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: its head is not what the hub reads ({type(error).__name__}); repair it") from error
    with atomic_write(path) as file:
        file.write(f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=118)}---\n{body}")
    return path


def _flat(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The provenance as lines: nested parts as compact JSON."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True))
        for key, value in provenance.items()
        if value is not None
    ]
