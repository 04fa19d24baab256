"""The conversation of the web chat in a real browser: what is shown, kept, exported and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from medllava.images import load_image, to_data_uri
from medllava.serve import client, page
from medllava.serve.intake import Limits
from medllava.serve.tiles import ShownSlide
from medllava.slides import Slide

Wait = Callable[..., None]
Serve = Callable[..., str]

HOSTILE = (
    "<img src=x onerror=\"window.ran='img'\"> <script>window.ran='script'</script> <svg onload=\"window.ran='svg'\">"
    " ![p](http://evil.example/p.png) [a](javascript:window.ran='link')"
    " [d](data:text/html,<script>window.ran=1</script>)"
    " <iframe src=\"http://evil.example\"></iframe> <b>bold</b> **strong** {{ran}} ${window.ran='template'}"
    " <img src=x onerror=\"window.ran='phrase'\"> [0.10, 0.20, 0.40, 0.60]"
)


@pytest.fixture
def other(tissue: Path, tmp_path: Path) -> Path:
    path = tmp_path / "other.png"
    Image.open(tissue).convert("RGB").rotate(180).save(path)
    return path


def open_image(tab: Page, path: Path, count: int = 1) -> None:
    tab.set_input_files("#viewer input[type=file]", path)
    if count > 1:
        expect(tab.locator("#tray .pictures button")).to_have_count(count)
        expect(tab.locator("#tray .pictures button").nth(count - 1)).to_have_attribute("aria-pressed", "true")
    expect(tab.locator("#viewer canvas[data-ready=yes]")).to_be_visible()


def ask(tab: Page, text: str, answers: int) -> None:
    """Ask, and wait until there are so many answers that are whole."""
    tab.fill("#question textarea", text)
    tab.press("#question textarea", "Enter")
    expect(tab.locator("article[data-state=done]")).to_have_count(answers)


def answers(tab: Page) -> Any:
    return tab.locator("#chat .message.bot")


def serious(tab: Page) -> list[str]:
    """What axe-core finds serious or critical."""
    found = Axe().run(tab).response["violations"]
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found if one["impact"] in {"serious", "critical"} for node in one["nodes"]
    ]


def saved(tab: Page, kind: str) -> str:
    tab.click("#chat .menu summary")
    with tab.expect_download() as download:
        tab.click(f"#chat [data-kind={kind}]")
    return download.value.path().read_text(encoding="utf-8")


def test_pictures_join_the_conversation(worker: Any, serve_page: Serve, tab: Page, tissue: Path, other: Path) -> None:
    tab.goto(serve_page(worker.url))
    open_image(tab, tissue)
    ask(tab, "Where is the gland?", 1)
    open_image(tab, other, 2)
    ask(tab, "And here?", 2)
    images, turns, _ = worker.answerer.asked[-1]
    assert [image.tobytes() for image in images] == [load_image(tissue).tobytes(), load_image(other).tobytes()]
    assert [turn.text for turn in turns] == [
        "<image>\nWhere is the gland?", "A gland. [0.10, 0.20, 0.40, 0.60]", "<image>\nAnd here?"
    ]
    # Back to the first: it is shown again with the places of its answer, and asked about.
    tab.get_by_role("button", name="Picture 1").click()
    expect(tab.locator("article").first).to_have_class(re.compile("current"))
    ask(tab, "And the first?", 3)
    assert worker.answerer.asked[-1][0][-1].tobytes() == load_image(tissue).tobytes()
    assert worker.answerer.asked[-1][1][-1].text == "<image>\nAnd the first?"
    expect(tab.locator("article .which", has_text="Picture")).to_have_text(["Picture 1", "Picture 2", "Picture 1"])
    tab.get_by_role("button", name="New conversation").click()
    expect(answers(tab)).to_have_count(0)
    expect(tab.locator("#viewer .empty")).to_be_visible()
    ask(tab, "Anything?", 1)
    images, turns, _ = worker.answerer.asked[-1]
    assert (images, [turn.text for turn in turns]) == ([], ["Anything?"])


def test_a_clicked_phrase_flashes_its_box(
    worker: Any, serve_page: Serve, tab: Page, tissue: Path, other: Path
) -> None:
    worker.answerer.reply = lambda _: "A gland [0.10, 0.20, 0.40, 0.60] and a vessel [0.58, 0.23, 0.87, 0.66]."
    tab.goto(serve_page(worker.url))
    listen = "document.addEventListener('medllava-flash', (event) => flashed.push(event.detail.index))"
    tab.evaluate(f"window.flashed = []; {listen}")
    open_image(tab, tissue)
    ask(tab, "Describe", 1)
    phrases = tab.locator("#chat .phrase")
    expect(phrases).to_have_text(["A gland [0.10, 0.20, 0.40, 0.60]", "a vessel [0.58, 0.23, 0.87, 0.66]"])
    colours = phrases.evaluate_all("all => all.map((one) => one.style.getPropertyValue('--colour'))")
    assert colours == ["#e6194b", "#0082c8"]
    phrases.nth(1).click()
    phrases.nth(0).press("Enter")
    tab.wait_for_function("flashed.length === 2")
    assert tab.evaluate("flashed") == [1, 0]
    # Of an answer about another picture: that picture is shown first.
    open_image(tab, other, 2)
    ask(tab, "Describe", 2)
    phrases.nth(1).press(" ")
    expect(tab.get_by_role("button", name="Picture 1")).to_have_attribute("aria-pressed", "true")
    tab.wait_for_function("flashed.length === 3")
    assert tab.evaluate("flashed[2]") == 1


def test_untrusted_text_stays_text(worker: Any, serve_page: Serve, tab: Page, tissue: Path, tmp_path: Path) -> None:
    """Answers, questions, file names, models' names and names in region files run and load nothing."""
    worker.answerer.reply = lambda _: HOSTILE
    worker.answerer.model_id = "<img src=x onerror=\"window.ran='model'\">"
    named = tmp_path / "<img src=x onerror=\"window.ran='name'\">.png"
    named.write_bytes(tissue.read_bytes())
    tab.goto(serve_page(worker.url))
    expect(tab.locator(".worker")).to_contain_text("<img src=x")
    open_image(tab, named)
    ask(tab, HOSTILE, 1)
    regions = tmp_path / "<svg onload=alert(1)>.geojson"
    region = {"type": "Point", "coordinates": [600, 300]}
    regions.write_text(json.dumps([{"geometry": region, "properties": {"name": HOSTILE}}]))
    tab.set_input_files("#tray input[type=file]", regions)
    expect(tab.locator("#tray .list button")).to_have_count(1)
    tab.locator("#tray .list button").click()
    tab.locator("#chat .phrase").first.click()
    tab.locator("#chat .edit").first.click()
    tab.keyboard.press("Escape")
    regions.write_text("<script>window.ran='file'</script>")
    tab.set_input_files("#tray input[type=file]", regions)
    expect(tab.get_by_text("These regions cannot be read: not a GeoJSON file")).to_be_visible()
    tab.set_input_files("#viewer input[type=file]", regions)
    expect(tab.get_by_text("This picture cannot be opened")).to_be_visible()
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.ran") is None
    for part in ("#chat .message", "#tray .list", ".worker"):
        assert tab.locator(f"{part} :is(img, script, svg, iframe, a)").count() == 0
    expect(answers(tab).locator("strong")).to_have_text("strong")
    expect(answers(tab)).to_contain_text("![p](http://evil.example/p.png) [a](javascript:window.ran='link')")
    # `tab` also fails on any request that would leave this machine.


