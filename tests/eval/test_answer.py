from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medllava.errors import ConfigError, DataError
from medllava.eval import __main__ as commands
from medllava.eval.answer import answer_all
from medllava.eval.benchmarks import Benchmark, read_questions
from medllava.eval.models import Asked, Model, Reply
from medllava.eval.pictures import Pictures
from medllava.eval.records import Answer, Failure, Question
from medllava.images import load_image
from medllava.jsonl import read_records, write_records

Ask = Callable[[Sequence[Asked]], list[Reply]]


def answers_in(folder: Path) -> list[Answer]:
    return list(read_records(folder / "answers.jsonl", Answer))


def test_every_question_is_asked_under_every_condition(discs: Path, looks: Ask, tmp_path: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")
    benchmark = Benchmark(name="discs")
    assert answer_all(questions, benchmark, Pictures(discs, questions), Model("m", looks), tmp_path) == 0
    counts = Counter(answer.condition for answer in answers_in(tmp_path))
    assert counts == dict.fromkeys(("real", "no_image", "blank", "noise", "mismatched"), len(questions))
    assert not (tmp_path / "failed.jsonl").exists()


def test_a_killed_run_goes_on_and_asks_nothing_twice(discs: Path, looks: Ask, tmp_path: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")
    benchmark, pictures = Benchmark(name="discs"), Pictures(discs, questions)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    answer_all(questions, benchmark, pictures, Model("m", looks), whole)
    seen: list[str] = []

    def dies(batch: Sequence[Asked]) -> list[Reply]:
        if len(seen) >= 100:
            raise KeyboardInterrupt
        seen.extend(prompt for _, prompt, _ in batch)
        return looks(batch)

    with pytest.raises(KeyboardInterrupt):
        answer_all(questions, benchmark, pictures, Model("m", dies), broken)
    with (broken / "answers.jsonl").open("a") as file:
        file.write('{"question_id": "half a li')
    again: list[str] = []

    def counts(batch: Sequence[Asked]) -> list[Reply]:
        again.extend(prompt for _, prompt, _ in batch)
        return looks(batch)

    answer_all(questions, benchmark, pictures, Model("m", counts), broken)
    assert len(seen) + len(again) == 5 * len(questions)
    assert (broken / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_a_bad_picture_does_not_sink_the_rest(discs: Path, looks: Ask, tmp_path: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")[:6]
    bad = questions[0].model_copy(update={"id": "bad", "image": "not_there.png", "group": "other"})
    asked = [*questions, bad]
    benchmark = Benchmark(name="discs", conditions=("real", "blank"))
    failed = answer_all(asked, benchmark, Pictures(discs, asked), Model("m", looks), tmp_path)
    assert failed == 2
    failures = list(read_records(tmp_path / "failed.jsonl", Failure))
    assert {failure.question_id for failure in failures} == {"bad"}
    assert all("not_there.png" in failure.reason for failure in failures)
    assert len(answers_in(tmp_path)) == 2 * len(questions)


def test_one_refused_question_does_not_sink_its_batch(discs: Path, looks: Ask, tmp_path: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")[:8]

    def refuses(batch: Sequence[Asked]) -> list[Reply]:
        if any("How many" in prompt for _, prompt, _ in batch):
            raise DataError("the prompt is too long")
        return looks(batch)

    benchmark = Benchmark(name="discs", conditions=("real",))
    assert answer_all(questions, benchmark, Pictures(discs, questions), Model("m", refuses), tmp_path) == 1
    assert len(answers_in(tmp_path)) == 7


def test_nothing_but_failures_is_an_error(discs: Path, looks: Ask, tmp_path: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")[:3]
    pictures, model = Pictures(tmp_path, questions), Model("m", looks)
    with pytest.raises(DataError, match="none of the 3 .*no such image file"):
        answer_all(questions, Benchmark(name="discs"), pictures, model, tmp_path / "out")


def test_ablation_pictures(discs: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")
    pictures = Pictures(discs, questions, seed=3)
    question = questions[0]
    assert question.image is not None
    real = pictures.show(question, "real")
    assert real is not None
    assert pictures.show(question, "no_image") is None
    blank, noise = pictures.show(question, "blank"), pictures.show(question, "noise")
    assert blank is not None and noise is not None
    assert blank.size == noise.size == real.size
    assert np.unique(np.asarray(blank)).tolist() == [255]
    assert np.asarray(noise).std() > 60
    again = Pictures(discs, list(reversed(questions)), seed=3)
    for condition in ("noise", "mismatched"):
        first, second = pictures.show(question, condition), again.show(question, condition)
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_mismatched_is_always_of_another_group(discs: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")
    by_image = {question.image: question.group for question in questions}
    pictures = Pictures(discs, questions)
    content = {load_image(discs / str(name)).tobytes(): name for name in by_image}
    chosen = Counter()
    for question in questions:
        shown = pictures.show(question, "mismatched")
        assert shown is not None
        other = pictures._other(question)
        assert by_image[other] != question.group
        assert shown.tobytes() in content
        chosen[other] += 1
    assert len(chosen) > len(by_image) / 2


def test_one_group_alone_cannot_be_mismatched(discs: Path) -> None:
    questions = read_questions(discs / "questions.jsonl")[:5]
    with pytest.raises(DataError, match="no picture from another group"):
        Pictures(discs, questions).show(questions[0], "mismatched")


def test_suffixes_and_text_only_questions(tmp_path: Path) -> None:
    benchmark = Benchmark(name="b", suffix={"yes_no": " Answer yes or no."})
    question = Question(id="a", image=None, question="Is it?", kind="yes_no", answer="yes", group="g")
    prompts: list[str] = []

    def ask(batch: Sequence[Asked]) -> list[Reply]:
        prompts.extend(prompt for _, prompt, _ in batch)
        assert all(image is None for image, _, _ in batch)
        return [Reply("yes", "stop") for _ in batch]

    answer_all([question], benchmark, Pictures(None, [question]), Model("m", ask), tmp_path)
    assert prompts == ["Is it? Answer yes or no."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medllava.model.tiny import tiny_checkpoint

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_checkpoint(folder, seed=0)
    return folder


def test_a_checkpoint_answers_twice_the_same_and_gives_the_same_score_file(
    checkpoint: Path, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name in ("one", "two"):
        out = tmp_path / name
        line = ["answer", "--benchmark", "phantom", "--questions", str(discs / "questions.jsonl"), "--model-path",
                str(checkpoint), "--limit", "15", "--batch", "5", "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["medllava", "eval", *line, "--out", str(out)])
        assert commands.main([*line, "--out", str(out)]) == 0
        assert commands.main(["score", "--answers", str(out / "answers.jsonl"), "--out", str(out / "report.json")]) == 0
        files.append((out / "report.json").read_text().splitlines())
    different = [pair for pair in zip(*files, strict=True) if pair[0] != pair[1]]
    assert all('"date"' in first for first, _ in different)
    out = tmp_path / "one"
    rescored = tmp_path / "again.json"
    assert commands.main(["rescore", str(out / "answers.jsonl"), "--against", str(out / "report.json"), "--out",
                          str(rescored)]) == 0
    assert rescored.read_bytes() == (out / "report.json").read_bytes()


def test_answers_of_two_runs_are_not_mixed(checkpoint: Path, discs: Path, tmp_path: Path) -> None:
    line = ["answer", "--benchmark", "phantom", "--questions", str(discs / "questions.jsonl"), "--model-path",
            str(checkpoint), "--out", str(tmp_path), "--device", "cpu", "--limit"]
    assert commands.main([*line, "2"]) == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="questions_sha256 differ"):
        commands.main([*line, "3"])
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_unknown_benchmark_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="phantom"):
        commands.main(["answer", "--benchmark", "fantom", "--model-path", "x", "--out", str(tmp_path)])
    definition = tmp_path / "mine.yaml"
    definition.write_text("name: mine\nmax_new_token: 3\n")
    with pytest.raises(ConfigError, match='did you mean "max_new_tokens"'):
        commands.main(["answer", "--benchmark", str(definition), "--model-path", "x", "--out", str(tmp_path)])


def test_a_definition_finds_its_files_beside_it(discs: Path, looks: Ask, tmp_path: Path) -> None:
    from medllava.eval.benchmarks import load_benchmark

    write_records(tmp_path / "q.jsonl", read_questions(discs / "questions.jsonl")[:1])
    (tmp_path / "mine.yaml").write_text("name: mine\nquestions: q.jsonl\nimages: pictures\n")
    benchmark = load_benchmark(str(tmp_path / "mine.yaml"))
    assert benchmark.questions == (tmp_path / "q.jsonl").resolve()
    assert benchmark.images == (tmp_path / "pictures").resolve()


def test_a_picture_is_opened_and_encoded_once(
    checkpoint: Path, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty questions on four pictures in one batch: four pictures opened, four through the encoder, and the answers
    and log-probabilities of one question at a time."""
    from medllava.eval import models, pictures

    questions = [
        question.model_copy(update={"id": f"{number}-{question.id}", "kind": "open", "choices": (), "box": None})
        for number, question in enumerate(read_questions(discs / "questions.jsonl")[:20])
    ]
    benchmark = Benchmark(name="discs", conditions=("real",), max_new_tokens=6)
    model = models.open_local(checkpoint, "cpu", benchmark.max_new_tokens)
    opened: list[object] = []
    load = pictures.load_image

    def counted(path: Path) -> Image.Image:
        opened.append(path)
        return load(path)

    monkeypatch.setattr(pictures, "load_image", counted)
    answer_all(questions, benchmark, Pictures(discs, questions), model, tmp_path / "together", batch=20)
    assert len(opened) == 4
    answer_all(questions, benchmark, Pictures(discs, questions), model, tmp_path / "alone", batch=1)
    together, alone = ({row.question_id: row for row in answers_in(tmp_path / name)} for name in ("together", "alone"))
    assert {key: row.text for key, row in together.items()} == {key: row.text for key, row in alone.items()}
    for key, row in together.items():
        assert row.logprob is not None and row.logprob < 0 and row.tokens
        assert row.logprob == pytest.approx(alone[key].logprob, abs=1e-3)


def test_probabilities_of_the_options() -> None:
    from medllava.eval.models import beginnings, option_chances

    yes_no = Question(id="a", image=None, question="?", kind="closed", answer="yes", choices=("yes", "no"), group="g")
    lettered = yes_no.model_copy(update={"choices": ("A: gland", "B: vessel"), "answer": "A: gland"})
    assert beginnings(yes_no) == {"yes": "yes", "no": "no"}
    assert beginnings(lettered) == {"a": "A", "b": "B"}
    assert beginnings(yes_no.model_copy(update={"choices": ("gland", "vessel")})) == {}
    told = [("Yes", np.log(0.5)), (" yes", np.log(0.2)), ("\u2581No", np.log(0.1)), ("Maybe", np.log(0.1))]
    assert option_chances(beginnings(yes_no), told) == pytest.approx({"yes": 0.7, "no": 0.1})
    assert option_chances(beginnings(yes_no), [("Maybe", -0.1)]) is None


def test_kept_pictures_have_a_limit(discs: Path) -> None:
    from medllava.eval.pictures import Shown

    questions = read_questions(discs / "questions.jsonl")
    made: list[Image.Image] = []

    def make(image: Image.Image) -> Image.Image:
        made.append(image)
        return image

    shown = Shown(Pictures(discs, questions), make, most_bytes=3 * 96 * 96 * 3)
    order = [questions[index] for index in (0, 5, 10, 0, 15, 5)]
    for question in order:
        shown.of(question, "real")
    assert len(made) == 5  # the fourth was kept, the last had to go for the one before
