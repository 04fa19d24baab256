from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from medllava.errors import CheckpointError, ConfigError, run_cli
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.frame_filter import LEAST, Prompts, StainFilter
from medllava.instruct_gen.records import Narrative, Video
from medllava.jsonl import read_json, read_records
from medllava.model.zero_shot import ZeroShot
from medllava.phantom.render import render_frames
from medllava.phantom.session import Settings, plan_session
from medllava.phantom.tissue import render_tissue, sample_field, sample_stain

from .conftest import TRANSCRIPT, encode, picture_at, tissue


def phantom_fields(count: int) -> list[np.ndarray]:
    """Fields of tissue of many stains, sizes and magnifications."""
    pictures = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        width, height = ((320, 240), (480, 360), (640, 360))[seed % 3]
        findings = sample_field(rng, width, height)
        pictures.append(render_tissue(rng, width, height, findings, sample_stain(rng), (0.7, 1.0, 2.0)[seed // 3 % 3]))
    return pictures


def title_slides(count: int) -> list[np.ndarray]:
    """The first frames of phantom videos."""
    pictures = []
    for index in range(count):
        session = plan_session(5, index, replace(Settings(), fields=1, width=(320, 640)[index % 2]))
        frame = next(render_frames(session))
        pictures.append(cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_I420))
    return pictures


def other_pages(count: int) -> list[np.ndarray]:
    """Coloured text slides, bullet lists with a small figure of tissue, charts, speakers, desktops, blank screens."""
    pictures = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        back, ink = (tuple(int(v) for v in rng.integers(low, high, 3)) for low, high in ((140, 256), (0, 110)))
        page = np.full((480, 640, 3), back, np.uint8)
        kind = seed % 6
        if kind in (0, 1):
            for line in range(int(rng.integers(3, 9))):
                cv2.putText(page, "Differential diagnosis " * 2, (40, 60 + 45 * line), 0, 0.8, ink, 2, cv2.LINE_AA)
            if kind == 1:
                page[300:440, 480:620] = tissue(140, 140)
        elif kind == 2:
            for bar in range(8):
                colour = tuple(int(v) for v in rng.integers(0, 256, 3))
                cv2.rectangle(page, (60 + 65 * bar, int(rng.integers(80, 400))), (110 + 65 * bar, 420), colour, -1)
        elif kind == 3:
            cv2.ellipse(page, (320, 230), (90, 130), 0, 0, 360, (220, 170, 150), -1, cv2.LINE_AA)
            cv2.ellipse(page, (320, 480), (200, 120), 0, 0, 360, ink, -1, cv2.LINE_AA)
        elif kind == 4:
            for window in range(4):
                x, y = (int(v) for v in rng.integers(0, 300, 2))
                cv2.rectangle(page, (x, y), (x + 240, y + 160), (245, 245, 245), -1)
                cv2.rectangle(page, (x, y), (x + 240, y + 20), ink, -1)
                cv2.putText(page, f"file {window}", (x + 8, y + 60), 0, 0.5, (20, 20, 20), 1)
        pictures.append(np.clip(page + rng.normal(0, 1.5, page.shape), 0, 255).astype(np.uint8))
    return pictures


def test_the_stain_tells_tissue_from_pages() -> None:
    stain = StainFilter()
    shown, titles, pages = phantom_fields(72), title_slides(24), other_pages(72)
    kept = sum(p >= LEAST for p in stain.score(shown))
    wrong = sum(p >= LEAST for p in stain.score([*titles, *pages]))
    recall, precision = kept / len(shown), kept / (kept + wrong)
    # What passes is text slides with a figure of tissue, and bar charts.
    assert recall >= 0.98 and precision >= 0.93, (recall, precision)


def test_a_coloured_photograph_is_beyond_the_stain() -> None:
    """What the README says of this filter: it knows colour and texture, not histology."""
    rng = np.random.default_rng(0)
    leaves = cv2.GaussianBlur(rng.normal(size=(360, 640, 3)), (0, 0), 4)
    photograph = np.clip(np.array([60, 140, 50]) + 400 * leaves, 0, 255).astype(np.uint8)
    assert StainFilter().score([photograph])[0] > LEAST


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = ["<s>", "</s>", "<unk>", "histology", "text", "slide", "of", "a", "page", "face", "scan", "tissue"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = size | {"vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def test_zero_shot_probabilities_are_the_models_own(encoder: Path) -> None:
    from transformers import CLIPModel, PreTrainedTokenizerFast

    pictures = [tissue(64, 48), np.full((40, 40, 3), 255, np.uint8)]
    sentences = ["histology slide", "a page of text", "face"]
    zero_shot = ZeroShot(encoder)
    rows = zero_shot.probabilities(pictures, [[sentence] for sentence in sentences])
    model, tokenizer = CLIPModel.from_pretrained(encoder), PreTrainedTokenizerFast.from_pretrained(encoder)
    read = zero_shot._encoder.image_processor
    pixels = read([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = model(
            pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).logits_per_image.softmax(1)
    assert np.allclose(rows, expected, atol=1e-5)
    # A class of two sentences lies between them; equal classes share alike.
    (row,) = zero_shot.probabilities(pictures[:1], [sentences[:2], sentences[:2]])
    assert row == pytest.approx([0.5, 0.5])


def test_a_folder_that_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        ZeroShot(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="model_type is 'bert'"):
        ZeroShot(tmp_path)


def narrated(*arguments: object) -> int:
    return run_cli(lambda: main(["narrate", "--workers", "1", *map(str, arguments)]))


def test_narrate_with_an_encoder(lecture, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two sentences a random encoder likes one better: it keeps all fields by the one and none by the other."""
    kept = []
    for number, (histology, other) in enumerate((("histology", "text"), ("text", "histology"))):
        prompts = tmp_path / f"{number}.yaml"
        prompts.write_text(
            f"histology: [{histology}]\nother: [{other}]\ndomains: {{CT: [a scan], histopathology: [tissue]}}\n"
        )
        out = tmp_path / str(number)
        assert narrated(
            "--videos", lecture.path, "--out", out, "--frame-filter", encoder, "--frame-prompts", prompts
        ) == 0
        narratives = list(read_records(out / "narratives.jsonl", Narrative))
        (video,) = read_records(out / "videos.jsonl", Video)
        left_out = read_json(out / "narrate.json")["left_out"]
        kept.append(len(narratives))
        assert len(narratives) + left_out.get("not histology by the encoder", 0) in (2, 3)
        assert (video.domain in ("CT", "histopathology")) == bool(narratives)
        assert len(list((out / "frames").glob("*"))) == len(narratives)
    assert sorted(kept)[0] == 0 and sorted(kept)[1] >= 2
    assert "not histology by the encoder" in capsys.readouterr().out
    assert narrated("--videos", lecture.path, "--out", tmp_path / "x", "--frame-filter", tmp_path) == 1
    assert "no config.json" in capsys.readouterr().err


def test_without_an_encoder_no_domain_is_claimed(lecture, tmp_path: Path) -> None:
    assert narrated("--videos", lecture.path, "--out", tmp_path) == 0
    (video,) = read_records(tmp_path / "videos.jsonl", Video)
    assert video.domain is None and video.domain_score is None


def test_the_projects_prompts_have_the_twelve_domains(repository: Path = Path(__file__).parents[2]) -> None:
    from medllava.config import load_recipe

    prompts = load_recipe(repository / "instruct_gen" / "frame_filter.yaml", Prompts)
    assert len(prompts.domains) == 12 and "histopathology" in prompts.domains
    with pytest.raises(ConfigError, match="absent"):
        load_recipe(repository / "absent.yaml", Prompts)


SECRETS = {
    "title": "Smith^John 1961", "artist": "Dr Secret", "comment": "MRN 445566", "location": "+47.3769+008.5417/",
    "make": "PhoneMaker", "model": "PhoneModel", "date": "2024-02-03",
}


def test_a_files_metadata_reaches_no_output(tmp_path: Path) -> None:
    video = tmp_path / "videos" / "talk.mp4"
    video.parent.mkdir()
    slide = tissue(620, 240)
    with av.open(str(video), "w", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata.update(SECRETS)
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.metadata.update({"title": "Secret stream", "handler_name": "Secret handler"})
        for number in range(64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_at(slide, number / 8), format="rgb24")))
        container.mux(stream.encode())
    raw = video.read_bytes()
    # The test is worth something only if the file holds them.
    assert all(text.encode() in raw for text in SECRETS.values())
    video.with_suffix(".srt").write_text(TRANSCRIPT.split("\n\n3")[0])
    out = tmp_path / "out"
    assert narrated("--videos", video.parent, "--out", out) == 0
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert any(path.suffix == ".png" for path in written)
    for path, data in written.items():
        for text in (*SECRETS.values(), "Secret"):
            assert text.encode() not in data, (path, text)
        if path.suffix == ".png":
            assert set(png_chunks(data)) == {b"IHDR", b"IDAT", b"IEND"}


def png_chunks(data: bytes) -> list[bytes]:
    kinds, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        kinds.append(kind)
        at += 12 + length
    return kinds


def test_a_view_that_comes_back_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medllava.instruct_gen.same_view import Views

    slide = tissue(700, 240)
    lefts = [0] * 40 + [300] * 40 + [0] * 40 + [8] * 40
    rng = np.random.default_rng(1)
    pictures = []
    for number, left in enumerate(lefts):
        picture = np.clip(slide[:, left : left + 320] + rng.normal(0, 3, (240, 320, 3)), 0, 255).astype(np.uint8)
        cv2.circle(picture, (60 + 5 * (number % 40), 120), 5, (20, 20, 20), -1)
        pictures.append(picture)
    encode(tmp_path / "back.mp4", pictures, fps=8)
    (tmp_path / "back.srt").write_text(TRANSCRIPT)
    assert narrated("--videos", tmp_path / "back.mp4", "--out", tmp_path / "out") == 0
    narratives = list(read_records(tmp_path / "out" / "narratives.jsonl", Narrative))
    # A view that has moved by 2.5 % of the width is another one: boxes would not fit.
    assert [n.same_view_as for n in narratives] == [None, None, "back-000", None]
    assert "1 narratives show a view that their video showed before" in capsys.readouterr().out
    views = Views()
    luma = cv2.cvtColor(slide[:, :320], cv2.COLOR_RGB2GRAY)
    assert views.find_or_add("a", luma, (0, 0, 320, 240)) is None
    assert views.find_or_add("b", cv2.convertScaleAbs(luma, alpha=0.9, beta=8), (0, 0, 320, 240)) == "a"
    assert views.find_or_add("c", luma, (40, 0, 320, 240)) is None