def test_stop_retry_edit_undo_and_copy(worker: Any, serve_page: Serve, tab: Page, wait: Wait) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(serve_page(worker.url))
    ask(tab, "one", 1)
    ask(tab, "two", 2)
    ask(tab, "three", 3)
    tab.locator("#chat .retry").click()
    wait(lambda: len(worker.answerer.asked) == 4)
    assert [turn.text for turn in worker.answerer.asked[3][1] if turn.role == "user"] == ["one", "two", "three"]
    expect(tab.locator("article[data-state=done]")).to_have_count(3)

    tab.locator("#chat .undo").click()
    expect(answers(tab)).to_have_count(2)
    expect(tab.locator("#question textarea")).to_have_value("three")
    expect(tab.locator("#question textarea")).to_be_focused()

    tab.locator("#chat .edit").first.click()
    expect(tab.get_by_label("Question 1")).to_be_focused()
    tab.keyboard.type(" more")
    tab.keyboard.press("Enter")
    expect(tab.locator("#chat .message.user")).to_have_text(["one more"])
    expect(tab.locator("article[data-state=done]")).to_have_count(1)
    assert [turn.text for turn in worker.answerer.asked[-1][1]] == ["one more"]

    for button, expected in (
        (tab.locator("#chat .copy"), "A gland. [0.10, 0.20, 0.40, 0.60]"),
        (tab.get_by_role("button", name="Copy all"), "Question: one more\nAnswer: A gland. [0.10, 0.20, 0.40, 0.60]"),
    ):
        button.click()
        tab.wait_for_function("(t) => navigator.clipboard.readText().then((now) => now === t)", arg=expected)

    tab.fill("#question textarea", "tell a long story")
    tab.click("#ask")
    expect(answers(tab).last).to_contain_text("and then")
    tab.click("#stop")
    expect(answers(tab).last).to_contain_text("(stopped)")
    wait(lambda: len(worker.answerer.stopped_at) == 1)
    tab.locator("#chat .undo").click()
    expect(answers(tab)).to_have_count(1)


