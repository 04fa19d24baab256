from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from medllava.errors import CheckpointError, ConfigError, DataError
from medllava.eval import __main__ as commands
from medllava.eval.answer import answer_all
from medllava.eval.benchmarks import Benchmark, read_questions
from medllava.eval.models import Asked, Model, Reply
from medllava.eval.pictures import Pictures
from medllava.eval.score import score_files
from medllava.jsonl import write_records

Ask = Callable[[Sequence[Asked]], list[Reply]]
BLIND = "the model's answers do not depend on the picture"


def answered(discs: Path, ask: Ask, out: Path) -> Path:
    questions = read_questions(discs / "questions.jsonl")
    answer_all(questions, Benchmark(name="discs"), Pictures(discs, questions), Model("stub", ask), out)
    write_records(out / "questions.jsonl", questions)
    return out / "answers.jsonl"


def original(tmp_path: Path, rows: list[dict[str, Any]], texts: list[str]) -> tuple[Path, Path]:
    gt, answers = tmp_path / "some_test_w_ans.json", tmp_path / "answers.jsonl"
    gt.write_text(json.dumps(rows))
    write_records(answers, [{"question_id": row["id"], "text": text} for row, text in zip(rows, texts, strict=True)])
    return gt, answers


def closed(number: int, truth: str, **more: str) -> dict[str, Any]:
    row = {"id": number, "image": f"{number}.jpg", "question": "Is it?", "answer_type": "CLOSED", "answer": truth}
    return {**row, **more}


def test_a_model_that_looks_gains_and_one_that_does_not_gains_nothing(
    discs: Path, looks: Ask, guesses: Ask, tmp_path: Path
) -> None:
    report, _ = score_files(answered(discs, looks, tmp_path / "looks"))
    assert report.metrics["where"].value == report.metrics["what"].value == report.metrics["yes_no"].value == 1.0
    assert report.metrics["count"].value == 1.0
    assert report.metrics["box_iou"].value > 0.85  # type: ignore[operator]
    assert report.ablations["mismatched"]["where"].value < 0.6  # type: ignore[operator]
    assert all(gain.low > 0 for gain in report.visual_gain.values())  # type: ignore[operator]
    assert not any(BLIND in note for note in report.notes)

    report, _ = score_files(answered(discs, guesses, tmp_path / "guesses"))
    assert {gain.value for gain in report.visual_gain.values()} == {0.0}
    assert report.metrics["yes_no"].value == 0.5
    assert report.notes[0].startswith(f"On every metric {BLIND}")
    assert set(report.ablations) == {"no_image", "blank", "noise", "mismatched"}
    for condition in report.ablations:
        assert {name: found.value for name, found in report.ablations[condition].items()} == {
            name: found.value for name, found in report.metrics.items()
        }


def test_the_original_files_are_read(tmp_path: Path) -> None:
    rows = [
        closed(0, "No."), closed(1, "YES"), closed(2, "A long sentence.", yes_no_answer="Yes"), closed(3, "no"),
        {"id": 4, "image": "4.jpg", "question": "What?", "answer_type": "OPEN", "answer": "necrosis"},
        {"id": 5, "image": "4.jpg", "question": "What?", "answer_type": "other", "answer": "a gland"},
        {"id": 6, "image": "4.jpg", "question": "What?", "answer_type": "NUMBER", "answer": "3"},
    ]
    gt, answers = original(
        tmp_path, rows, ["", "I am unable to tell", "Yes, there is no doubt", "not uncommon", "necrosis", "x", "3"]
    )
    report, _ = score_files(answers, gt)
    assert report.metrics["closed_accuracy"].value == 0.25
    assert report.unclear["real"]["closed_accuracy"] == 3
    assert report.metrics["open_f1"].value == 0.5
    assert report.metrics["open_f1"].n == 2


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_a_set_without_open_or_without_closed_questions(kind: str, tmp_path: Path) -> None:
    rows = [closed(0, "yes")] if kind == "closed" else [{**closed(0, "yes it is"), "answer_type": "OPEN"}]
    gt, answers = original(tmp_path, rows, ["yes it is"])
    report, _ = score_files(answers, gt)
    assert set(report.metrics) == (
        {"closed_accuracy", "closed_balanced"} if kind == "closed"
        else {"open_f1", "open_recall", "open_precision", "open_exact", "open_bleu", "open_rouge_l"}
    )
    assert all(found.value == 1.0 for found in report.metrics.values())


