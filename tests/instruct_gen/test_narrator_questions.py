from __future__ import annotations

import pytest

from medllava.instruct_gen.narrator_questions import NarratorQuestion, answer_fault, is_social, narrator_questions
from medllava.instruct_gen.records import GroundedCaption, Phrase


def caption(id, *phrases, video="v.mp4"):
    told = tuple(Phrase(text=text, start_s=start, end_s=end) for start, end, text in phrases)
    return GroundedCaption(id=id, video=video, image=f"{id}.png", crop_px=(0, 0, 9, 9), phrases=told)


def texts(captions):
    return {id: [question.text for question in found] for id, found in narrator_questions(captions).items()}


def test_a_question_belongs_to_the_image_on_the_screen():
    first = caption("a", (0, 2, "Here is a gland."), (3, 5, "What do you see in the lumen?"), (6, 8, "Mucin."))
    second = caption("b", (10, 12, "Is there any necrosis here? No, there is none."), (30, 31, "Okay?"))
    assert texts([first, second]) == {"a": ["What do you see in the lumen?"], "b": ["Is there any necrosis here?"]}
    question = narrator_questions([first, second])["a"][0]
    assert (question.start_s, question.end_s) == (3, 5)
    assert [phrase.text for phrase in question.talk][-1] == "Okay?" and question.talk[0].text == "Here is a gland."


def test_videos_are_not_mixed():
    found = texts([
        caption("a", (0, 2, "What is this structure?"), (3, 4, "A gland.")),
        caption("b", (0, 2, "A vessel."), video="w.mp4"),
    ])
    assert found == {"a": ["What is this structure?"]}


def test_the_talk_ends_45_s_after():
    rows = [(0, 2, "What is this structure?"), (46, 47, "Near."), (48, 49, "Far.")]
    one, *others = (caption(str(n), row) for n, row in enumerate(rows))
    talk = [phrase.text for phrase in narrator_questions([one, *others])["0"][0].talk]
    assert talk == ["What is this structure?", "Near."]


def test_whole_sentences_whatever_the_transcript_breaks():
    found = texts([caption(
        "a", (0, 1, "It is 2.5 mm. So what is the name"), (1.2, 2, "of this lesion? It is, e.g. in skin, a nevus."),
        (9, 10, "lost end"), (20, 21, "of another question?"), (22, 23, "What does Dr. Smith call it here?"),
    )])  # fmt: skip
    assert found["a"][0] == "So what is the name of this lesion?"
    assert found["a"][-1] == "What does Dr. Smith call it here?"


@pytest.mark.parametrize(("question", "social"), [
    ("Okay?", True), ("Right?", True), ("Any questions?", True), ("Can everyone see my screen?", True),
    ("Do you see that?", True), ("Are there any questions?", True), ("So, shall we go on?", True),
    ("Do you see the nucleoli?", False), ("What is this here?", False), ("Are there any mitoses?", False),
    ("Can you see the granulomas?", False), ("What else could it be besides a nevus?", False),
])  # fmt: skip
def test_questions_about_nothing(question, social):
    assert is_social(question) is social


ASKED = NarratorQuestion("So what is this in the lumen?", 3, 5, (
    Phrase(text="So what is this in the lumen? Mucin, it is blueish.", start_s=3, end_s=8),
    Phrase(text="Is it malignant? No, it is not.", start_s=9, end_s=12),
))  # fmt: skip


@pytest.mark.parametrize(("question", "answer", "kind", "quote", "reason"), [
    ("What is this in the lumen?", "Blueish mucin.", "open", "Mucin, it is blueish.", None),
    ("What is in the lumen?", "Mucin.", "open", "mucin it is bluish", None),
    ("", "", "open", "", "question not answered"),
    ("What is in the lumen?", "", "open", "Mucin", "question not answered"),
    ("How thick is the basement membrane?", "Mucin.", "open", "Mucin, it is blueish.", "not the narrator's question"),
    ("What is in the lumen.", "Mucin.", "open", "Mucin, it is blueish.", "not the narrator's question"),
    ("What is in the lumen?", "Keratin.", "open", "Keratin lies in the lumen", "answer not in the talk"),
    ("What is in the lumen?", "Mucin.", "open", "what is this in the lumen", "answer not in the talk"),
    ("What is in the lumen?", "Mucin.", "open", "", "answer not in the talk"),
    ("What is in the lumen?", "Mucin.", "closed", "Mucin, it is blueish.", "closed answer without yes or no"),
])  # fmt: skip
def test_only_what_was_asked_and_said(question, answer, kind, quote, reason):
    fault = answer_fault(ASKED, question, answer, kind, quote)
    assert (fault and fault.partition(":")[0]) == reason
