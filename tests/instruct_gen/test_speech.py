from __future__ import annotations

import json
import re
from itertools import pairwise
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
    first, last = read_transcript(written(tmp_path, "a.srt", text)).utterances
    assert (first.start_s, first.end_s, first.text) == (1.0, 2.5, "This is & that.")
    assert last.start_s == 3603.0


def test_webvtt(tmp_path):
    text = (
        "WEBVTT\n\nNOTE made by hand\n\nintro\n00:01.000 --> 00:02.000 align:start position:0%\n"
        "<v Anna>Look<00:01.500><c> here.</c>\n\n00:02.500 --> 00:03.000\nThere.\n"
    )
    assert [u.text for u in read_transcript(written(tmp_path, "a.vtt", text)).utterances] == ["Look here.", "There."]


def test_a_sentence_broken_over_cues_is_joined_and_two_in_one_are_parted(tmp_path):
    text = (
        "1\n00:00:01,000 --> 00:00:03,000\nThis is a gland that\n\n2\n00:00:03,100 --> 00:00:05,000\nhas a lumen.\n\n"
        "3\n00:00:06,000 --> 00:00:10,000\nOne here. Two there.\n"
    )
    found = read_transcript(written(tmp_path, "a.srt", text)).utterances
    assert [u.text for u in found] == ["This is a gland that has a lumen.", "One here.", "Two there."]
    assert (found[0].start_s, found[0].end_s) == (1.0, 5.0)
    assert found[1].end_s == found[2].start_s == pytest.approx(8.0, abs=0.5)