def test_multiple_choice(tmp_path: Path) -> None:
    value = "<image>\nWhich is it?\nA: ghost cells\nB: gland\nC: necrosis\nD: vessel"
    rows = [
        {"id": f"p{n}", "image": f"{n}.jpg", "conversations": [{"from": "human", "value": value},
                                                            {"from": "gpt", "value": "B"}]}
        for n in range(4)
    ]
    gt, answers = original(tmp_path, rows, ["The answer is B", "A gland.", "A or B", "C"])
    report, _ = score_files(answers, gt)
    assert report.metrics["closed_accuracy"].value == 0.5
    assert report.baselines["closed_accuracy"] == {"constant": 1.0, "chance": 0.25}


def test_score_writes_report_and_verdicts_or_prints(
    discs: Path, looks: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = answered(discs, looks, tmp_path)
    assert commands.main(["score", "--answers", str(answers), "--out", str(tmp_path / "r" / "report.json")]) == 0
    written = json.loads((tmp_path / "r" / "report.json").read_text())
    assert set(written["metrics"]["where"]) == {"value", "low", "high", "n", "unscored"}
    assert set(written["ablations"]["blank"]["where"]) == {"value", "low", "high", "n", "unscored"}
    verdicts = [json.loads(line) for line in (tmp_path / "r" / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 5 * 120
    capsys.readouterr()
    assert commands.main(["score", "--answers", str(answers)]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == written["metrics"]


def test_rescore_tells_a_difference(discs: Path, looks: Ask, tmp_path: Path) -> None:
    answers = answered(discs, looks, tmp_path)
    report = tmp_path / "report.json"
    commands.main(["score", "--answers", str(answers), "--out", str(report)])
    assert commands.main(["rescore", str(answers), "--against", str(report)]) == 0
    changed = json.loads(report.read_text())
    changed["metrics"]["where"]["value"] = 0.5
    report.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="metrics differ"):
        commands.main(["rescore", str(answers), "--against", str(report)])
    changed["metrics"]["where"]["value"] = 1.0
    changed["metrics"]["judge"] = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 9, "unscored": 0}
    del changed["letters"]
    report.write_text(json.dumps(changed))
    assert commands.main(["rescore", str(answers), "--against", str(report)]) == 0, "a judge's figure, an older report"
    changed["abstention"]["real"]["value"] = 0.7
    report.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="abstention differ"):
        commands.main(["rescore", str(answers), "--against", str(report)])


def test_bad_files_are_named(tmp_path: Path) -> None:
    gt, answers = original(tmp_path, [closed(0, "yes")], ["yes"])
    for questions in (gt, None):
        with pytest.raises(DataError, match="nothing.jsonl: no such answers file"):
            score_files(tmp_path / "nothing.jsonl", questions)
    with pytest.raises(DataError, match="--questions"):
        score_files(answers)
    answers.write_text('{"question_id": 0, "text": "yes"}\n{"question_id": 5, "text": "yes"}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:2: an answer is to question '5'.*--questions"):
        score_files(answers, gt)
    answers.write_text('{"question_id": 0, "text": "yes"}\n{"question_id": 0, "text": "no"}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:2: question '0' is answered twice .*first in line 1"):
        score_files(answers, gt)
    answers.write_text('{"question_id": 0, "te\n{"question_id": 0, "text": "no"}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:1: not JSON"):
        score_files(answers, gt)
    answers.write_text('{"question_id": 0}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:1.*'text'"):
        score_files(answers, gt)
    gt.write_text('[{"id": 1, "answer_type": "OPEN"}]')
    with pytest.raises(DataError, match="row 0"):
        read_questions(gt)
    gt.write_text("[]")
    with pytest.raises(DataError, match="no questions"):
        read_questions(gt)
    with pytest.raises(ConfigError, match="--legacy"):
        commands.main(["score", "--answers", str(answers), "--quilt"])


def test_bertscore_with_a_text_encoder_of_ones_own(tmp_path: Path) -> None:
    """The same words are 1, others less, no words 0; the answers' and references' lengths stand beside it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    encoder = tmp_path / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "gland", "in", "stroma", "bone"]
    encoder.mkdir()
    (encoder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(encoder / "vocab.txt")).save_pretrained(encoder)
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )).save_pretrained(encoder)
    answers = {"same": "a gland in stroma", "other": "bone bone", "none": ""}
    write_records(tmp_path / "questions.jsonl", [
        {"id": name, "image": None, "question": "What?", "kind": "open", "answer": "a gland in stroma", "group": name}
        for name in answers
    ])
    write_records(tmp_path / "answers.jsonl", [
        {"question_id": name, "text": text, "model": "m"} for name, text in answers.items()
    ])
    line = ["score", "--answers", str(tmp_path / "answers.jsonl"), "--bertscore-model", str(encoder), "--out"]
    assert commands.main([*line, str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (one, two, three) = [
        report["metrics"]["open_bertscore"]["value"], report["answer_words"]["open"], report["reference_words"]["open"]
    ]
    assert 1 / 3 < one < 2 / 3 and two == 2 and three == 4
    assert report["provenance"]["scoring"]["bertscore"]["layer"] == -1
    again = ["rescore", str(tmp_path / "answers.jsonl"), "--against", str(tmp_path / "report.json")]
    assert commands.main([*again, "--bertscore-model", str(encoder)]) == 0
    with pytest.raises(CheckpointError, match="no config.json; expected a Hugging Face folder of a text encoder"):
        commands.main([*line[:-2], str(tmp_path), "--out", str(tmp_path / "other.json")])


def test_bertscore_is_what_the_paper_says(tmp_path: Path) -> None:
    """Greedy matching of contextual vectors, computed here for one pair at a time from the encoder's own output."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from medllava.model.bert_score import BertScorer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "gland", "in", "stroma", "bone"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = BertModel(BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    )).eval()
    model.save_pretrained(tmp_path)

    @torch.inference_mode()
    def vectors(text: str) -> torch.Tensor:
        hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
        return torch.nn.functional.normalize(hidden[1:-1], dim=-1)  # without [CLS] and [SEP]

    pairs = [("gland", "a gland in stroma"), ("bone in bone in bone", "gland"), ("a bone", "a bone")]
    found = BertScorer(tmp_path, 1, "cpu").f1([answer for answer, _ in pairs], [text for _, text in pairs])
    for (answer, text), value in zip(pairs, found, strict=True):
        likeness = [[float(one @ other) for other in vectors(text)] for one in vectors(answer)]
        precision = sum(map(max, likeness)) / len(likeness)
        recall = sum(map(max, zip(*likeness, strict=True))) / len(likeness[0])
        assert value == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert found[2] == pytest.approx(1) and found[0] < 0.95


def test_half_a_line_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_records(tmp_path / "questions.jsonl", [
        {"id": "a", "image": None, "question": "Is it?", "kind": "closed", "answer": "yes", "choices": ["yes", "no"],
         "group": "g"}
    ])
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": "a", "text": "Yes."}\n{"question_id": "a", "te')
    report, _ = score_files(path)
    assert report.metrics["closed_accuracy"].value == 1
    assert f"{path}:2: the last line is half written and was left out" in caplog.text
    path.write_text('{"question_id": "a", "text": "Yes.", "logprob": "high"}\n')
    with pytest.raises(DataError, match="answers.jsonl:1: logprob: Input should be a valid number"):
        score_files(path)
