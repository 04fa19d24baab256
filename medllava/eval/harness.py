"""The benchmarks in other harnesses: task files for lmms-eval, tables for VLMEvalKit, a model card's result block.

--to lmms-eval    a YAML file per benchmark whose data set on the hub holds its pictures; answers are read and scored by
                  the functions of this module, so both harnesses give one number
--to vlmevalkit   a TSV file for the folder LMUData, from your copy of the data; run with --data NAME
--to model-index  the model-index block (YAML) for the head of a model card, from a report.json

example:
  medllava eval harness --to lmms-eval --out eval/harness/lmms_eval
  medllava eval harness --to vlmevalkit --benchmark pmc_vqa --questions q.json --images imgs --out LMUData
  medllava eval harness --to model-index --report report/report.json --out model_index.yaml
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllava.errors import ConfigError, DataError
from medllava.eval.questions import Reading, to_questions
from medllava.eval.records import Question, Report
from medllava.eval.vqa import METRICS, grade, metrics_of, split_option

if TYPE_CHECKING:
    from PIL import Image

    from medllava.eval.benchmarks import Benchmark

HELP = "task files for lmms-eval and VLMEvalKit, and the model-index block of a model card"

LMMS_METRICS = ("closed_accuracy", "open_f1", "open_recall", "open_precision", "open_exact", "open_rouge_l")
"""Those that are plain means over questions, which is all that lmms-eval's aggregation does."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", choices=("lmms-eval", "vlmevalkit", "model-index"), required=True)
    parser.add_argument("--benchmark", help="vlmevalkit: name in eval/benchmarks, or path of a YAML definition")
    parser.add_argument("--questions", type=Path, help="vlmevalkit: question file or folder")
    parser.add_argument("--images", type=Path, help="vlmevalkit: folder of the pictures")
    parser.add_argument("--split", help="vlmevalkit: which split, where the data holds several")
    parser.add_argument("--report", type=Path, help="model-index: report.json")
    parser.add_argument("--name", help="model-index: the model's name (default: the report's)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; model-index: the file")


def run(arguments: argparse.Namespace) -> int:
    from medllava.jsonl import atomic_write, read_json

    if arguments.to == "lmms-eval":
        files = lmms_tasks()
    elif arguments.to == "model-index":
        if arguments.report is None:
            raise ConfigError("--to model-index needs --report report.json")
        report = Report.model_validate(read_json(arguments.report))
        files = {arguments.out.name: model_index(report, arguments.name)}
        arguments.out = arguments.out.parent
    else:
        files = _vlmevalkit(arguments)
    for name, text in files.items():
        with atomic_write(arguments.out / name) as file:
            file.write(text)
        print(arguments.out / name)
    return 0


# ------------------------------------------------------------------------------------------------------------ lmms-eval


def lmms_tasks() -> dict[str, str]:
    """File name -> task definition, for every benchmark whose hub data set holds its pictures."""
    from medllava.eval.benchmarks import known_files, load_benchmark

    benchmarks = [load_benchmark(str(path)) for path in known_files("benchmarks", ".yaml").values()]
    return {
        f"medllava_{benchmark.name}.yaml": lmms_task(benchmark)
        for benchmark in sorted(benchmarks, key=lambda each: each.name)
        if benchmark.harness
    }


def lmms_task(benchmark: Benchmark) -> str:
    """One task: its functions are those below, found by their module's name, so that no file of code goes with it."""
    import yaml

    here = "medllava.eval.harness"
    functions = {
        "doc_to_visual": "lmms_picture", "doc_to_text": "lmms_prompt", "doc_to_target": "lmms_target",
        "process_results": "lmms_score",
    }
    head = {
        "task": f"medllava_{benchmark.name}", **benchmark.harness, "output_type": "generate_until",
        "generation_kwargs": {
            "max_new_tokens": benchmark.max_new_tokens, "temperature": 0, "do_sample": False, "num_beams": 1,
        },
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in LMMS_METRICS
        ],
        "lmms_eval_specific_kwargs": {"default": {f"{kind}_suffix": text for kind, text in benchmark.suffix.items()}},
        "metadata": [{"version": 1.0}],
    }
    lines = [f"# Made by `medllava eval harness --to lmms-eval` from eval/benchmarks/{benchmark.name}.yaml."]
    lines += [f"{key}: !function {here}.{name}" for key, name in functions.items()]
    return "\n".join(lines) + "\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=118)