def test_exports_and_regions_from_qupath(
    worker: Any, serve_page: Serve, tab: Page, tissue: Path, tmp_path: Path
) -> None:
    tab.goto(serve_page(worker.url))
    open_image(tab, tissue)
    ask(tab, "Where is the gland?", 1)
    conversation = json.loads(saved(tab, "json"))
    assert conversation["pictures"] == [{"number": 1, "width": 1200, "height": 600}]
    (exchange,) = conversation["exchanges"]
    assert (exchange["answer"], exchange["model"]) == ("A gland. [0.10, 0.20, 0.40, 0.60]", "scripted")
    assert exchange["boxes"] == [{"box": [0.1, 0.2, 0.4, 0.6], "text": "A gland", "colour": "#e6194b"}]
    text = saved(tab, "markdown")
    assert "> Where is the gland?" in text and "4711" not in text and "data:" not in text
    tab.click("#chat .menu summary")
    tab.get_by_label("with the pictures").check()
    tab.keyboard.press("Escape")
    with_pictures = json.loads(saved(tab, "json"))
    assert load_image(with_pictures["pictures"][0]["image"]).size == (1200, 600)

    regions = tmp_path / "regions.geojson"
    regions.write_text(saved(tab, "geojson"))
    (feature,) = json.loads(regions.read_text())["features"]
    assert feature["geometry"]["coordinates"][0][:2] == [[120, 120], [480, 120]]
    feature["properties"]["classification"]["name"] = "Tumor"
    outline = {"type": "Polygon", "coordinates": [[[240, 120], [600, 300], [300, 480], [240, 120]]]}
    drawn = {"type": "Feature", "geometry": outline, "properties": {"name": "Front"}}
    regions.write_text(json.dumps({"type": "FeatureCollection", "features": [feature, drawn]}))
    tab.set_input_files("#tray input[type=file]", regions)
    expect(tab.locator("#tray .list button")).to_have_text(["Answer 1 - Tumor", "Front"])
    tab.locator("#tray .list button").nth(1).click()
    expect(tab.locator("#viewer .region")).to_contain_text("[0.20, 0.20, 0.50, 0.80]")
    ask(tab, "What is in this region?", 2)
    assert worker.answerer.asked[-1][1][-1].text == "What is in the region [0.20, 0.20, 0.50, 0.80]?"
    back = json.loads(saved(tab, "geojson"))["features"][1]
    assert (back["properties"]["name"], back["geometry"]) == ("Question 2", outline)
    tab.get_by_role("button", name="Remove").click()
    expect(tab.locator("#tray .list button")).to_have_count(0)


def test_workers_come_and_go_while_an_answer_streams(start_worker: Any, serve_page: Serve, tab: Page) -> None:
    first, second = start_worker(), start_worker()
    second.answerer.model_id = "second"
    tab.goto(serve_page(first.url, second.url))
    expect(tab.locator("#model option")).to_have_text([f"scripted ({first.url})", f"second ({second.url})"])
    tab.fill("#question textarea", "tell a long story")
    tab.click("#ask")
    expect(answers(tab).last).to_contain_text("and then")
    second.stop()
    # Within five seconds, as far as the page and not the machine has a say in it.
    assert page.STATUS_S + client.STATE_S < 5
    expect(tab.locator(".worker b")).to_have_text("scripted")
    expect(tab.locator("article[data-state=answering]")).to_have_count(1)


