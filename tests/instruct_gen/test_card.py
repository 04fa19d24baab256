from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from medllava.conversation import InstructionSample, Provenance, Turn
from medllava.errors import DataError
from medllava.geometry import Box
from medllava.instruct_gen import card as step
from medllava.instruct_gen.card_figures import Boxes, plain_time, read_figures, spread
from medllava.instruct_gen.card_plots import heat_map, overlay
from medllava.instruct_gen.records import CaseFacts, Dropped, GroundedCaption, Narrative, Phrase, TracePoint
from medllava.jsonl import write_json, write_records

EVIL = "<script>alert('x')</script> | `a` </svg>\"'<img src=https://example.org/x.png>"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


def main(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    step.configure(parser)
    return step.run(parser.parse_args([str(one) for one in argv]))


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(80, 240, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC).save(path)


def sample(video: int, chunk: int, kind: str, question: str, answer: str) -> InstructionSample:
    name = f"talk{video}-{chunk:03d}"
    return InstructionSample.model_validate({
        "id": f"{name}-{kind}-1", "kind": kind, "images": (f"frames/{name}.png",),
        "turns": (Turn(role="user", text=f"<image>\n{question}"), Turn(role="assistant", text=answer)),
        "provenance": Provenance(video=f"talk{video}.mp4", chunk=name, start_s=3, end_s=65, teacher="a-teacher"),
    })


@pytest.fixture
def narrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "narrated"
    narratives, captions = [], []
    for video in range(4):
        for chunk in range(2):
            id = f"talk{video}-{chunk:03d}"
            picture(folder / "frames" / f"{id}.png", 10 * video + chunk)
            common = {"id": id, "video": f"talk{video}.mp4", "image": f"frames/{id}.png", "crop_px": (0, 0, 160, 120)}
            trace = [TracePoint(t_s=t, x=0.3 + 0.01 * t, y=0.5) for t in (3, 3.1, 3.2, 9, 9.1)]
            narratives.append(Narrative.model_validate({**common, "start_s": 2, "end_s": 70, "trace": trace}))
            phrases = [
                Phrase(text="This is a gland.", start_s=3, end_s=5, box=Box(x1=0.25, y1=0.25, x2=0.5, y2=0.75)),
                Phrase(text=EVIL if (video, chunk) == (0, 0) else "Take your time.", start_s=6, end_s=65),
            ]
            captions.append(GroundedCaption.model_validate({**common, "phrases": phrases}))
    write_records(folder / "narratives.jsonl", narratives)
    write_records(folder / "captions.jsonl", captions)
    return folder


@pytest.fixture
def data(tmp_path: Path, narrated: Path) -> Path:
    folder = tmp_path / "data"
    samples = []
    for video in range(4):
        for chunk in range(2):
            samples.append(sample(video, chunk, "conversation", "What is this?", EVIL if not video else "A gland."))
            samples.append(sample(video, chunk, "grounding", "Give the box.", "[0.25, 0.25, 0.50, 0.75]"))
    write_records(folder / "samples.jsonl", samples)
    in_val = {"talk3.mp4"}
    for part in ("train", "val"):
        rows = [one.to_llava() for one in samples if (one.provenance.video in in_val) == (part == "val")]
        write_json(folder / f"{part}.json", rows)
    write_records(folder / "dropped.jsonl", [
        Dropped(id="x1", reason=f"malformed: {EVIL}"), Dropped(id="x2", reason="malformed: no JSON"),
        Dropped(id="x3", reason="refused"),
    ])
    write_json(folder / "summary.json", {
        "kept": {}, "dropped": {}, "replies": 20, "prompt_tokens": 16_000, "completion_tokens": 1_600, "usd": 0.5,
        "recipe": {"model": "a-teacher", "usd_per_million": {"input": 1.0, "output": 2.0}, "note": EVIL},
        "prompts": {"conversation": "0123456789abcdef"},
    })
    return folder


def test_what_the_card_says(data: Path, narrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--data", data, "--narrated", narrated, "--title", "Glands") == 0
    assert "16 samples, 8 images, 4 videos" in capsys.readouterr().out
    figures = json.loads((data / "datacard.json").read_text())
    assert figures["kinds"]["grounding"] == {"samples": 8, "train": 6, "val": 2, "images": 8, "exchanges": 8}
    assert figures["videos"]["talk3.mp4"] == {"samples": 4, "images": 2, "part": "val"}
    assert figures["dropped"] == {"malformed": 2, "refused": 1}
    assert figures["boxes"]["captions"]["n"] == 8
    assert figures["boxes"]["captions"]["of"] == 16
    assert figures["boxes"]["captions"]["area"]["mean"] == 0.125
    heat = np.array(figures["boxes"]["samples"]["heat"])
    assert heat[8:24, 8:16].min() == 1
    assert heat.sum() == 16 * 8
    assert figures["split"]["leaks"] == []
    assert figures["split"]["rows"] == {"train": 12, "val": 4}
    markdown = (data / "DATACARD.md").read_text()
    for line in (
        "| grounding | 8 | 6 | 2 | 8 | 8 | 3.0 | 4.0 |", "| malformed | 2 | 10.5% |", "| refused | 1 | 5.3% |  |",
        "| paid | $0.5000, $31.25 per thousand samples |", "| prompt tokens | 16,000 (1,000 per sample) |",
        "**No leak found: train and val share no video and no picture.**", "8 of 16 phrases (50%) have a box",
    ):
        assert line in markdown, line


def test_the_header_is_what_the_hub_reads(data: Path, narrated: Path) -> None:
    from huggingface_hub import DatasetCard

    main("--data", data, "--narrated", narrated, "--title", 'Glands: "a test"', "--license", "cc-by-4.0")
    header = DatasetCard.load(data / "DATACARD.md").data.to_dict()
    assert header["pretty_name"] == 'Glands: "a test"'
    assert header["license"] == "cc-by-4.0"
    assert header["size_categories"] == ["n<1K"]
    assert [one["path"] for one in header["configs"][0]["data_files"]] == ["train.json", "val.json"]
    assert yaml.safe_load((data / "DATACARD.md").read_text().split("---")[1]) == header


def test_the_same_input_gives_the_same_bytes(data: Path, narrated: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        main("--data", data, "--narrated", narrated, "--out", tmp_path / out, "--title", "T")
    for name in ("DATACARD.md", "datacard.html", "datacard.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    main("--data", data, "--narrated", narrated, "--out", tmp_path / "three", "--title", "T", "--seed", "1")
    orders = [json.loads((tmp_path / out / "datacard.json").read_text())["examples"] for out in ("one", "three")]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_samples_are_drawn_by_their_id_alone(data: Path, narrated: Path) -> None:
    before = [one.sample.id for one in read_figures(data, narrated, examples=5, seed=3).examples]
    lines = (data / "samples.jsonl").read_text().splitlines(keepends=True)
    (data / "samples.jsonl").write_text("".join(reversed(lines)))
    assert [one.sample.id for one in read_figures(data, narrated, examples=5, seed=3).examples] == before
    assert len(before) == 5


def test_nothing_of_the_data_is_markup(data: Path, narrated: Path) -> None:
    main("--data", data, "--narrated", narrated, "--title", EVIL)
    page = (data / "datacard.html").read_text()
    assert "<script" not in page.lower()
    assert "&lt;script&gt;alert(" in page
    assert page.count("</svg>") == page.count("<svg")
    assert all(target.startswith(("data:", "#")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    markdown = (data / "DATACARD.md").read_text()
    outside = re.sub(r"^(`{3,})json\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    body = outside.split("---", 2)[2]
    assert "<script" not in body
    assert "<img" not in body
    for row in re.findall(r"^\| .*", body, flags=re.MULTILINE):
        if "alert" in row:
            assert r"\|" in row


def test_a_leak_is_told_in_every_place(data: Path, narrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(narrated / "frames" / "talk0-000.png", narrated / "frames" / "talk3-001.png")
    rows = json.loads((data / "val.json").read_text())
    rows[0]["provenance"]["video"] = "talk1.mp4"
    write_json(data / "val.json", rows)
    main("--data", data, "--narrated", narrated)
    assert "warning: val.json row 0 (talk3-000-conversation-1): leak: video: talk1" in capsys.readouterr().out
    leaks = json.loads((data / "datacard.json").read_text())["split"]["leaks"]
    told = [(leak["row"], leak["kind"]) for leak in leaks]
    assert told == [(0, "leak: video"), (2, "leak: image"), (3, "leak: image")]
    for name in ("DATACARD.md", "datacard.html"):
        assert "3 rows of val share a video or a picture with train" in (data / name).read_text()


def test_without_pictures_split_or_summary(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.json", "val.json", "summary.json", "dropped.jsonl"):
        (data / name).unlink()
    assert main("--data", data) == 0
    assert "note: no pictures" in capsys.readouterr().out
    page = (data / "datacard.html").read_text()
    assert "There is no train.json with a val.json." in page
    assert "no such picture here" in page
    (data / "samples.jsonl").write_text("")
    with pytest.raises(DataError, match="no samples in it"):
        main("--data", data)
    with pytest.raises(DataError, match="no such folder"):
        main("--data", tmp_path / "nowhere")


def test_questions_and_case_facts_are_counted(data: Path, narrated: Path) -> None:
    rows = [json.loads(line) for line in (data / "samples.jsonl").read_text().splitlines()]
    for row, closed, needed in zip(rows, (True, True, False), (True, False, True), strict=False):
        row |= {"kind": "question", "answer_type": "closed" if closed else "open", "image_dependent": needed}
    write_records(data / "samples.jsonl", rows)
    write_json(narrated / "narrate.json", {"no_box": {"rests": 2}, "left_out": {"no tissue": 3}})
    clue = {"text": "Keratin pearls.", "time_s": 4.0}
    write_records(data / "case_facts.jsonl", [
        CaseFacts.model_validate({"video": "talk0.mp4", "diagnosis": "carcinoma", "clues": [clue, clue]}),
        CaseFacts(video="talk1.mp4", single_case=False),
    ])
    main("--data", data, "--narrated", narrated)
    for name in ("DATACARD.md", "datacard.html"):
        page = (data / name).read_text()
        assert "Answers of single questions: 2 closed, 1 open." in page
        assert "The image for these answers: 2 needed, 1 not needed." in page
        assert "Chunks of video that were left out: 3 no tissue." in page
        assert "Phrases without a box: 2 rests." in page
        assert "Case facts of 2 videos: 1 say a diagnosis, 1 are of a single case; 2 clues." in page


def test_labels_are_counted_where_records_have_them(data: Path, narrated: Path, tmp_path: Path) -> None:
    write_records(narrated / "videos.jsonl", [{"name": "talk0.mp4", "domain": "CT"}, {"name": "talk1.mp4"}])
    corrected = tmp_path / "corrected"
    text = (narrated / "captions.jsonl").read_text()
    corrected.mkdir()
    (corrected / "captions.jsonl").write_text(text.replace("Take your time.", "Take [NAME]'s time."))
    terms = [{"term": "gland", "id": "1"}, {"term": "gland", "id": "1"}]
    write_records(corrected / "concepts.jsonl", [
        {"id": f"talk{number}-000", "concepts": terms, "sub_pathology": "breast" if number else None}
        for number in range(4)
    ])
    main("--data", data, "--narrated", narrated, "--captions", corrected / "captions.jsonl")
    assert json.loads((data / "datacard.json").read_text())["labels"] == {
        "videos by domain": {"CT": 1}, "chunks by sub-pathology": {"breast": 3}, "chunks by concept": {"gland": 4},
    }
    page = (data / "datacard.html").read_text()
    assert "Chunks by sub-pathology" in page
    assert "Take [NAME]&#39;s time." in page
    assert "Take your time." not in page
    assert "| breast | 3 |" in (data / "DATACARD.md").read_text()


def test_words_that_were_redacted_are_not_shown(
    data: Path, narrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((data / "summary.json").read_text())
    write_json(data / "summary.json", {**summary, "redacted": True})
    main("--data", data, "--narrated", narrated)
    assert "the narrator's own words are not shown" in capsys.readouterr().out
    page = (data / "datacard.html").read_text()
    assert "This is a gland." not in page
    assert len(re.findall(r'font-weight="700"[^>]*>1</text>', page)) == 16  # the boxes are
    main("--data", data, "--narrated", narrated, "--captions", narrated / "captions.jsonl")
    assert "This is a gland." in (data / "datacard.html").read_text()


def test_spread() -> None:
    found = spread([1, 2, 3, 4, 100])
    assert (found.n, found.mean, found.median, found.most) == (5, 22.0, 3.0, 100.0)
    assert sum(found.counts) == 5
    assert len(found.edges) == len(found.counts) + 1
    shares = spread([0.05, 0.1, 0.34], 0.05)
    assert shares.edges[-1] == 0.35
    assert sum(shares.counts) == 3
    assert spread([0, 0]).counts == (2,)
    assert spread([]).n == 0


def test_plots_and_times() -> None:
    box = Box(x1=0.25, y1=0.5, x2=0.5, y2=1.0)
    trace = [TracePoint(t_s=t, x=0.1 * t, y=0.5) for t in (0, 0.5, 1, 5, 5.5)]
    drawn = overlay(200, 100, trace, [(1, box)], [box])
    assert drawn.count('<rect x="50.0" y="50.0" width="50.0" height="50.0"') == 4  # each with a halo
    assert re.findall(r'points="([^"]*)"', drawn)[::2] == ["0.0,50.0 10.0,50.0 20.0,50.0", "100.0,50.0 110.0,50.0"]
    heat = ((0.0, 0.5), (0.5, 1.0))
    fills = re.findall(r'fill="(#\w{6})"/>', heat_map(Boxes(2, spread([0.5, 0.5], 0.05), heat), "where"))
    assert fills[0] == "#ffffff"
    assert fills[1] == fills[2]
    assert fills[3] == "#0c2454"
    assert (plain_time(5.9), plain_time(65), plain_time(3725)) == ("0:05", "1:05", "1:02:05")


def test_colours_have_contrast() -> None:
    """WCAG AA: 4.5 to 1 for every colour of text on every colour it stands on."""

    def luminance(colour: str) -> float:
        values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page = (Path(step.__file__).parent / "templates" / "datacard.html").read_text()
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6}|#[0-9a-f]{3})\b", page))
    paper, ground, asked, told, plain = "#ffffff", "#f3f5f8", "#eef1f5", "#e5effc", "#e2e6eb"
    pairs = [(named[ink], back) for ink in ("ink", "soft") for back in (paper, ground, asked, told, plain)]
    pairs += [(named["blue"], paper), (named["blue"], ground), (named["good"], paper), (named["bad"], paper)]
    pairs += [("#ffffff", named["blue"]), ("#59616d", paper)]
    for back in (ground, asked, told, plain):
        assert back in page
    for ink, back in pairs:
        light, dark = sorted((luminance(ink), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, back)


def test_the_page_in_a_browser(data: Path, narrated: Path) -> None:
    """On a screen and on a phone: nothing wider than the window, no request, no script, pictures and overlays there."""
    from playwright.sync_api import sync_playwright

    main("--data", data, "--narrated", narrated, "--title", EVIL)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        asked: list[str] = []
        for width, height in ((1280, 800), (390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("request", lambda request: asked.append(request.url))
            page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
            page.goto((data / "datacard.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            assert page.locator("article.card").count() == 16
            assert page.evaluate("[...document.images].every(image => image.naturalWidth === 160)")
            image, drawn = (page.locator(f".picture {tag}").first.bounding_box() for tag in ("img", "svg"))
            assert image is not None
            assert drawn is not None
            assert abs(image["width"] - drawn["width"]) < 1
            assert abs(image["height"] - drawn["height"]) < 1
            page.locator("summary").first.click()
            assert page.locator("ul.phrases").first.is_visible()
            page.close()
        browser.close()
