from __future__ import annotations

import pytest

from medllava.jsonl import to_item, write_json, write_json_list

ROWS = [
    {"id": "ä\n[", "n": [1, 2.5, None, float("nan")], "d": {}, "e": {"f": [{}, [], [[1, True]]], "\"": ("a", ())}},
    ["x", {"y": "z\u2028\x85\t\\\x00"}], "text", 3,
]


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS])
def test_a_list_written_item_by_item_has_the_bytes_of_one_written_whole(tmp_path, rows):
    write_json(tmp_path / "whole.json", rows)
    with write_json_list(tmp_path / "items.json") as add:
        for row in rows:
            add(to_item(row))
    assert (tmp_path / "items.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_list_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), write_json_list(tmp_path / "items.json") as add:
        add("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