def test_ones_place_in_line(
    start_worker: Any, serve_page: Serve, tab: Page, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medllava.serve.app.FIRST_PIECE_S", 0.2)
    monkeypatch.setattr("medllava.serve.app.HEARTBEAT_S", 0.2)
    worker = start_worker(limits=Limits(max_batch=1))
    worker.answerer.pause_s = 0.2  # the story must last until the second page is open
    address = serve_page(worker.url)
    ahead = browser.new_page()
    ahead.goto(address)
    ahead.fill("#question textarea", "tell a long story")
    ahead.click("#ask")
    expect(answers(ahead)).to_contain_text("and then")
    tab.goto(address)
    tab.fill("#question textarea", "hello")
    tab.click("#ask")
    expect(answers(tab)).to_have_text("Waiting: next in line")
    expect(tab.locator(".worker")).to_contain_text("1 waiting")
    ahead.click("#stop")
    worker.answerer.pause_s = 0.02
    expect(answers(tab)).to_have_text("A gland. [0.10, 0.20, 0.40, 0.60]")
    ahead.close()


def test_a_lost_worker_is_replaced_before_the_first_word(
    start_worker: Any, serve_page: Serve, tab: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "STATUS_S", 600.0)  # the page must not see before the question that the worker is gone
    first, second = start_worker(), start_worker()
    second.answerer.model_id = "second"
    tab.goto(serve_page(first.url, second.url))
    expect(tab.locator("#model option")).to_have_count(2)
    first.stop()
    tab.fill("#question textarea", "hello")
    tab.click("#ask")
    expect(answers(tab)).to_contain_text("A gland.")
    expect(answers(tab).locator(".note")).to_have_text(
        re.compile(f"{first.url} was lost; asked {second.url} instead, which runs another model: second\\.")
    )
    assert len(second.answerer.asked) == 1


def test_what_a_lost_worker_said_is_kept(start_worker: Any, serve_page: Serve, tab: Page) -> None:
    first, second = start_worker(), start_worker()
    tab.goto(serve_page(first.url, second.url))
    expect(tab.locator("#model option")).to_have_count(2)
    tab.fill("#question textarea", "tell a long story")
    tab.click("#ask")
    expect(answers(tab).last).to_contain_text("and then")
    first.stop()
    expect(answers(tab)).to_contain_text("was lost in the middle of this answer.")
    expect(answers(tab)).to_contain_text(f"Retry asks scripted at {second.url}.")
    expect(answers(tab)).to_contain_text("and then")
    expect(tab.locator(".worker b")).to_have_text("scripted")
    tab.locator("#chat .retry").click()
    expect(tab.locator("article[data-state=answering]")).to_have_count(1)
    expect(answers(tab)).to_contain_text("and then")
    assert len(second.answerer.asked) == 1


def test_votes_are_written_only_where_they_are_collected(
    worker: Any, serve_page: Serve, tab: Page, tissue: Path, tmp_path: Path
) -> None:
    tab.goto(serve_page(worker.url))
    ask(tab, "hello", 1)
    expect(tab.locator("#chat .vote")).to_have_count(0)
    expect(tab.locator("#chat .collecting")).to_be_hidden()

    votes = tmp_path / "votes.jsonl"
    tab.goto(serve_page(worker.url, feedback=votes))
    expect(tab.locator("#chat .collecting")).to_contain_text("collects votes")
    open_image(tab, tissue)
    ask(tab, "Where is the gland?", 1)
    assert not votes.exists()
    tab.get_by_role("button", name="Good answer").click()
    expect(tab.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    assert json.loads(votes.read_text()) == {
        "vote": "up", "question": "Where is the gland?", "answer": "A gland. [0.10, 0.20, 0.40, 0.60]",
        "region": None, "model": "scripted",
    }


def test_where_it_looked(worker: Any, serve_page: Serve, tab: Page, tissue: Path) -> None:
    tab.goto(serve_page(worker.url))
    ask(tab, "hello", 1)
    expect(tab.locator("#chat .look")).to_have_count(0)  # nothing to look at
    open_image(tab, tissue)
    ask(tab, "Where is the gland?", 2)
    tab.get_by_role("button", name="Where did it look?").click()
    expect(tab.locator("#chat .looked img").first).to_be_visible()
    expect(tab.locator("#chat .looked p")).to_contain_text("less likely")
    width = tab.locator("#chat .looked img").first.evaluate("(image) => image.naturalWidth")
    assert width == 640
    assert serious(tab) == []


def test_accessible_in_every_state(
    worker: Any, serve_page: Serve, tab: Page, tissue: Path, other: Path, tmp_path: Path
) -> None:
    """axe-core, at the width of a desk and of a tablet; then the way of the keyboard."""
    tab.goto(serve_page(worker.url, examples=(tissue, other), feedback=tmp_path / "votes.jsonl"))
    expect(tab.locator(".worker")).to_contain_text("scripted ready")
    assert serious(tab) == []
    tab.evaluate("document.body.append(Object.assign(document.createElement('button'), { id: 'nameless' }))")
    assert len(serious(tab)) == 1  # it finds what it looks for
    tab.evaluate("document.getElementById('nameless').remove()")
    open_image(tab, tissue)
    ask(tab, "Where is the gland?", 1)
    open_image(tab, other, 2)
    regions = tmp_path / "regions.geojson"
    regions.write_text('[{"geometry": {"type": "Point", "coordinates": [60, 30]}, "properties": {"name": "Front"}}]')
    tab.set_input_files("#tray input[type=file]", regions)
    expect(tab.locator("#tray .list button")).to_have_count(1)
    tab.locator("#chat .edit").click()
    assert serious(tab) == []
    tab.keyboard.press("Escape")
    tab.set_viewport_size({"width": 820, "height": 1180})
    tab.click("#chat .menu summary")
    assert serious(tab) == []
    tab.keyboard.press("Escape")
    tab.fill("#question textarea", "divide by zero")
    tab.keyboard.press("Enter")
    expect(answers(tab).last).to_contain_text("Not answered.")
    expect(tab.get_by_text("Research only, not for diagnosis.").first).to_be_visible()
    expect(tab.locator("#chat [role=status]")).to_contain_text("Not answered.")
    assert serious(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")

    tab.set_viewport_size({"width": 1280, "height": 800})
    reached = set()
    tab.evaluate("document.activeElement.blur()")
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached |= set(tab.evaluate(
            "(n => [n.className, n.textContent.trim().slice(0, 20), n.getAttribute('aria-label'), n.tagName])"
            "(document.activeElement)"
        ))
        focus = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        inside = tab.evaluate("!!document.activeElement.closest('#chat, #tray, #composer')")
        assert focus != "none" or not inside, tab.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    assert {"Copy all", "New conversation", "Picture 1", "Ask", "Front", "example 1", "small retry"} <= reached
    assert any(str(name).startswith("A gland.") for name in reached)


def test_accessible_with_a_slide(
    worker: Any, serve_page: Serve, tab: Page, gigapixel: Any
) -> None:
    tab.goto(serve_page(worker.url, slides=[ShownSlide(Slide(gigapixel.path), 0)]))
    tab.click("#slides button")
    expect(tab.locator("#viewer .marks[data-ready=yes]")).to_be_attached()
    ask(tab, "Where is the gland?", 1)
    tab.focus("#viewer .deep .openseadragon-canvas")
    tab.keyboard.press("Enter")  # a region is being placed
    tab.click("#viewer .help summary")
    assert serious(tab) == []
    tab.set_viewport_size({"width": 820, "height": 1180})
    assert serious(tab) == []


def test_gradio_client_asks(worker: Any, serve_page: Serve, tissue: Path) -> None:
    client = Client(serve_page(worker.url), verbose=False)
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/ask"]
    uri = to_data_uri(Image.open(tissue).convert("RGB"))
    reply = client.predict(uri, "What is in this region?", [0.1, 0.2, 0.4, 0.6], api_name="/ask")
    assert reply == {
        "text": "The region [0.10, 0.20, 0.40, 0.60] holds a vessel.", "boxes": [[0.1, 0.2, 0.4, 0.6]],
        "model": "scripted", "note": "",
    }
    assert worker.answerer.asked[-1][0][0].size == (1200, 600)
    assert client.predict("", "Hello?", None, api_name="/ask")["text"].startswith("A gland.")
    for arguments, why in [
        (("/etc/passwd", "Hello?", None), "a picture comes as a data URI"),
        (("", "Hello?", [3, 4]), "box: expected"),
        (("", "divide by zero", None), "ZeroDivisionError"),
    ]:
        with pytest.raises(AppError, match=why):
            client.predict(*arguments, api_name="/ask")
