"""Every layout that benchmarks are published in, read into the same questions; and what is said of a bad file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from medllava.errors import ConfigError, DataError
from medllava.eval import __main__ as commands
from medllava.eval.answer import answer_all
from medllava.eval.benchmarks import known_files, load_benchmark, questions_hash, read_question_set
from medllava.eval.models import Asked, Model, Reply
from medllava.eval.pictures import Pictures
from medllava.eval.questions import Reading, to_questions
from medllava.eval.records import Question
from medllava.eval.rotation import applies, as_asked
from medllava.eval.score import score_files
from medllava.jsonl import write_json, write_records

from . import make_samples

Ask = Callable[[Sequence[Asked]], list[Reply]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    found: dict[str, tuple[Path, Path]] = make_samples.make(tmp_path_factory.mktemp("samples"))
    return found


EXPECTED = {
    "quilt_vqa": {"open": 4, "closed": 4}, "quilt_vqa_red": {"open": 2, "closed": 2},
    "quilt_vqa_red_unmarked": {"open": 2, "closed": 2}, "quilt_gpt": {"open": 4}, "path_vqa": {"open": 3, "closed": 3},
    "pmc_vqa": {"closed": 4}, "pmc_vqa_full": {"closed": 5}, "path_mmu": {"closed": 4},
    "slake": {"open": 2, "closed": 1},
    "vqa_rad": {"open": 1, "closed": 1}, "kvasir_vqa": {"open": 1, "closed": 2}, "grounding": {"box": 4},
    "own": {"open": 1, "closed": 2}, "quilt_vqa_raw": {"open": 4, "closed": 4},
    "phantom": {"where": 2, "yes_no": 2, "what": 2, "count": 2, "box": 2},
}


def test_every_benchmark_has_a_sample(samples: dict[str, tuple[Path, Path]]) -> None:
    assert set(samples) == set(EXPECTED) == set(known_files("benchmarks", ".yaml"))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_is_read_and_scored(name: str, samples: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A model that says the reference gets everything right, and under rotation, too; all pictures are found."""
    source, images = samples[name]
    benchmark = load_benchmark(name)
    found = read_question_set(source, benchmark)
    assert Counter(question.kind for question in found.questions) == EXPECTED[name]
    pictures = Pictures(images, found.questions)
    assert all(question.image and pictures.path(question.image).is_file() for question in found.questions)
    asked = {
        benchmark.prompt(as_asked(question, condition)): as_asked(question, condition).answer
        for question in found.questions for condition in benchmark.conditions if applies(question, condition)
    }

    def knows(batch: Sequence[Asked]) -> list[Reply]:
        return [Reply(asked[prompt], "stop") for _, prompt, _ in batch]

    assert answer_all(found.questions, benchmark, pictures, Model("m", knows), tmp_path) == 0
    write_records(tmp_path / "questions.jsonl", found.questions)
    report, _ = score_files(tmp_path / "answers.jsonl")
    for metric in ("closed_accuracy", "open_f1", "open_rouge_l", "box_iou"):
        if metric in report.metrics:
            assert report.metrics[metric].value == pytest.approx(1.0), metric
            assert report.metrics[metric].unscored == 0