def _question(doc: dict[str, Any]) -> Question:
    row = {key: value for key, value in doc.items() if key != "image" and value is not None}
    found = to_questions(row, "lmms-eval", 0, Reading())
    if not found:
        raise DataError(f"unknown answer_type {doc.get('answer_type')!r}")
    return found[0]


def lmms_picture(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> list[Image.Image]:
    """The row's picture."""
    return [doc["image"].convert("RGB")]


def lmms_prompt(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question as `medllava eval answer` asks it."""
    question = _question(doc)
    return question.question + (lmms_eval_specific_kwargs or {}).get(f"{question.kind}_suffix", "")


def lmms_target(doc: dict[str, Any]) -> str:
    """The reference answer."""
    return _question(doc).answer


def lmms_score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The metrics of one answer, read as `medllava eval score` reads it; none where the reference cannot be read."""
    question = _question(doc)
    try:
        scores = grade(question, results[0] if results else "").scores
    except DataError:
        return {}
    return {name: scores[name] for name in metrics_of(question) if name in LMMS_METRICS}


# ----------------------------------------------------------------------------------------------------------- VLMEvalKit


def _vlmevalkit(arguments: argparse.Namespace) -> dict[str, str]:
    from medllava.eval.benchmarks import load_benchmark, read_question_set
    from medllava.eval.pictures import Pictures

    if not (arguments.benchmark and arguments.questions):
        raise ConfigError("--to vlmevalkit needs --benchmark and --questions")
    benchmark = load_benchmark(arguments.benchmark)
    within = arguments.out / f"{benchmark.name}_pictures"
    found = read_question_set(arguments.questions, benchmark, split=arguments.split, pictures=within)
    folder = arguments.images or (within if within.is_dir() else found.folder)
    pictures = Pictures(folder, found.questions)
    lettered = [question for question in found.questions if question.choices and split_option(question.choices[0])]
    others = [question for question in found.questions if question not in lettered]
    tables = {}
    # VLMEvalKit tells multiple choice from questions and answers by the columns, so each has a file of its own.
    for name, questions in ((f"medllava_{benchmark.name}_mcq", lettered), (f"medllava_{benchmark.name}_vqa", others)):
        if questions:
            tables[f"{name}.tsv"] = vlmevalkit_table(questions, benchmark, pictures)
    return tables


def vlmevalkit_table(questions: Sequence[Question], benchmark: Benchmark, pictures: Any) -> str:
    """Columns index, image (base64), question, A.. (for multiple choice), answer, category, id."""
    letters = max((len(question.choices) for question in questions if split_option_of(question)), default=0)
    names = [chr(ord("A") + place) for place in range(letters)]
    held = io.StringIO()
    writer = csv.DictWriter(
        held, ["index", "image", "question", *names, "answer", "category", "id"], delimiter="\t", lineterminator="\n"
    )
    writer.writeheader()
    for number, question in enumerate(questions):
        if question.image is None:
            continue
        data = base64.b64encode(pictures.path(question.image).read_bytes()).decode()
        row: dict[str, Any] = {
            "index": number, "image": data, "category": next(iter(question.categories.values()), question.kind),
            "id": question.id,
        }
        parts = split_option_of(question)
        if parts:
            lines = [line for line in question.question.split("\n") if line.strip() not in question.choices]
            row |= {"question": "\n".join(lines), **parts, "answer": question.answer[:1]}
        else:
            row |= {"question": benchmark.prompt(question), "answer": question.answer}
        writer.writerow(row)
    return held.getvalue()


def split_option_of(question: Question) -> dict[str, str]:
    """Letter -> text of a question's lettered options, or nothing."""
    parts = [split_option(choice) for choice in question.choices]
    return {part[0]: part[1] for part in parts if part} if parts and all(parts) else {}


# ---------------------------------------------------------------------------------------------------------- model-index


def model_index(report: Report, name: str | None = None) -> str:
    """The results in the form that the Hugging Face hub reads from a model card."""
    import yaml

    made = report.provenance
    benchmark = made.get("benchmark") or {}
    metrics = [
        {"type": key, "value": round(found.value, 4), "name": METRICS.get(key, key), "verified": False}
        for key, found in report.metrics.items()
        if found.value is not None
    ]
    dataset = {"name": benchmark.get("name", "own"), "type": benchmark.get("name", "own")}
    result = {
        "task": {"type": "visual-question-answering"}, "dataset": dataset, "metrics": metrics,
    }
    return yaml.safe_dump(
        {"model-index": [{"name": name or str(made.get("model", "model")), "results": [result]}]}, sort_keys=False,
        allow_unicode=True, width=118,
    )
