"""Transcripts made from sound: how it is cut, both backends, and ``narrate --asr``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from medllava.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.asr import RATE, load_recogniser, transcribe, windows


class WhisperModel:
    """Stands in for faster_whisper.WhisperModel: hears one sentence wherever it is loud."""

    loaded: list[str] = []

    def __init__(self, model_size_or_path: str) -> None:
        self.loaded.append(model_size_or_path)

    def transcribe(self, audio, *, word_timestamps, vad_filter, condition_on_previous_text):
        assert word_timestamps and vad_filter and not condition_on_previous_text
        assert audio.dtype == np.float32 and audio.ndim == 1

        def segments():
            loud = np.flatnonzero(np.abs(audio) > 0.05) / RATE
            if len(loud):
                start, end = float(loud[0]), float(loud[-1])
                words = [
                    SimpleNamespace(start=start + n * (end - start) / 4, end=start + (n + 1) * (end - start) / 4,
                                    word=f" {word}", probability=0.9)
                    for n, word in enumerate(["Here", "is", "a", "gland."])
                ]
                yield SimpleNamespace(start=start, end=end, text=" Here is a gland.", words=words)

        return segments(), SimpleNamespace(language="en")


@pytest.fixture
def faster_whisper(monkeypatch: pytest.MonkeyPatch) -> type[WhisperModel]:
    module = ModuleType("faster_whisper")
    module.WhisperModel = WhisperModel
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    WhisperModel.loaded.clear()
    return WhisperModel


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper folder of some thousand random weights."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    end = "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(
        vocab={letter: number for number, letter in enumerate(letters)}, merges=[], unk_token=end, bos_token=end,
        eos_token=end,
    )
    names = [f"<|{name}|>" for name in ("startoftranscript", "en", "transcribe", "startofprev", "notimestamps")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.add_tokens([f"<|{number * 0.02:.2f}|>" for number in range(1501)])
    ids = dict(zip([end, *names], tokenizer.convert_tokens_to_ids([end, *names]), strict=True))
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_target_positions=64, pad_token_id=ids[end], bos_token_id=ids[end], eos_token_id=ids[end],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    ))
    chosen = model.generation_config
    chosen._from_model_config = False
    chosen.alignment_heads, chosen.is_multilingual, chosen.max_length = [[0, 0]], False, 24
    chosen.no_timestamps_token_id = ids["<|notimestamps|>"]
    chosen.prev_sot_token_id = ids["<|startofprev|>"]
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(folder)
    return folder


def test_sound_is_cut_where_it_is_quiet_and_nothing_is_lost(lecture, sound, with_sound, tmp_path):
    talk = with_sound(lecture.path, tmp_path / "talk.mp4", sound(14, [(0, 3.5), (4.0, 8.3), (8.8, 14)], 0.0))
    found = list(windows(talk, 5.0))
    assert len(found) > 2
    assert 3.4 < found[1][0] < 4.1
    for (start_s, samples), (next_s, _) in zip(found, found[1:], strict=False):
        assert start_s + len(samples) / RATE == pytest.approx(next_s)
        assert len(samples) <= 5.0 * RATE
    assert sum(len(samples) for _, samples in found) / RATE == pytest.approx(14, abs=0.2)


def test_times_count_from_the_start_of_the_video(lecture, sound, with_sound, tmp_path, faster_whisper):
    talk = with_sound(lecture.path, tmp_path / "talk.mp4", sound(14, [(1, 2.5), (6, 8), (10, 13)], 0.0))
    recogniser = load_recogniser("faster-whisper:small")
    recogniser.window_s = 5.0
    segments = list(transcribe(talk, recogniser))
    assert [(round(s["start"]), round(s["end"])) for s in segments][0] == (1, 2)
    assert segments[-1]["end"] == pytest.approx(13, abs=0.15)
    for segment in segments:
        assert segment["words"][0]["start"] == segment["start"]
        assert segment["words"][-1]["end"] == pytest.approx(segment["end"], abs=0.01)
        assert segment["words"][0] == {**segment["words"][0], "word": "Here", "score": 0.9}


def test_narrate_makes_the_missing_transcript_once(lecture, sound, with_sound, tmp_path, faster_whisper, capsys):
    folder, out = tmp_path / "lectures", tmp_path / "out"
    folder.mkdir()
    with_sound(lecture.path, folder / "heard.mp4", sound(14, [(3.5, 7.2)], 0.0))
    shutil.copy(lecture.path, folder / "mute.mp4")
    shutil.copy(lecture.path, folder / "written.mp4")
    shutil.copy(lecture.path.with_suffix(".srt"), folder / "written.srt")
    arguments = ["narrate", "--videos", str(folder), "--out", str(out), "--workers", "1", "--asr"]
    for _ in range(2):
        assert main(arguments) == 0
    assert faster_whisper.loaded == ["small", "small"]  # Of the second run, for the video without sound.
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [row["video"] for row in failed] == ["mute.mp4"]
    assert failed[0]["reason"].endswith("mute.mp4: no transcript, and no audio track to make one from")
    assert [path.name for path in (out / "transcripts").iterdir()] == ["heard.words.json"]
    captions = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    spoken = [phrase["text"] for row in captions if row["video"] == "heard.mp4" for phrase in row["phrases"]]
    assert spoken == ["Here is a gland."]
    narratives = [json.loads(line) for line in (out / "narratives.jsonl").read_text().splitlines()]
    words = next(row["utterances"][0]["words"] for row in narratives if row["video"] == "heard.mp4")
    assert [(word["text"], word["confidence"]) for word in words[:2]] == [("Here", 0.9), ("is", 0.9)]
    # Without the flag the transcript that was made is still found; another recogniser makes it again.
    assert main(arguments[:-1]) == 0
    assert main([*arguments, "faster-whisper:large-v3"]) == 0
    assert json.loads((out / "transcripts" / "heard.words.json").read_text())["asr"] == "faster-whisper:large-v3"
    capsys.readouterr()


def test_a_whisper_folder_gives_words_with_times(lecture, sound, with_sound, tmp_path, tiny_whisper):
    talk = with_sound(lecture.path, tmp_path / "talk.mp4", sound(14, [(1, 2.5), (6, 13)], 0.0))
    segments = list(transcribe(talk, load_recogniser(f"transformers:{tiny_whisper}")))
    words = [word for segment in segments for word in segment["words"]]
    assert words
    assert all(0 <= word["start"] <= word["end"] <= 14.2 for word in words)
    assert [word["start"] for word in words] == sorted(word["start"] for word in words)
    assert segments[0]["text"].split()[0] == words[0]["word"].split()[0]


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ("whisper", ConfigError, "--asr whisper: expected faster-whisper:MODEL_OR_DIR or transformers:DIR"),
        ("transformers:", ConfigError, "expected faster-whisper"),
        ("transformers:/nowhere", CheckpointError, "/nowhere: no such model folder"),
    ],
)
def test_a_wrong_choice_is_one_line(choice, error, message):
    with pytest.raises(error, match=message):
        load_recogniser(choice)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medllava\[asr\]'"):
        load_recogniser("faster-whisper:small")


def test_a_video_without_sound(lecture, faster_whisper):
    with pytest.raises(DataError, match=r"case7\.mp4: no transcript, and no audio track"):
        list(transcribe(lecture.path, load_recogniser("faster-whisper:small")))
