"""What may be corrected and what may not, and the command against the phantom's teacher."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from medllava.errors import ConfigError, ServiceError
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.concepts import Vocabulary
from medllava.instruct_gen.correcting import is_drawn_from, parts, refusal
from medllava.instruct_gen.records import GroundedCaption
from medllava.phantom.teacher import TeacherServer

REPOSITORY = Path(__file__).parents[2]

# What recognisers make of terms, and the terms.
MISHEARD = (
    ("carrot in pearl", "keratin pearl"),
    ("lime for sites", "lymphocytes"),
    ("some oma body", "psammoma body"),
    ("sammoma body", "psammoma body"),
    ("hyper chromasia", "hyperchromasia"),
    ("neuroses", "necrosis"),
    ("necroses", "necrosis"),
    ("a denoma", "adenoma"),
    ("my toesis", "mitosis"),
    ("might oh sis", "mitosis"),
    ("reed stern berg cell", "Reed-Sternberg cell"),
    ("barrets esophagus", "Barrett esophagus"),
    ("key 67", "Ki-67"),
    ("kid 67", "Ki-67"),
    ("crib reform", "cribriform"),
    ("desmo plasia", "desmoplasia"),
    ("coil of sites", "koilocytes"),
    ("lame in a propria", "lamina propria"),
    ("oligo dendro glioma", "oligodendroglioma"),
    ("menin geoma", "meningioma"),
    ("gleeson", "Gleason"),
    ("fire adenoma", "fibroadenoma"),
    ("grandma", "granuloma"),
    ("granular ma", "granuloma"),
    ("sirosis", "cirrhosis"),
    ("stee a toe sis", "steatosis"),
    ("eosin fills", "eosinophils"),
    ("new trophils", "neutrophils"),
    ("spun geosis", "spongiosis"),
    ("squam us cell carcinoma", "squamous cell carcinoma"),
    ("palace aiding", "palisading"),
)

# What no model may make of what was said.
WRONG = (
    ("adenoma", "adenocarcinoma"),
    ("hyperplasia", "dysplasia"),
    ("gland", "necrosis"),
    ("benign lesion", "malignant lesion"),
    ("no invasion", "invasion"),
    ("left side", "right side"),
    ("two glands", "ten glands"),
    ("cell", "giant cell"),
    ("malignant cell", "cell"),
    ("hypochromasia", "hyperchromasia"),
    ("leiomyoma", "leiomyosarcoma"),
    ("look", "leukemia"),
    ("this", "cyst"),
    ("tissue", "carcinoma in situ"),
    ("area", "metastasis"),
    ("it is here", "it is a high grade serous carcinoma here"),
    ("pink stuff", "amyloid"),
    ("blue dots", "lymphocytes"),
    ("intra epithelial", "inter epithelial"),
    ("grade two", "grade three"),
    ("acanthosis", "acantholysis"),
    ("follicular adenoma", "follicular carcinoma"),
    ("lung", "liver"),
    ("carefully", "carcinoma"),
    ("later", "lateral"),
    ("negative margin", "positive margin"),
    ("see", "cyst"),
    ("melanoma", "myeloma"),
    ("fibroma", "fibrosarcoma"),
    ("lesion", "region"),
    ("stroma", "struma"),
    ("atypia", "dysplasia"),
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.read(REPOSITORY / "instruct_gen" / "vocabulary" / "histopathology.tsv")


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    with TeacherServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


@pytest.mark.parametrize(("wrong", "right"), MISHEARD)
def test_a_misheard_term_may_be_corrected(vocabulary, wrong, right):
    assert refusal(f"You see the {wrong} here.", wrong, right, vocabulary) is None


@pytest.mark.parametrize(("wrong", "right"), WRONG)
def test_another_meaning_may_not_be_put_in(vocabulary, wrong, right):
    assert refusal(f"You see the {wrong} here.", wrong, right, vocabulary)


@pytest.mark.parametrize(
    ("wrong", "right", "reason"),
    [
        ("mitosis", "necrosis", "not said"), ("the gland", "the gland", "changes nothing"), ("gland", "", "not a term"),
        ("gland", "gland [0.1, 0.2, 0.3, 0.4]", "not a term"), ("gland", "big gland", "adds to what was said"),
        ("ten glands", "glands", "removes what was said"), ("ten glands", "two glands", "changes a number"),
        ("not", "nod", "changes a negation"), ("left", "lift", "changes a side"),
        ("benign", "begin", "changes a degree"),
        ("gland", "glance", "replaces a known term"), ("it is not a gland but ten glands", "gland", "more than a term"),
        ("ordinary", "urinary tract", "does not sound like it"), ("ten", "ten glands", "says a word twice"),
    ],
)
def test_reasons(vocabulary, wrong, right, reason):
    said = "On the left it is not a gland but ten glands, benign and ordinary. The gland."
    assert str(refusal(said, wrong, right, vocabulary)).startswith(reason)


def test_extracted_text_must_have_been_said(vocabulary):
    said = "So here is a gland with necrosis in the upper left. No invasion, two mitoses."
    for text in ("a gland with necrosis", "Here is necrosis in the upper left.", "no invasion"):
        assert is_drawn_from(text, said, vocabulary), text
    for text in (
        "a gland with invasion in the lower right", "three mitoses", "a gland without necrosis",
        "This is an adenocarcinoma.", "", "a granuloma here with necrosis in the upper left",
    ):
        assert not is_drawn_from(text, said, vocabulary), text


def caption(number: int, *texts: str) -> dict[str, object]:
    return {
        "id": f"talk-{number:03d}", "video": "talk.mp4", "image": f"frames/talk-{number:03d}.png",
        "crop_px": [0, 0, 90, 90],
        "phrases": [
            {"text": text, "start_s": 3.0 * at, "end_s": 3.0 * at + 2, "box": [0.1, 0.1, 0.4, 0.5] if at == 0 else None}
            for at, text in enumerate(texts)
        ],
    }


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "narrated" / "captions.jsonl"
    path.parent.mkdir()
    rows = [
        caption(0, "Here is a glande with a lumen.", "Take your time with cases like these.", "A keratine perl."),
        caption(1, "Dr. Patel calls this a psamoma body.", "No necrosis on the left."),
        caption(2, "Nothing to see."),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(captions: Path, out: Path, teacher: str, *more: str) -> list[str]:
    recipe = REPOSITORY / "instruct_gen" / "recipes" / "demo.yaml"
    return [
        "correct", "--captions", str(captions), "--out", str(out), "--config", str(recipe), "--base-url", teacher, *more
    ]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command(captions, tmp_path, teacher, capsys):
    out = tmp_path / "out"
    assert main(arguments(captions, out, teacher)) == 0
    made = rows(out / "captions.jsonl")
    assert [[phrase["text"] for phrase in row["phrases"]] for row in made] == [
        ["Here is a gland with a lumen.", "Take your time with cases like these.", "A keratin pearl."],
        ["Dr. Patel calls this a psammoma body.", "No necrosis on the left."], ["Nothing to see."],
    ]
    for before, after in zip(rows(captions), made, strict=True):
        for row in (before, after):
            for phrase in row["phrases"]:
                del phrase["text"]
        assert (before["id"], before["video"], before["crop_px"]) == (after["id"], after["video"], after["crop_px"])
        for old, new in zip(before["phrases"], after["phrases"], strict=True):
            assert old == {name: new[name] for name in old}
    diff = rows(out / "corrections.jsonl")
    assert [(row["id"], row["phrase"], row["from"], row["to"], row["accepted"]) for row in diff] == [
        ("talk-000", 0, "glande with a lumen", "gland with a lumen", True),
        ("talk-000", 2, "keratine perl", "keratin pearl", True),
        ("talk-001", 0, "psamoma body", "psammoma body", True),
    ]
    assert (diff[1]["before"], diff[1]["after"]) == ("A keratine perl.", "A keratin pearl.")
    assert (diff[1]["start_s"], diff[1]["end_s"]) == (6.0, 8.0)
    medical = rows(out / "medical_text.jsonl")
    assert medical[0] == {
        "id": "talk-000", "medical_text": "Here is a gland with a lumen. A keratin pearl.",
        "roi_text": ["gland", "gland with a lumen", "keratin pearl"],
    }
    assert medical[2] == {"id": "talk-002", "medical_text": "", "roi_text": []}
    concepts = rows(out / "concepts.jsonl")
    assert [found["term"] for found in concepts[0]["concepts"]] == ["gland", "keratin pearl"]
    assert concepts[1]["concepts"][1]["term"] == "necrosis"
    assert rows(out / "uncorrected.jsonl") == []
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "replies.sent.jsonl"}
    # Again: nothing is asked, nothing changes.
    assert main(arguments(captions, out, "http://127.0.0.1:9", "--dry-run")) == 0
    assert "3 answered, 0 calls" in capsys.readouterr().out
    assert main(arguments(captions, out, teacher)) == 0
    assert {name: (out / name).read_bytes() for name in before} == before


def test_redacted_before_it_is_sent(captions, tmp_path, teacher, capsys):
    pytest.importorskip("presidio_analyzer")
    out = tmp_path / "out"
    assert main(arguments(captions, out, teacher, "--redact")) == 0
    assert "redacted: 1 [NAME]" in capsys.readouterr().out
    assert "Patel" not in "".join(path.read_text() for path in out.iterdir())
    assert rows(out / "captions.jsonl")[1]["phrases"][0]["text"] == "Dr. [NAME] calls this a psammoma body."


def test_generate_redacts_before_it_asks(captions, tmp_path, capsys, monkeypatch):
    pytest.importorskip("presidio_analyzer")
    from medllava.phantom import replies

    captions.write_text(captions.read_text().replace("psamoma", "psammoma"))
    asked: list[str] = []
    answer = replies.reply_to
    monkeypatch.setattr(replies, "reply_to", lambda messages: asked.append(json.dumps(messages)) or answer(messages))
    with TeacherServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        out = tmp_path / "out"
        assert main(["generate", *arguments(captions, out, server.url, "--redact")[1:]]) == 0
        server.shutdown()
    assert "redacted: 1 [NAME]" in capsys.readouterr().out
    assert asked
    assert any("[NAME]" in text for text in asked)
    assert not any("Patel" in text for text in asked)


def test_a_dry_run_makes_nothing(captions, tmp_path, teacher, capsys):
    assert main(arguments(captions, tmp_path / "out", teacher, "--dry-run")) == 0
    assert "0 answered, 3 calls" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_limit_holds_and_what_is_not_asked_stays_as_it_was(captions, tmp_path, teacher):
    out = tmp_path / "out"
    priced = ["usd_per_million={input: 1000, output: 1000}", "--max-usd", "0.000001"]
    with pytest.raises(ServiceError, match="stopped by --max-usd"):
        main(arguments(captions, out, teacher, *priced[1:], priced[0]))
    assert [row["reason"][:9] for row in rows(out / "uncorrected.jsonl")] == ["not asked"] * 3
    before, after = (
        [[phrase["text"] for phrase in row["phrases"]] for row in rows(path)]
        for path in (captions, out / "captions.jsonl")
    )
    assert before == after


def test_its_own_input_is_not_overwritten(captions, teacher):
    with pytest.raises(ConfigError, match="would overwrite the captions that are read"):
        main(arguments(captions, captions.parent, teacher))


def test_long_captions_are_asked_about_in_parts():
    long = GroundedCaption.model_validate(caption(0, *["word " * 100] * 7, "word " * 400, "end"))
    made = list(parts(long))
    assert [(part.id, part.first, len(part.phrases)) for part in made] == [
        ("talk-000-correct-1", 0, 2), ("talk-000-correct-2", 2, 2), ("talk-000-correct-3", 4, 2),
        ("talk-000-correct-4", 6, 1), ("talk-000-correct-5", 7, 1), ("talk-000-correct-6", 8, 1),
    ]