def test_categories_and_baselines(samples: dict[str, tuple[Path, Path]]) -> None:
    def read(name: str) -> list[Question]:
        return read_question_set(samples[name][0], load_benchmark(name)).questions

    assert Counter(q.categories["dependence"] for q in read("quilt_vqa")) == {"yes": 6, "no": 2}
    assert {(q.categories["tissue"], q.categories["category"]) for q in read("quilt_gpt")} == {
        ("Bone", "conv"), ("Breast", "detail")
    }
    assert {q.categories["subset"] for q in read("path_mmu")} == {"PubMed", "Atlas"}
    assert [q.id for q in read("path_mmu")] == ["PubMed-0", "PubMed-1", "Atlas-0", "Atlas-1"]
    assert {q.group for q in read("grounding")} == {f"v{n}.mp4" for n in range(4)}
    assert {q.id for q in read("quilt_vqa_red")} == {q.id for q in read("quilt_vqa_red_unmarked")}


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_hugging_face_layouts_give_the_same_questions(samples: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Parquet with pictures inside, ``save_to_disk``, and an image folder, against the original file."""
    datasets = pytest.importorskip("datasets")
    source, images = samples["quilt_vqa"]
    rows = json.loads(source.read_text())
    original = read_question_set(source, load_benchmark("quilt_vqa")).questions
    held = [
        {**row, "image": {"bytes": (images / row["image"]).read_bytes(), "path": None}}
        for row in rows
    ]
    for number in range(2):
        parquet(tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.parquet", held[4 * number : 4 * number + 4])
    splits = {"train": datasets.Dataset.from_list(rows), "other": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "disk"))
    folder = tmp_path / "folder"
    make_samples.pictures(folder / "train")
    write_records(folder / "train" / "metadata.jsonl", [
        {"file_name": row["image"], **{key: value for key, value in row.items() if key != "image"}} for row in rows
    ])
    benchmark = load_benchmark("quilt_vqa")
    bare = {"image", "group"}
    for place, layout in (("hub", "parquet"), ("disk", "arrow"), ("folder", "imagefolder")):
        found = read_question_set(tmp_path / place, benchmark, pictures=tmp_path / "pictures")
        assert found.layout == layout
        assert [q.model_dump(exclude=bare) for q in found.questions] == [q.model_dump(exclude=bare) for q in original]
    hub = read_question_set(tmp_path / "hub", benchmark, pictures=tmp_path / "pictures").questions
    assert len({q.group for q in hub}) == 4, "one picture is one group, however many rows hold it"
    for question, row in zip(hub, rows, strict=True):
        assert (tmp_path / "pictures" / str(question.image)).read_bytes() == (images / row["image"]).read_bytes()
    assert Pictures(folder, original).path(f"train/{rows[0]['image']}").is_file()
    with pytest.raises(DataError, match=r"no split 'dev'; choose with --split one of: other, train"):
        read_question_set(tmp_path / "disk", benchmark, split="dev")


def test_the_answer_step_reads_pictures_out_of_parquet(samples: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, images = samples["quilt_vqa"]
    rows = [
        {**row, "image": {"bytes": (images / row["image"]).read_bytes(), "path": "x"}}
        for row in json.loads(source.read_text())
    ]
    parquet(tmp_path / "hub" / "train.parquet", rows)
    line = ["answer", "--benchmark", "quilt_vqa", "--questions", str(tmp_path / "hub"), "--out", str(tmp_path / "out")]
    with pytest.raises(Exception, match=r"127\.0\.0\.1:9"):
        commands.main([*line, "--base-url", "http://127.0.0.1:9/v1"])
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 4


def test_which_set_it_is_is_told(samples: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    benchmark = load_benchmark("quilt_vqa")
    told = read_question_set(samples["quilt_vqa"][0], benchmark).told
    assert "8 questions read from json, which is none of the published sets" in told
    rows = make_samples.open_and_closed(985)
    (tmp_path / "q.json").write_text(json.dumps(rows))
    told = read_question_set(tmp_path / "q.json", benchmark).told
    assert "985 questions" in told and "Hugging Face" in told and "1,283" in told and "not comparable" in told


def test_rotation_moves_texts_and_keeps_letters() -> None:
    asked = Question(
        id="q", image="i", question="What?\nA: one\nB: two\nC: three", kind="closed", answer="C: three",
        choices=("A: one", "B: two", "C: three"), group="g",
    )
    moved = as_asked(asked, "rotated_1")
    assert moved.question == "What?\nA: three\nB: one\nC: two"
    assert moved.answer == "A: three"
    assert as_asked(asked, "rotated_2").answer == "B: three"
    assert [applies(asked, name) for name in ("rotated_1", "rotated_2", "rotated_3")] == [True, True, False]
    yes_no = asked.model_copy(update={"choices": ("yes", "no"), "answer": "yes"})
    assert not applies(yes_no, "rotated_1")


def test_a_model_that_always_says_a_is_found_out(samples: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, images = samples["pmc_vqa"]
    benchmark = load_benchmark("pmc_vqa")
    questions = read_question_set(source, benchmark).questions

    def first(batch: Sequence[Asked]) -> list[Reply]:
        return [Reply("A", "stop") for _ in batch]

    answer_all(questions, benchmark, Pictures(images, questions), Model("m", first), tmp_path)
    write_records(tmp_path / "questions.jsonl", questions)
    report, _ = score_files(tmp_path / "answers.jsonl")
    assert report.rotation["mean"].value == 0.25
    assert report.rotation["same_answer"].value == 0.0
    assert report.letters == {"A": 1.0}
    told = "names the same one in 0% of 4 questions. Of all letters named, A is 100%"
    assert any(told in note for note in report.notes)
    assert set(report.ablations) == {"no_image", "blank", "noise", "mismatched"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"id": 1, "frage": "?"}]', r"row 0: unknown schema \(keys: frage, id\); expected 'question' and 'answer'"),
        ('[{"question_id": 1, "image": "a.png", "text": "?"}]', r"row 0: a question without its answer"),
        ('[{"id": 1, "question": "?", "answer": "a"}, {"id": 1, "question": "?", "answer": "b"}]',
         r"row 1: question id '1' occurs a second time, after .*row 0"),
        ('[{"id": 1, "question": "?", "options": ["A) x", "B) y"], "answer": "z"}]',
         r"row 0: not a question \(ValueError: the answer 'z' is none of the 2 options\)"),
        ('["a"]', r"row 0: expected an object, got str"),
        ('[{"id": 1', r"q\.json:1: not JSON"),
        ("", r"q\.json: holds no questions"),
        ('{"test":\n 3}', r"expected a list of questions"),
    ],
)
def test_a_bad_question_file_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        read_question_set(tmp_path / "q.json")
    assert "\n" not in str(caught.value)


def test_a_row_that_is_no_question_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": number, "question": "?", "answer": "a"} for number in (1, 2, 3)]
    del rows[1]["answer"]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    found = read_question_set(tmp_path / "q.json")
    assert [question.id for question in found.questions] == ["1", "3"]
    assert "2 questions read from json; 1 row is no question and was left out (the first: " in found.told
    assert "row 1: unknown schema" in found.told and "row 1: unknown schema" in caplog.text
    # The report says so.
    answers = [{"question_id": one, "text": "a", "model": "m"} for one in ("1", "3")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    write_json(tmp_path / "run.json", {"data": found.told})
    report, _ = score_files(tmp_path / "answers.jsonl", tmp_path / "q.json")
    assert any("1 row is no question and was left out" in note for note in report.notes)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"the pickle holds os\.system"):
        read_question_set(tmp_path / "q.pkl")


def test_a_csv_with_a_field_too_few(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,question,answer\n1,what?\n")
    with pytest.raises(DataError, match=r"q\.csv:2: not as many fields as the header's 3"):
        read_question_set(tmp_path / "q.csv")


def test_half_a_line_is_skipped_and_a_broken_line_is_not(tmp_path: Path) -> None:
    good = '{"id": 1, "question": "?", "answer": "a"}\n'
    (tmp_path / "q.jsonl").write_text(good + '{"id": 2, "ques')
    assert len(read_question_set(tmp_path / "q.jsonl").questions) == 1
    (tmp_path / "q.jsonl").write_text('{"id": 2, "ques\n' + good)
    with pytest.raises(DataError, match=r"q\.jsonl:1: not JSON"):
        read_question_set(tmp_path / "q.jsonl")


@pytest.mark.parametrize(("typo", "meant"), [("quilt_vqaa", "quilt_vqa"), ("path-vqa", "path_vqa"), ("slak", "slake")])
def test_a_benchmark_with_a_typo(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'\\?.*there: .*phantom"):
        load_benchmark(typo)


def test_pictures_that_are_all_missing_stop_the_run(samples: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    line = [
        "answer", "--benchmark", "quilt_vqa", "--questions", str(samples["quilt_vqa"][0]), "--images", str(tmp_path),
        "--base-url", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "out"),
    ]
    told = r"none of the 4 pictures is here \(the first: case0_field.png\); give --images"
    with pytest.raises(DataError, match=told):
        commands.main(line)


def test_no_categories_leave_the_hash_as_it_was() -> None:
    plain = Question(id="1", image=None, question="?", kind="open", answer="a", group="g")
    tagged = plain.model_copy(update={"categories": {"tissue": "Bone"}})
    assert questions_hash([plain]) != questions_hash([tagged])


def test_group_pattern_finds_the_case() -> None:
    row = {"question": "?", "answer": "yes", "image": "case7_field2.png"}
    (question,) = to_questions(row, "here", 0, Reading(group_pattern=r"^(case\d+)_")) or []
    assert question.group == "case7"


def test_a_data_set_of_the_hub_by_its_id(
    samples: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the local cache, as a download leaves it; what is not there is told in one line without a network."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source, images = samples["quilt_vqa"]
    expected = read_question_set(source, load_benchmark("quilt_vqa")).questions
    rows = [
        {**row, "image": Image.open(images / row["image"]).copy()}
        for row in json.loads(source.read_text())
    ]
    home = tmp_path / "datasets--somebody--Quilt_VQA"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    (snapshot / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(snapshot / "data" / "train-00000-of-00001.parquet"))
    found = read_question_set(
        Path("somebody/Quilt_VQA"), load_benchmark("quilt_vqa"), pictures=tmp_path / "pictures"
    )
    assert [question.answer for question in found.questions] == [question.answer for question in expected]
    assert len(list((tmp_path / "pictures").iterdir())) == 4
    with pytest.raises(DataError, match="nobody/nothing: no such file or folder, and no such data set") as caught:
        read_question_set(Path("nobody/nothing"))
    assert "\n" not in str(caught.value)
