from __future__ import annotations

import json

import pytest

from medllava.errors import DataError
from medllava.instruct_gen.captions import CaptionFile


def row(id, video, text="a gland"):
    phrase = {"text": text, "start_s": 0, "end_s": 1, "box": None}
    return {"id": id, "video": video, "image": f"frames/{id}.png", "crop_px": [0, 0, 9, 9], "phrases": [phrase]}


def test_reads_in_order_and_by_video_also_of_mixed_videos(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [row("a", "v"), row("b", "w", "dysplasie sévère"), row("c", "v"), row("d", "u")]
    path.write_text("\n\n".join(json.dumps(one, ensure_ascii=False) for one in rows) + "\n" + '{"id": "cut o')
    captions = CaptionFile(path)
    assert [caption.id for caption in captions] == ["a", "b", "c", "d"] == [caption.id for caption in captions]
    assert captions.videos == ["v", "w", "u"] and len(captions) == 4
    assert [caption.id for caption in captions.of_video("v")] == ["a", "c"]
    assert captions.of_video("w")[0].phrases[0].text == "dysplasie sévère"
    first = CaptionFile(path, 2)
    assert [caption.id for caption in first] == ["a", "b"] and first.videos == ["v", "w"]
    assert [caption.id for caption in first.of_video("v")] == ["a"]


@pytest.mark.parametrize(("text", "words"), [
    ("", "no captions in it"), (json.dumps(row("a", "v")) + "\n" + json.dumps(row("a", "w")) + "\n", "more than once"),
    ('{"id": "a"}\n', "captions.jsonl:1: not a GroundedCaption"),
])  # fmt: skip
def test_names_what_is_wrong(tmp_path, text, words):
    (tmp_path / "captions.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        CaptionFile(tmp_path / "captions.jsonl")
