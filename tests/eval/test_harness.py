from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml

from medllava.errors import ConfigError
from medllava.eval import __main__ as commands
from medllava.eval.harness import lmms_prompt, lmms_score, lmms_target

from . import make_samples


def test_answers_are_scored_as_here() -> None:
    suffixes = {"closed_suffix": "\nAnswer with yes or no."}
    closed = {"image": object(), "question": "Is it a gland?", "answer": "yes"}
    assert lmms_prompt(closed, suffixes) == "Is it a gland?\nAnswer with yes or no."
    assert lmms_target(closed) == "yes"
    assert lmms_score(closed, ["Yes, there is no doubt."]) == {"closed_accuracy": 1.0}
    assert lmms_score(closed, [""]) == {"closed_accuracy": 0.0}
    opened = lmms_score({"question": "What?", "answer": "a gland"}, ["gland"])
    assert opened["open_f1"] == opened["open_exact"] == 1.0 and "closed_accuracy" not in opened
    unread = {"question": "Is it?", "answer": "Perhaps it is, one would have to look", "answer_type": "CLOSED"}
    assert lmms_score(unread, ["yes"]) == {}


def test_lmms_eval_loads_and_runs_a_task(tmp_path: Path) -> None:
    """In an installed lmms-eval: a generated task on local rows gives prompts, pictures and scores."""
    tasks = pytest.importorskip("lmms_eval.tasks")
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    make_samples.pictures(tmp_path / "images")
    rows = [
        {"image": Image.open(tmp_path / "images" / row["image"]), "question": row["question"], "answer": row["answer"]}
        for row in make_samples.open_and_closed()
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "test.parquet"))
    assert commands.main(["harness", "--to", "lmms-eval", "--out", str(tmp_path)]) == 0
    for path in tmp_path.glob("*.yaml"):
        if path.stem != "medllava_path_vqa":
            path.unlink()
    task = tmp_path / "medllava_path_vqa.yaml"
    local = "dataset_path: parquet\ndataset_kwargs:\n  data_files: {test: test.parquet}"
    task.write_text(task.read_text().replace("dataset_path: flaviagiammarino/path-vqa", local))
    manager = tasks.TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    loaded = tasks.get_task_dict(["medllava_path_vqa"], manager)["medllava_path_vqa"]
    first = loaded.test_docs()[0]
    assert loaded.doc_to_text(first).startswith("What is seen in field 0?")
    assert loaded.doc_to_visual(first)[0].size == (64, 48)
    assert loaded.process_results(first, ["a gland in stroma"])["open_f1"] == 1.0


def test_vlmevalkit_tables(tmp_path: Path) -> None:
    made = make_samples.make(tmp_path / "data")
    for name, kind in (("pmc_vqa", "mcq"), ("quilt_vqa", "vqa")):
        source, images = made[name]
        line = ["harness", "--to", "vlmevalkit", "--benchmark", name, "--questions", str(source)]
        line += ["--images", str(images)]
        assert commands.main([*line, "--out", str(tmp_path / "LMUData")]) == 0
        csv.field_size_limit(sys.maxsize)
        with (tmp_path / "LMUData" / f"medllava_{name}_{kind}.tsv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if kind == "mcq":
            assert [(row["A"], row["answer"]) for row in rows[:2]] == [("a gland", "A"), ("a gland", "B")]
            assert rows[0]["question"] == "What is seen in 0?"
        else:
            assert len(rows) == 8 and rows[1]["question"].endswith("\nAnswer with yes or no.")
        assert all(row["image"] for row in rows)


def test_vlmevalkit_reads_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an installed VLMEvalKit: its own data set class opens the tables and builds the prompts."""
    dataset = pytest.importorskip("vlmeval.dataset", reason="VLMEvalKit is not installed (it is on no package index)")
    source, images = make_samples.make(tmp_path / "data")["pmc_vqa"]
    line = ["harness", "--to", "vlmevalkit", "--benchmark", "pmc_vqa", "--questions", str(source)]
    assert commands.main([*line, "--images", str(images), "--out", str(tmp_path / "LMUData")]) == 0
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    loaded = dataset.build_dataset("medllava_pmc_vqa_mcq")
    assert len(loaded.data) == 4
    prompt = loaded.build_prompt(loaded.data.iloc[0])
    assert any(part["type"] == "image" for part in prompt) and any("gland" in str(part) for part in prompt)


CARD = """---
library_name: peft
tags:
- medllava
---
# medllava checkpoint (lora)

Text that stays.
"""


def test_scores_go_into_a_checkpoints_model_card(tmp_path: Path) -> None:
    """Each benchmark once, the rest of the card as it was; the hub's own parser reads it."""
    from huggingface_hub import ModelCard

    from medllava.eval.records import Report
    from medllava.eval.report import write_model_card

    folder = tmp_path / "stage2"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for name, value in (("path_vqa", 0.5), ("quilt_vqa", 0.25), ("path_vqa", 0.75)):
        metric = {"closed_accuracy": {"value": value, "low": None, "high": None, "n": 9}}
        write_model_card(folder, Report.model_validate(
            {"metrics": metric, "provenance": {"model": "x", "benchmark": {"name": name}}}
        ))
    card = ModelCard.load(folder / "README.md")
    card.data.to_dict()
    found = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert found == {"path_vqa": 0.75, "quilt_vqa": 0.25}
    assert card.data.library_name == "peft" and card.data.model_name == "stage2"
    assert card.text.strip() == CARD.partition("---\n# ")[2].join(["# ", ""]).strip()
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        write_model_card(tmp_path / "gone", Report(metrics={}))
    (folder / "README.md").write_text("---\nmodel-index: 3\n---\n# x\n")
    with pytest.raises(ConfigError, match="its head is not what the hub reads"):
        write_model_card(folder, Report(metrics={}))


def test_model_index(tmp_path: Path) -> None:
    report = {"metrics": {"closed_accuracy": {"value": 0.61234, "low": 0.5, "high": 0.7, "n": 9, "unscored": 0}},
              "provenance": {"model": "stage2", "benchmark": {"name": "path_vqa"}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    out = tmp_path / "index.yaml"
    line = ["harness", "--to", "model-index", "--report", str(tmp_path / "report.json"), "--out", str(out)]
    assert commands.main(line) == 0
    (model,) = yaml.safe_load(out.read_text())["model-index"]
    (result,) = model["results"]
    assert model["name"] == "stage2" and result["dataset"]["type"] == "path_vqa"
    assert result["metrics"][0]["value"] == 0.6123
    hub = pytest.importorskip("huggingface_hub")
    head = f"---\n{out.read_text()}---\n# Card\n"
    card = hub.ModelCard(head)
    assert card.data.eval_results[0].metric_value == 0.6123
