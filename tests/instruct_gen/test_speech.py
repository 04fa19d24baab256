from __future__ import annotations

import json
from pathlib import Path

import pytest

from medllava.errors import DataError
from medllava.instruct_gen.speech import find_transcript, read_transcript


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_subrip(tmp_path):
    text = (
        "\ufeff1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>This is</i> &amp; that.\r\n\r\n"
        "2\r\n01:00:03,000 --> 01:00:04,000\r\nEnd."
    )
    first, last = read_transcript(written(tmp_path, "a.srt", text))
    assert (first.start_s, first.end_s, first.text) == (1.0, 2.5, "This is & that.")
    assert last.start_s == 3603.0


def test_webvtt(tmp_path):
    text = (
        "WEBVTT\n\nNOTE made by hand\n\nintro\n00:01.000 --> 00:02.000 align:start position:0%\n"
        "<v Anna>Look<00:01.500><c> here.</c>\n\n00:02.500 --> 00:03.000\nThere.\n"
    )
    assert [u.text for u in read_transcript(written(tmp_path, "a.vtt", text))] == ["Look here.", "There."]


def test_a_sentence_broken_over_cues_is_joined_and_two_in_one_are_parted(tmp_path):
    text = (
        "1\n00:00:01,000 --> 00:00:03,000\nThis is a gland that\n\n2\n00:00:03,100 --> 00:00:05,000\nhas a lumen.\n\n"
        "3\n00:00:06,000 --> 00:00:10,000\nOne here. Two there.\n"
    )
    found = read_transcript(written(tmp_path, "a.srt", text))
    assert [u.text for u in found] == ["This is a gland that has a lumen.", "One here.", "Two there."]
    assert (found[0].start_s, found[0].end_s) == (1.0, 5.0)
    assert found[1].end_s == found[2].start_s == pytest.approx(8.0, abs=0.5)


def test_whisperx_words_part_sentences(tmp_path):
    words = [("One", 0.5, 0.8), ("here.", 0.8, 1.2), ("Two", 3.0, 3.3), ("there.", 3.4, 4.0)]
    segment = {
        "start": 0.5, "end": 4.0, "text": " One here. Two there.",
        "words": [{"word": word, "start": start, "end": end} for word, start, end in words],
    }
    found = read_transcript(written(tmp_path, "a.json", json.dumps({"segments": [segment]})))
    assert [(u.start_s, u.end_s, u.text) for u in found] == [(0.5, 1.2, "One here."), (3.0, 4.0, "Two there.")]
    del segment["words"][3]["start"]
    assert len(read_transcript(written(tmp_path, "b.json", json.dumps([segment])))) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.srt", "", r"a\.srt: the transcript is empty"),
        ("a.srt", "just words", r"a\.srt: no cue found"),
        ("a.srt", "1\n-00:00:02,000 --> 00:00:03,000\nHi.\n", r"a\.srt:2: times -2\.0 to 3\.0"),
        ("a.srt", "1\n00:00:05,000 --> 00:00:03,000\nHi.\n", r"a\.srt:2: ends at 3 s, not after its start at 5 s"),
        ("a.srt", "1\n00:00:xx --> 00:00:03,000\nHi.\n", r"a\.srt:2: not a time"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:03,000\nCaf\xe9.\n", r"a\.srt: not UTF-8 text .*byte 35"),
        ("a.srt", "1\n00:01:58,000 --> 00:02:03,000\nLate.\n", r"ends at 123\.0 s, but the video is 60\.0 s"),
        ("a.json", "", r"a\.json: the transcript is empty"),
        ("a.json", '{"segments": []}', r"a\.json: the transcript is empty"),
        ("a.json", "{", r"a\.json:1: not JSON"),
        ("a.json", '{"text": "hm"}', r"a\.json: expected whisper"),
        ("a.json", '[{"start": 0, "text": "x"}]', r"a\.json: segment 0: expected 'start', 'end'"),
        ("a.json", '[{"start": -1, "end": 2, "text": "x"}]', r"a\.json: segment 0: times -1\.0"),
    ],
)
def test_faults_are_named(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_transcript(written(tmp_path, name, text), 60.0)


def test_cues_out_of_order_are_put_in_order(tmp_path):
    text = "1\n00:00:05,000 --> 00:00:07,000\nSecond.\n\n2\n00:00:01,000 --> 00:00:06,000\nFirst.\n"
    assert [u.text for u in read_transcript(written(tmp_path, "a.srt", text))] == ["First.", "Second."]


def test_word_times_are_preferred_and_absence_is_named(tmp_path):
    video = tmp_path / "talk.mp4"
    with pytest.raises(DataError, match=r"talk\.mp4: no transcript; expected talk with one of \.words\.json"):
        find_transcript(video)
    for name in ("talk.vtt", "talk.srt", "talk.words.json"):
        written(tmp_path, name, "")
    assert find_transcript(video).name == "talk.words.json"
    elsewhere = tmp_path / "words"
    elsewhere.mkdir()
    written(elsewhere, "talk.srt", "")
    assert find_transcript(video, elsewhere) == elsewhere / "talk.srt"
