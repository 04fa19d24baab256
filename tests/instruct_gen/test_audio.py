"""Speech against the sound of real MP4 files with an AAC track made here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from medllava.instruct_gen.__main__ import main
from medllava.instruct_gen.audio import STEP_S, decoded, heard, measure_levels, silence_below
from medllava.instruct_gen.records import Utterance


def said(*spans: tuple[float, float]) -> list[Utterance]:
    return [Utterance(start_s=start, end_s=end, text=f"From {start}.") for start, end in spans]


@pytest.mark.parametrize("level", [0.3, 0.01])
@pytest.mark.parametrize("room", [0.0, 0.0003])
def test_only_what_can_be_heard_was_said(lecture, sound, with_sound, tmp_path, level, room):
    talk = with_sound(lecture.path, tmp_path / "talk.mp4", sound(14, [(0.2, 2.2), (3.5, 7.2)], room * level, level))
    utterances = said((0.3, 2.1), (3.5, 7.2), (6.5, 8.0), (8.0, 10.0), (11.0, 13.0))
    kept, warnings = heard(talk, utterances)
    assert kept == tuple(utterances[:3])
    assert warnings == (
        f"{talk}: dropped 2 of 5 utterances that lie in silence (8.0 s: 'From 8.0.')",
    )


def test_a_noisy_room_keeps_all_and_silence_keeps_nothing(lecture, sound, with_sound, tmp_path):
    utterances = said((0.3, 2.1), (8.0, 10.0))
    noisy = with_sound(lecture.path, tmp_path / "noisy.mp4", sound(14, [(0.2, 2.2)], 0.03))
    assert heard(noisy, utterances) == (tuple(utterances), ())
    for room in (0.0, 0.0003):
        silent = with_sound(lecture.path, tmp_path / "silent.mp4", sound(14, [], room))
        assert heard(silent, utterances)[0] == ()
    assert heard(lecture.path, utterances) == (tuple(utterances), ())


def test_sound_that_ends_early_is_silent_from_there_on(lecture, sound, with_sound, tmp_path):
    short = with_sound(lecture.path, tmp_path / "short.mp4", sound(5, [(0.2, 5)], 0.0))
    assert heard(short, said((1, 4), (8, 12)))[0] == tuple(said((1, 4)))


def test_levels_are_those_of_the_sound(lecture, sound, with_sound, tmp_path):
    levels, fault = measure_levels(with_sound(lecture.path, tmp_path / "a.mp4", sound(14, [(2, 6)], 0.001)))
    assert fault is None
    assert levels is not None
    assert 14 / 0.05 <= len(levels) <= 14.2 / 0.05
    assert abs(np.median(levels[:38]) + 60) < 2
    assert -32 < np.median(levels[42:118]) < -22
    assert -60 <= silence_below(levels) < -40


def test_levels_are_the_mean_power_of_each_step(lecture, sound, with_sound, tmp_path):
    talk = with_sound(lecture.path, tmp_path / "talk.mp4", sound(14, [(2, 6)], 0.01))
    times, power = [], []
    for start_s, rate, samples in decoded(talk):
        times.append(start_s + np.arange(samples.shape[1]) / rate)
        power.append((samples.astype(np.float64) ** 2).mean(0))
    step = np.floor(np.concatenate(times) / STEP_S).astype(int)
    within = step >= 0
    mean = np.bincount(step[within], np.concatenate(power)[within]) / np.bincount(step[within])
    levels, _ = measure_levels(talk)
    assert levels is not None and len(levels) == len(mean)
    # A sample on the border of two steps may fall into either.
    assert np.abs(levels - 10 * np.log10(np.maximum(mean, 1e-12)))[mean > 1e-9].max() < 0.1


def test_silent_lecture_gives_no_caption_and_the_user_hears_of_it(lecture, sound, with_sound, tmp_path, capsys):
    folder = tmp_path / "lectures"
    folder.mkdir()
    for name, spans in (("silent", []), ("spoken", [(0.2, 2.2), (3.5, 7.2), (10.3, 13.0)])):
        with_sound(lecture.path, folder / f"{name}.mp4", sound(14, spans, 0.0))
        shutil.copy(lecture.path.with_suffix(".srt"), folder / f"{name}.srt")
    out = tmp_path / "out"
    assert main(["narrate", "--videos", str(folder), "--out", str(out), "--workers", "2"]) == 0
    captions = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert {caption["video"] for caption in captions} == {"spoken.mp4"}
    warnings = [json.loads(line) for line in (out / "warnings.jsonl").read_text().splitlines()]
    assert [row["video"] for row in warnings] == ["silent.mp4"]
    assert "dropped 3 of 3 utterances that lie in silence" in warnings[0]["warning"]
    assert "dropped 3 of 3 utterances" in capsys.readouterr().out
    # What was said of a video is told again when its work is not done again.
    assert main(["narrate", "--videos", str(folder), "--out", str(out), "--workers", "1"]) == 0
    assert "dropped 3 of 3 utterances" in capsys.readouterr().out