def test_whisperx_words_part_sentences(tmp_path):
    words = [("One", 0.5, 0.8), ("here.", 0.8, 1.2), ("Two", 3.0, 3.3), ("there.", 3.4, 4.0)]
    segment = {
        "start": 0.5, "end": 4.0, "text": " One here. Two there.",
        "words": [{"word": word, "start": start, "end": end} for word, start, end in words],
    }
    found = read_transcript(written(tmp_path, "a.json", json.dumps({"segments": [segment]}))).utterances
    assert [(u.start_s, u.end_s, u.text) for u in found] == [(0.5, 1.2, "One here."), (3.0, 4.0, "Two there.")]
    del segment["words"][3]["start"]
    assert len(read_transcript(written(tmp_path, "b.json", json.dumps([segment]))).utterances) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.srt", "", r"a\.srt: the transcript is empty"),
        ("a.srt", "just words", r"a\.srt: no cue found"),
        ("a.srt", "1\n-00:00:02,000 --> 00:00:03,000\nHi.\n", r"a\.srt:2: times -2\.0 to 3\.0"),
        ("a.srt", "1\n00:00:05,000 --> 00:00:03,000\nHi.\n", r"a\.srt:2: ends at 3 s, not after its start at 5 s"),
        ("a.srt", "1\n00:00:xx --> 00:00:03,000\nHi.\n", r"a\.srt:2: not a time"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:03,000\nA\x00\xff\xfe.\n", r"a\.srt: not UTF-8 text .*byte"),
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
    assert [u.text for u in read_transcript(written(tmp_path, "a.srt", text)).utterances] == ["First.", "Second."]


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


def test_words_with_their_times_and_confidence(tmp_path):
    words = [
        {"word": " One", "start": 0.5, "end": 0.8, "probability": 0.91}, {"word": "gland.", "start": 0.8, "end": 1.2},
        {"word": "Two.", "start": 3.0, "end": 3.3, "score": 1.2},
    ]
    segment = {"start": 0.5, "end": 4.0, "text": "One gland. Two.", "words": words}
    first, second = read_transcript(written(tmp_path, "a.json", json.dumps([segment]))).utterances
    assert [(w.text, w.start_s, w.end_s, w.confidence) for w in first.words] == [
        ("One", 0.5, 0.8, 0.91), ("gland.", 0.8, 1.2, None)
    ]
    assert second.words[0].confidence == 1.0
    # A number without times, as WhisperX leaves it: then no word of the segment is told.
    del words[1]["end"]
    assert not any(u.words for u in read_transcript(written(tmp_path, "b.json", json.dumps([segment]))).utterances)


def rolling_vtt() -> str:
    return (
        "WEBVTT\nKind: captions\nLanguage: en\n\n"
        "00:00:00.160 --> 00:00:02.389 align:start position:0%\n \n"
        "so<00:00:00.480><c> here</c><00:00:00.880><c> we</c>\n\n"
        "00:00:02.389 --> 00:00:02.399 align:start position:0%\nso here we\n \n\n"
        "00:00:02.399 --> 00:00:04.310 align:start position:0%\nso here we\n"
        "see<00:00:02.560><c> necrosis</c>\n\n"
        "00:00:04.310 --> 00:00:04.320 align:start position:0%\nsee necrosis\n \n\n"
        "00:00:04.320 --> 00:00:06.000 align:start position:0%\nsee necrosis\nokay\n\n"
        "00:00:06.000 --> 00:00:06.010 align:start position:0%\nokay\n \n\n"
        "00:00:06.010 --> 00:00:08.000 align:start position:0%\nokay\nokay\n"
    )


def test_rolling_captions_say_each_line_once(tmp_path):
    found = read_transcript(written(tmp_path, "a.vtt", rolling_vtt()))
    assert found.warnings == ()
    assert [u.text for u in found.utterances] == ["so here we", "see necrosis", "okay", "okay"]
    assert [(w.text, w.start_s, w.end_s) for w in found.utterances[1].words] == [
        ("see", 2.399, 2.56), ("necrosis", 2.56, 4.31)
    ]
    assert all(a.end_s <= b.start_s for a, b in pairwise(found.utterances))
    # The same as SubRip, as downloaders convert it: no tags, the lines still repeat.
    srt = re.sub(r"<[^>]*>", "", rolling_vtt().split("\n\n", 1)[1]).replace(" align:start position:0%", "")
    blocks = srt.split("\n\n")
    srt = "\n\n".join(f"{n}\n{block.strip()}" for n, block in enumerate(blocks, 1)).replace(".", ",")
    assert [u.text for u in read_transcript(written(tmp_path, "a.srt", srt)).utterances][:3] == [
        "so here we", "see necrosis", "okay"
    ]


def test_a_refrain_in_ordinary_subtitles_is_kept(tmp_path):
    text = "".join(
        f"{n}\n00:00:{n:02d},000 --> 00:00:{n:02d},900\n{said}\n\n"
        for n, said in enumerate(["Look.", "Look.", "A gland.", "Necrosis.", "A vessel.", "Fat.", "The end."], 1)
    )
    found = read_transcript(written(tmp_path, "a.srt", text))
    assert [u.text for u in found.utterances][:3] == ["Look.", "Look.", "A gland."]


def test_json3_of_automatic_captions(tmp_path):
    def event(start: int, length: int, *words: tuple[str, int], **more: int) -> dict[str, object]:
        segments = [{"utf8": text, **({"tOffsetMs": offset} if offset else {})} for text, offset in words]
        return {"tStartMs": start, "dDurationMs": length, "wWinId": 1, "segs": segments, **more}

    events = [
        {"tStartMs": 0, "dDurationMs": 900000, "id": 1, "wpWinPosId": 1},
        event(160, 4150, ("so", 0), (" here", 320), (" we", 720)),
        event(2390, 1920, ("\n", 0), aAppend=1),
        event(2400, 3600, ("see", 0), (" necrosis", 160)),
        event(4310, 10, ("\n", 0), aAppend=1),
        event(6000, 2000, ("[Music]", 0)),
        event(9000, 3000, ("okay", 0)),
    ]
    found = read_transcript(written(tmp_path, "a.json3", json.dumps({"wireMagic": "pb3", "events": events})))
    assert [(u.start_s, u.end_s, u.text) for u in found.utterances] == [
        (0.16, 2.4, "so here we"), (2.4, 6.0, "see necrosis"), (9.0, 12.0, "okay")
    ]
    assert [(w.text, w.start_s, w.end_s) for w in found.utterances[0].words] == [
        ("so", 0.16, 0.48), ("here", 0.48, 0.88), ("we", 0.88, 2.4)
    ]
    assert found.warnings == ()
    with pytest.raises(DataError, match=r"b\.json3: expected YouTube's"):
        read_transcript(written(tmp_path, "b.json3", "{}"))


GOOD = "".join(
    f"{n}\n00:00:{2 * n:02d},000 --> 00:00:{2 * n + 1:02d},500\nThis is gland number {n}.\n\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("bad", "warning"),
    [
        ("9\n-00:00:02,000 --> 00:00:03,000\nBad.\n", r"a\.srt: left out one with impossible times \(34: times -2"),
        ("9\n00:00:30,000 --> 00:00:29,000\nBad.\n", r"left out one with no length \(34: ends at 29 s"),
        ("9\n00:00:xx --> 00:00:29,000\nBad.\n", r"left out one with unreadable times \(34: not a time: '00:00:xx'"),
        ("9\nOne --> two.\nBad.\n", r"left out one with unreadable times \(34: not a time: 'One'"),
        ("9\n00:01:58,000 --> 00:02:03,000\nBad.\n", r"one with times past the video's end"),
        ("9\n00:00:20,000 --> 00:00:22,000\n" + "Bad word. " * 1_000_000 + "\n", r"too much text \(34: 10,000,000 ch"),
        ("9\n00:00:20,000 --> 00:00:22,000\n" + "<" * 10_000_000 + "\n", r"too much text \(34: 10,000,000 ch"),
        ("9\n00:00:20,000 --> 00:00:22,000\n" + "Bad word. " * 500 + "\n", r"too much text \(34: 4,999 characters"),
        ("9\n00:00:01,000 --> 00:00:01,500\nThis is first.\n", r"a\.srt: not in order of time; sorted"),
        ("9\n00:00:17,000 --> 00:00:19,000\nThis is last.\n", r"a\.srt: 1 overlap the one before; kept"),
        ("9\n00:00:20,000 --> 00:00:22,000\nThis is caf\xe9.\n", r"a\.srt: not UTF-8 text; read as cp1252"),
    ],
    ids=[
        "negative", "backwards", "unreadable", "arrow", "late", "10MB", "10MB of tags", "5kB", "order", "overlap",
        "cp1252",
    ],
)
def test_one_bad_cue_costs_itself_and_is_told_of_once(tmp_path, bad, warning):
    found = read_transcript(written(tmp_path, "a.srt", (GOOD + bad).encode("cp1252")), 60.0)
    assert len(found.warnings) == 1
    assert re.search(warning, found.warnings[0]), found.warnings
    glands = [u.text for u in found.utterances if "gland" in u.text]
    assert glands == [f"This is gland number {n}." for n in range(1, 9)]
    assert not any("Bad" in u.text for u in found.utterances)


def test_encodings(tmp_path):
    russian = "Здесь видно железу, а рядом лежит участок некроза с лимфоцитами."
    for encoding, said in (("cp1251", russian), ("utf-16", "Eine Drüse.")):
        text = f"1\n00:00:01,000 --> 00:00:03,000\n{said}\n"
        assert read_transcript(written(tmp_path, "a.srt", text.encode(encoding))).utterances[0].text == said
    mixed = GOOD + "9\n00:00:20,000 --> 00:00:22,000\nSjögren’s naïve Sézary.\n"
    assert read_transcript(written(tmp_path, "b.srt", mixed.encode("cp1252"))).utterances[-1].text == (
        "Sjögren’s naïve Sézary."
    )


def test_a_transcript_that_is_mostly_bad_or_of_another_video_is_refused(tmp_path):
    bad = "".join(f"\n00:00:{n:02d},000 --> 00:00:01,000\nBad.\n" for n in range(20, 30))
    with pytest.raises(DataError, match=r"a\.srt:34: ends at 1 s, .*\(10 of 18 are unusable\)"):
        read_transcript(written(tmp_path, "a.srt", GOOD + bad))
    with pytest.raises(DataError, match=r"a\.srt: an utterance ends at 13\.5 s, but the video is 11\.0 s .*\(3 of 8"):
        read_transcript(written(tmp_path, "a.srt", GOOD), 11.0)


def test_a_language_in_the_name(tmp_path):
    video = tmp_path / "talk.mp4"
    written(tmp_path, "talk.info.extra.json", "")
    written(tmp_path, "talk.en-US.json3", "")
    written(tmp_path, "talkative.en.srt", "")
    assert find_transcript(video).name == "talk.en-US.json3"
