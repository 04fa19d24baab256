"""Replies that say nothing or go round in a loop, told by their letters alone, whatever was asked."""

from __future__ import annotations

from collections.abc import Sequence

LOOP_TIMES = 4
"""How often the same must stand in a row."""
LOOP_WORDS = 8
"""Words that a loop has at least."""
LONGEST_UNIT = 40
"""Words (or letters) of what is said over and over."""
LOOP_LETTERS = 32
"""Letters that a loop within one word has at least."""


def is_empty(text: str) -> bool:
    """Whether a reply has no letter and no digit of any script: nothing, white space, or punctuation alone."""
    return not any(sign.isalnum() for sign in text)


def loops(text: str) -> bool:
    """Whether a reply goes round in a loop (degenerate repetition).

    It does if the same run of 1 to 40 words stands at least 4 times in a row without a gap, at least 8 words in all,
    and these words are at least half of the reply, or its end (where the last round may be cut off). Words are what
    white space parts, capitals aside; a word of 32 letters and more is looked through letter by letter in the same way,
    32 letters in all. Three times the same sentence is no loop, nor are four words "no no no no".
    """
    words = text.lower().split()
    if _repeats(words, LOOP_WORDS):
        return True
    return any(len(word) >= LOOP_LETTERS and _repeats(word, LOOP_LETTERS) for word in words)


def _repeats(items: Sequence[str], least: int) -> bool:
    """Whether a run of ``items`` of up to :data:`LONGEST_UNIT` is repeated as :func:`loops` says, ``least`` in all."""
    count = len(items)
    if count < least:
        return False
    # 4 rounds that are half of it leave at most 5/8 of its fours in a row different; few replies are looked through.
    fours = set(zip(items, items[1:], items[2:], items[3:], strict=False))
    half = 8 * len(fours) <= 5 * count
    for unit in range(1, min(LONGEST_UNIT, count // LOOP_TIMES) + 1):
        wanted = max(unit * LOOP_TIMES, least)
        place = count - 1
        while place >= unit and items[place] == items[place - unit]:
            place -= 1
        if count - 1 - place + unit >= wanted:
            return True
        same = 0
        for place in range(unit, count) if half else ():
            same = same + 1 if items[place] == items[place - unit] else 0
            if same + unit >= max(wanted, (count + 1) // 2):
                return True
    return False
