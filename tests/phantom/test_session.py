from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from medllava.phantom import narration
from medllava.phantom.grammar import DIAGNOSES, FINDINGS, find_kinds, find_quadrants
from medllava.phantom.outputs import describe_truth
from medllava.phantom.session import SHORTEST_DWELL_S, Session, Settings, plan_session


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return [plan_session(1, index, Settings()) for index in range(1, 81)]


def test_sentences_are_understood_by_the_grammar() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        for kind in FINDINGS:
            text = narration.name_finding(rng, kind, "lower right")
            assert find_kinds(text) == [kind], text
            assert find_quadrants(text) in ([], ["lower right"]), text
            clue = narration.name_clue(rng, kind)
            assert find_kinds(clue) == [kind]
            assert "clue" in clue
        for diagnosis in DIAGNOSES:
            told = narration.tell_diagnosis(rng, diagnosis)
            assert [name for name in DIAGNOSES if name in told] == [diagnosis]
            assert find_kinds(told) == []
        for text in (narration.say_aside(rng), narration.welcome(rng)):
            assert find_kinds(text) == []
            assert find_quadrants(text) == []


def test_a_plan_depends_on_seed_and_index_only(sessions: list[Session]) -> None:
    assert plan_session(1, 7, Settings()) == sessions[6]
    assert plan_session(2, 7, Settings()) != sessions[6]


def test_every_finding_of_a_dwell_is_named_once_while_pointed_at(sessions: list[Session]) -> None:
    for session in sessions[:20]:
        fps = session.settings.fps
        truth = describe_truth(session)
        for dwell in session.dwells:
            start, end = dwell.start / fps, dwell.end / fps
            assert end - start >= SHORTEST_DWELL_S
            said = [line for line in session.lines if start <= line.start_s < end]
            assert sorted(f.kind for f in dwell.findings) == sorted(line.finding.kind for line in said if line.finding)
            for line in said:
                assert line.end_s <= end
                if line.finding is None:
                    continue
                assert 1.999 <= line.end_s - line.start_s <= 3.001
                x0, y0, x1, y1 = line.finding.box_px
                # From before the first word until shortly before the last sound.
                frames = range(round((line.start_s - 0.1) * fps), int((line.end_s - 0.12) * fps))
                seen = np.array([truth["cursor_xy_px"][n] for n in frames], float)
                assert (seen >= (x0 - 4, y0 - 4)).all()
                assert (seen <= (x1 + 4, y1 + 4)).all()
                covered = np.ptp(seen, axis=0) / (x1 - x0, y1 - y0)
                assert covered.min() > 0.5


def test_lines_do_not_overlap_and_gestures_are_in_order(sessions: list[Session]) -> None:
    for session in sessions:
        for a, b in zip(session.lines, session.lines[1:], strict=False):
            assert a.end_s < b.start_s
        for a, b in zip(session.gestures, session.gestures[1:], strict=False):
            assert a.end_s <= b.start_s + 1e-9


def test_cases_hold_their_clues_and_tell_their_diagnosis_in_a_dwell(sessions: list[Session]) -> None:
    for session in sessions:
        kinds = {f.kind for dwell in session.dwells for f in dwell.findings}
        assert kinds >= set(DIAGNOSES[session.diagnosis])
        clues = [line.finding.kind for line in session.lines if line.role == "clue" and line.finding]
        assert sorted(clues) == sorted(DIAGNOSES[session.diagnosis])
        told = [line for line in session.lines if line.role == "diagnosis"]
        assert len(told) == 1
        assert session.diagnosis in told[0].text
        last = session.dwells[-1]
        assert last.start / session.settings.fps < told[0].start_s
        assert told[0].end_s <= last.end / session.settings.fps


def test_a_diagnosis_does_not_give_the_findings_away(sessions: list[Session]) -> None:
    """Adding a missing clue must not make a field predictable: every kind stays near one in eight."""
    counts = Counter(f.kind for s in sessions for dwell in s.dwells for f in dwell.findings)
    total = sum(counts.values())
    assert all(abs(counts[kind] / total - 1 / 8) < 0.02 for kind in FINDINGS)


def test_short_cases_take_what_fits() -> None:
    for index in range(20):
        session = plan_session(0, index, Settings(fields=1))
        kinds = [f.kind for f in session.dwells[0].findings]
        assert len(set(kinds)) == len(kinds)


def test_windows_share_no_tissue_and_lie_on_their_slide() -> None:
    session = plan_session(0, 1, Settings(fields=30, width=640, height=360))
    assert len(session.slides) == 3
    for number, dwell in enumerate(session.dwells):
        x, y, w, h = dwell.window
        assert x >= 0
        assert y >= 0
        assert x + w <= session.slides[dwell.slide][0]
        assert y + h <= session.slides[dwell.slide][1]
        for other in session.dwells[:number]:
            u, v, p, q = other.window
            apart = x + w <= u or u + p <= x or y + h <= v or v + q <= y
            assert apart or other.slide != dwell.slide
    assert {dwell.magnification for dwell in session.dwells} == {"20x", "30x"}


def test_pointer_hides_in_some_pans_and_the_inset_is_kept_free() -> None:
    sessions = [plan_session(3, index, Settings(webcam=True)) for index in range(12)]
    for session in sessions:
        assert session.webcam_px is not None
        x0, y0, x1, y1 = session.webcam_px
        for dwell in session.dwells:
            for finding in dwell.findings:
                a, b, c, d = finding.box_px
                assert c <= x0 or x1 <= a or d <= y0 or y1 <= b
    hidden = [sum(p is None for p in describe_truth(s)["cursor_xy_px"]) / s.frames for s in sessions]
    assert min(hidden) < 0.08 < max(hidden)


def test_questions_are_asked_only_if_they_are_wanted(sessions: list[Session]) -> None:
    assert all(session.asked == () and "questions" not in describe_truth(session) for session in sessions)
    assert not any(line.text.endswith("?") for session in sessions for line in session.lines)
    curious = [plan_session(1, index, Settings(questions=True)) for index in range(1, 21)]
    asked = [one for session in curious for one in session.asked]
    assert {(one.type, one.image_dependent, one.answer is None) for one in asked} == {
        ("open", True, False), ("closed", True, False), ("open", False, False), ("closed", False, False),
        ("open", False, True),
    }
    for session, plain in zip(curious, sessions, strict=False):
        assert [dwell.findings for dwell in session.dwells] == [dwell.findings for dwell in plain.dwells]
        for one in session.asked:
            (at,) = (number for number, line in enumerate(session.lines) if line.start_s == one.time_s)
            assert session.lines[at].text == one.question
            assert one.answer is None or session.lines[at + 1].text == one.answer
        for a, b in zip(session.lines, session.lines[1:], strict=False):
            assert a.end_s < b.start_s
        assert len(describe_truth(session)["questions"]) == len(session.asked)


def test_answers_are_true() -> None:
    for index in range(1, 40):
        session = plan_session(3, index, Settings(questions=True))
        for dwell in session.dwells:
            start, end = dwell.start / session.settings.fps, dwell.end / session.settings.fps
            here = {finding.kind for finding in dwell.findings}
            for one in session.asked:
                if start <= one.time_s < end and one.image_dependent and one.answer:
                    (kind,) = find_kinds(one.answer)
                    assert (kind in here) == (not one.answer.startswith("No, "))
