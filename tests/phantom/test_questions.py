from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from medllava.errors import DataError
from medllava.eval.records import Question
from medllava.geometry import QUADRANTS, Box
from medllava.jsonl import read_records, write_records
from medllava.phantom.grammar import FINDINGS
from medllava.phantom.outputs import describe_truth
from medllava.phantom.questions import main, read_views, write_questions
from medllava.phantom.session import Settings, plan_session


def narrate(truth: dict[str, Any], crop: tuple[int, int, int, int] | None = None) -> list[dict[str, Any]]:
    """What a perfect narrate step would write."""
    return [
        {
            "id": f"{truth['video'][:-4]}-{number:03d}", "video": truth["video"], "start_s": field["start_s"] + 0.2,
            "end_s": field["end_s"] - 0.1, "image": f"frames/{truth['video'][:-4]}-{number:03d}.png",
            "crop_px": list(crop or (0, 0, truth["width"], truth["height"])), "trace": [], "utterances": [],
        }
        for number, field in enumerate(truth["fields"])
    ]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Truths of 20 cases (no video is needed for questions) and perfect narratives of them."""
    folder = tmp_path_factory.mktemp("truths")
    rows = []
    for index in range(1, 21):
        truth = describe_truth(plan_session(9, index, Settings()))
        (folder / f"{truth['video'][:-4]}.truth.json").write_text(json.dumps(truth))
        rows += narrate(truth)
    write_records(folder / "narratives.jsonl", rows)
    return folder, folder / "narratives.jsonl"


@pytest.fixture(scope="module")
def questions(planned: tuple[Path, Path]) -> list[Question]:
    out = planned[0] / "questions.jsonl"
    flags = ["--videos", str(planned[0]), "--narratives", str(planned[1]), "--out", str(out), "--per-kind", "120"]
    assert main(flags) == 0
    return list(read_records(out, Question))


def of_kind(questions: list[Question], kind: str) -> list[Question]:
    return [q for q in questions if q.kind == kind]


def test_questions_read_back_with_unique_ids(questions: list[Question]) -> None:
    assert Counter(q.kind for q in questions) == dict.fromkeys(("where", "yes_no", "what", "count", "box"), 120)
    assert len({q.id for q in questions}) == len(questions)
    assert all(q.answer in q.choices for q in questions if q.kind != "box")
    assert all((q.box is not None) == (q.kind == "box") for q in questions)


def test_answers_are_balanced(questions: list[Question]) -> None:
    assert Counter(q.answer for q in of_kind(questions, "yes_no")) == {"yes": 60, "no": 60}
    for kind, choices in (("where", QUADRANTS), ("count", ("1", "2", "3", "4"))):
        counts = Counter(q.answer for q in of_kind(questions, kind))
        assert all(abs(counts[c] - 120 / len(choices)) <= 3 for c in choices), counts
    what = Counter(q.answer for q in of_kind(questions, "what"))
    assert what["stroma"] == 20
    assert all(10 <= what[kind] <= 15 for kind in FINDINGS), what
    asked = Counter((q.answer, next(k for k in FINDINGS if k in q.question)) for q in of_kind(questions, "yes_no"))
    assert all(6 <= asked[answer, kind] <= 9 for answer in ("yes", "no") for kind in FINDINGS), asked
    assert max(Counter(q.image for q in of_kind(questions, "where")).values()) <= 2


def test_answers_are_true(planned: tuple[Path, Path], questions: list[Question]) -> None:
    views = {view.image: view for view in read_views(*planned)}
    for q in questions:
        view = views[str(q.image)]
        named = next((kind for kind in FINDINGS if kind in q.question), "")
        quadrant = next((name for name in QUADRANTS if name in q.question), "")
        truth = {
            "where": lambda v=view, k=named: v.boxes[k].centre.quadrant(),
            "yes_no": lambda v=view, k=named: "yes" if k in v.boxes else "no",
            "what": lambda v=view, p=quadrant: v.by_quadrant.get(p, "stroma"),
            "count": lambda v=view: str(len(v.boxes)),
            "box": lambda q=q: q.answer,
        }[q.kind]()
        assert q.answer == truth
        assert q.group == view.video
        if q.box is not None:
            assert q.box.iou(view.boxes[named]) > 0.99


def test_same_seed_same_questions(planned: tuple[Path, Path]) -> None:
    views = read_views(*planned)
    assert write_questions(views, 3, 40) == write_questions(views, 3, 40)
    assert write_questions(views, 3, 40) != write_questions(views, 4, 40)


def test_boxes_follow_the_crop(planned: tuple[Path, Path], tmp_path: Path) -> None:
    truth = json.loads((planned[0] / "phantom-9-0001.truth.json").read_text())
    # Two pixels cut off on each side, less than any finding's margin to the edge.
    write_records(tmp_path / "n.jsonl", narrate(truth, (4, 2, 316, 238)))
    for view, field in zip(read_views(planned[0], tmp_path / "n.jsonl"), truth["fields"], strict=True):
        for finding in field["findings"]:
            x1, y1, x2, y2 = finding["box"]
            expected = Box(
                x1=(x1 * 320 - 4) / 312, y1=(y1 * 240 - 2) / 236, x2=(x2 * 320 - 4) / 312, y2=(y2 * 240 - 2) / 236
            )
            assert view.boxes[finding["kind"]].iou(expected) > 0.99


def test_doubtful_narratives_are_left_out(planned: tuple[Path, Path], tmp_path: Path) -> None:
    truth = json.loads((planned[0] / "phantom-9-0001.truth.json").read_text())
    rows = narrate(truth)
    title = {**rows[0], "id": "title", "start_s": 0.0, "end_s": truth["static"][0][1]}
    half_cut = {**row_with_four(rows, truth), "id": "cut", "crop_px": [160, 0, 320, 240]}
    stranger = {**rows[0], "id": "stranger", "video": "lecture.mp4"}
    write_records(tmp_path / "n.jsonl", [title, half_cut, stranger, rows[1]])
    assert [view.narrative_id for view in read_views(planned[0], tmp_path / "n.jsonl")] == [rows[1]["id"]]
    write_records(tmp_path / "none.jsonl", [title, stranger])
    with pytest.raises(DataError, match="no narrative shows a field"):
        read_views(planned[0], tmp_path / "none.jsonl")


def row_with_four(rows: list[dict[str, Any]], truth: dict[str, Any]) -> dict[str, Any]:
    return next(row for row, field in zip(rows, truth["fields"], strict=True) if len(field["findings"]) == 4)


def test_a_row_that_is_no_narrative_is_named(planned: tuple[Path, Path], tmp_path: Path) -> None:
    write_records(tmp_path / "n.jsonl", [{"id": "x"}])
    with pytest.raises(DataError, match=r"n\.jsonl:1: a narrative needs video"):
        read_views(planned[0], tmp_path / "n.jsonl")
