"""Compute the scores again from saved answers, with no model and no GPU, and compare them with a saved report.

example:
  medllava eval rescore answers/answers.jsonl --against answers/report.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from medllava.errors import DataError
from medllava.eval.score import configure_bertscore

HELP = "compute the scores again from saved answers; no model needed"

COMPARED = (
    "metrics", "ablations", "visual_gain", "baselines", "unclear", "answer_words", "abstention", "rotation", "letters",
    "by_category", "calibration", "replies",
)
"""Parts of a report that are compared, as far as it has them: an older one may lack some."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("answers", type=Path, help="answers.jsonl")
    parser.add_argument("--questions", "--gt", dest="questions", type=Path, help="default: questions.jsonl beside it")
    parser.add_argument("--against", type=Path, help="report.json to compare with; a difference is an error")
    parser.add_argument("--out", type=Path, help="report.json to write")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default 0")
    configure_bertscore(parser)


def _same(before: Any, now: Any) -> bool:
    """Equal but for the last digits, in which machines and versions of the numerics library differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_same(before[key], now[key]) for key in now)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-12)
    return bool(before == now)


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval.score import as_text, score_files
    from medllava.eval.vqa import METRICS
    from medllava.jsonl import read_json, write_json

    bert = (arguments.bertscore_model, arguments.bertscore_layer) if arguments.bertscore_model else None
    report, _ = score_files(arguments.answers, arguments.questions, seed=arguments.seed, bert=bert)
    rows = report.model_dump(mode="json")
    if arguments.out:
        write_json(arguments.out, rows)
    print(as_text(report))
    if arguments.against:
        before = dict(read_json(arguments.against))
        # What a judge gave is in its own file; without a call nobody can tell it again.
        before["metrics"] = {name: value for name, value in before.get("metrics", {}).items() if name in METRICS}
        different = [key for key in COMPARED if key in before and not _same(before[key], rows[key])]
        if different:
            raise DataError(f"{arguments.against}: {', '.join(different)} differ from what the answers give now")
        print(f"\nthe same scores as {arguments.against}")
    return 0
