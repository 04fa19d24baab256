"""The page of the web chat, in Gradio: the viewer on the left, the conversation on the right.

Gradio finds out what a handler takes from its annotations, so this module imports it at the top; the command in
:mod:`medllava.serve.web` imports this module only when it starts to serve.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from medllava.errors import DataError, ServiceError
from medllava.geometry import Box, format_box, parse_boxes
from medllava.images import BOX_COLOURS, draw_boxes, load_image, to_data_uri
from medllava.regions import POINT_SIDE, mentions_region
from medllava.serve.client import Worker, WorkerState
from medllava.serve.session import Picture, Session, open_picture, region_of, view_of

PREVIEW_SIDE = 900
THUMBNAIL_HEIGHT = 124
STATUS_S = 3.0
"""How often an open page asks the workers how they are."""


# -- what the page shows


def header(states: Sequence[WorkerState], chosen: str) -> str:
    """The line on top: name, caution, and how the chosen worker is."""
    state = next((state for state in states if state.url == chosen), states[0])
    model = f"<b>{html.escape(state.model)}</b> " if state.model else ""
    return (
        '<div class="head"><span class="name">med<i>llava</i></span>'
        '<span class="caution">Research only, not for diagnosis. Nothing you open or ask is stored.</span>'
        f'<span class="worker"><span class="dot {state.status}"></span><span>{model}{html.escape(state.detail)}</span>'
        "</span></div>"
    )


def messages(session: Session) -> list[dict[str, str]]:
    """The conversation as Gradio's chatbot takes it."""
    notes = {"stopped": "*(stopped)*", "done": "*(an empty answer)*", "answering": "…"}
    shown = []
    for one in session.exchanges:
        said = one.answer if one.state in {"done", "answering"} and one.answer else (
            f"{one.answer}\n\n**Not answered.** {one.note}" if one.state == "failed"
            else f"{one.answer} {notes[one.state]}"
        )
        shown += [{"role": "user", "content": one.asked}, {"role": "assistant", "content": said.strip()}]
    return shown


def drawn_answer(picture: Picture, boxes: Sequence[Box]) -> str:
    """The boxes of the answer: drawn on the picture, listed, and to download. Empty without boxes."""
    if not boxes:
        return ""
    drawn = draw_boxes(picture.image, boxes, [str(number) for number in range(1, len(boxes) + 1)])
    full = io.BytesIO()
    drawn.save(full, "JPEG", quality=92)
    preview = drawn.copy()
    preview.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
    items = "".join(
        f'<li><b style="background:{BOX_COLOURS[n % len(BOX_COLOURS)]}">{n + 1}</b>{format_box(box)}</li>'
        for n, box in enumerate(boxes)
    )
    width, height = picture.image.size
    return (
        f'<div class="drawn"><img alt="the answer\'s boxes drawn on the image" src="{to_data_uri(preview, "JPEG")}">'
        f"<div><h4>In the answer</h4><ol>{items}</ol>"
        "<p>x1, y1, x2, y2 in 0..1 of the original image"
        f" ({width} &times; {height} px), origin top left.</p>"
        f'<a download="answer.jpg" href="data:image/jpeg;base64,{base64.b64encode(full.getvalue()).decode()}">'
        "Save this picture</a></div></div>"
    )


def example_strip(pictures: Sequence[Path]) -> str:
    """Small copies of the example pictures as buttons."""
    buttons = []
    for number, path in enumerate(pictures):
        small = load_image(path)
        small.thumbnail((THUMBNAIL_HEIGHT * 2, THUMBNAIL_HEIGHT), Image.Resampling.LANCZOS)
        buttons.append(
            f'<button type="button" data-number="{number}" aria-label="example {number + 1}">'
            f'<img alt="" src="{to_data_uri(small, "JPEG")}"></button>'
        )
    return f'<div class="examples"><span>Examples</span>{"".join(buttons)}</div>' if buttons else ""


PICK_EXAMPLE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-number]");
  if (button) trigger("picked", { number: Number(button.dataset.number) });
});
"""


def build(workers: Sequence[Worker], examples: Sequence[Path], questions: Sequence[str]) -> gr.Blocks:
    """The page. ``workers``: at least one. ``examples``: picture files to choose from. ``questions``: to click."""
    here = Path(__file__).parent
    by_url = {worker.url: worker for worker in workers}
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    async def all_states() -> list[WorkerState]:
        return list(await asyncio.gather(*(worker.state() for worker in workers)))

    def unchanged(count: int, why: str) -> tuple[Any, ...]:
        """Tell what is wrong in a note of its own, and leave the page as it is (gr.Error would blank it)."""
        gr.Warning(why)
        return (gr.skip(),) * count

    def show_picture(session: Session, source: str | Path) -> tuple[Any, ...]:
        try:
            picture = open_picture(source)
        except DataError as error:
            why = str(error).removeprefix("image data URI: ")
            return unchanged(4, f"This picture cannot be opened: {why}")
        session.forget()
        session.open(picture)
        viewer = gr.HTML(value=None, src=picture.uri, size=list(picture.image.size), boxes=[])
        return session, viewer, messages(session), ""

    def open_file(session: Session, event: gr.EventData) -> tuple[Any, ...]:
        return show_picture(session, str(event.uri))

    def too_large(event: gr.EventData) -> None:
        why = f"{event.megabytes} MB is too much for one picture. Cut a field of view out of the slide and open that."
        unchanged(0, why)

    def open_example(session: Session, event: gr.EventData) -> tuple[Any, ...]:
        number = int(event.number)
        if not 0 <= number < len(examples):
            return unchanged(4, f"There are {len(examples)} examples.")
        return show_picture(session, examples[number])

    async def answer(session: Session, text: str, marked: Any, url: str) -> AsyncIterator[tuple[Any, ...]]:
        """Streams: the messages, the viewer, the drawn answer, the text field."""
        if session.answering:
            yield unchanged(4, "Still answering: wait for it or press Stop, then ask again.")
            return
        region = region_of(marked)
        if not text.strip() and region is None:
            yield unchanged(4, "Type a question, or mark a region and ask.")
            return
        if region is None and mentions_region(text) and not parse_boxes(text):
            yield unchanged(4, "Draw a box on the image or click a point first.")
            return
        exchange = session.ask(text, region, view_of(marked))
        picture = session.picture()
        yield messages(session), gr.HTML(boxes=[]), "", ""
        turns, pictures = session.prompt(exchange)
        pieces = by_url[url].ask(turns, pictures)
        try:
            async with contextlib.aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    if exchange.state != "answering":
                        return  # stopped meanwhile; the page says so, and a late piece must not write over it
                    exchange.answer += piece
                    yield messages(session), gr.skip(), gr.skip(), gr.skip()
        except ServiceError as error:
            exchange.state, exchange.note = "failed", str(error)
            yield messages(session), gr.skip(), gr.skip(), text
            return
        exchange.state = "done"
        boxes = [place.box for place in exchange.places()]
        # In a thread: on a large picture this takes a second, in which the other pages would stand still.
        drawn = await asyncio.to_thread(drawn_answer, picture, boxes) if isinstance(picture, Picture) else ""
        yield messages(session), gr.HTML(boxes=[list(box.as_tuple()) for box in boxes]), drawn, gr.skip()

    def stopped(session: Session) -> list[dict[str, str]]:
        session.stop()
        return messages(session)

    def clear(session: Session) -> tuple[Any, ...]:
        session.exchanges = []
        return session, messages(session), gr.HTML(value=None, boxes=[]), "", ""

    def leave(request: gr.Request) -> None:
        # Gradio would keep a closed page's state, picture included, for an hour.
        page.state_holder.session_data.pop(request.session_hash, None)

    async def refresh(url: str) -> tuple[Any, ...]:
        states = await all_states()
        alive = [state for state in states if state.status != "unreachable"] or states
        chosen = url if any(state.url == url for state in alive) else alive[0].url
        choices = [(f"{state.model or state.detail} ({state.url})", state.url) for state in alive]
        return header(states, chosen), gr.Dropdown(choices=choices, value=chosen)

    with gr.Blocks(title="medllava", analytics_enabled=False, fill_width=True) as page:
        session = gr.State(Session())
        head = gr.HTML('<div class="head"><span class="name">med<i>llava</i></span></div>')
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=420):
                viewer = gr.HTML(
                    value=None, html_template=(here / "viewer.html").read_text(encoding="utf-8"),
                    js_on_load=(here / "viewer.js").read_text(encoding="utf-8"), apply_default_css=False,
                    elem_id="viewer", src="", size=[0, 0], boxes=[], colours=list(BOX_COLOURS), point_side=POINT_SIDE,
                )
                strip = gr.HTML(
                    example_strip(examples), js_on_load=PICK_EXAMPLE, elem_id="examples", apply_default_css=False
                )
            with gr.Column(scale=5, min_width=360):
                choice = gr.Dropdown(
                    [worker.url for worker in workers], value=workers[0].url, label="Model", visible=len(workers) > 1,
                    elem_id="model",
                )
                chat = gr.Chatbot(
                    show_label=False, height="calc(100vh - 410px)", min_height=260, elem_id="chat",
                    buttons=["copy_all"], feedback_options=None, latex_delimiters=[], allow_file_downloads=False,
                    layout="bubble",
                    placeholder="**Open an image, draw a box on it or click a point, and ask.**<br>"
                    "Boxes in the answer are drawn on the image.",
                )
                with gr.Row(elem_classes="questions", elem_id="questions"):
                    chips = [gr.Button(question, size="sm", variant="secondary") for question in questions]
                with gr.Row():
                    text = gr.Textbox(
                        show_label=False, container=False, placeholder="Ask about the image or region",
                        lines=1, max_lines=6, scale=6, elem_id="question", autofocus=True,
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
                    new = gr.Button("Clear", scale=1, min_width=80, elem_id="clear")
                drawn = gr.HTML("", elem_id="drawn", apply_default_css=False)

        opened = [session, viewer, chat, drawn]
        told = [chat, viewer, drawn, text]
        running = [
            event(answer, [session, asked, viewer, choice], told, concurrency_limit=None, **private)
            for event, asked in [(text.submit, text), (ask.click, text), *((chip.click, chip) for chip in chips)]
        ]
        viewer.opened(open_file, session, opened, cancels=running, **private)
        viewer.too_large(too_large, None, None, **private)
        strip.picked(open_example, session, opened, cancels=running, **private)
        # First the end of the stream, then what the page says about it: together, a late piece may be shown last.
        stop.click(None, cancels=running, **private).then(stopped, session, chat, **private)
        for event in (new.click, chat.clear):
            event(clear, session, [session, chat, viewer, drawn, text], cancels=running, **private)
        gr.Timer(STATUS_S).tick(refresh, choice, [head, choice], queue=False, **private)
        page.load(refresh, choice, [head, choice], **private)
        page.unload(leave)
    return page


def launch(
    page: gr.Blocks, host: str, port: int, *, root_path: str = "", logins: list[tuple[str, str]] | None = None
) -> None:
    """Serve the page in a thread: no share link, no analytics, no run history, no file uploads, no outside fonts."""
    fonts = ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="purple", secondary_hue="pink", neutral_hue="gray", font=fonts, font_mono=["monospace"]
    )
    page.launch(
        server_name=host, server_port=port, root_path=root_path or None, auth=logins, prevent_thread_lock=True,
        quiet=True, share=False, inbrowser=False, theme=theme,
        css=(Path(__file__).parent / "web.css").read_text(encoding="utf-8"), footer_links=[], run_history=False,
        enable_monitoring=False, max_file_size=1, ssr_mode=False, pwa=False, mcp_server=False, show_error=True,
    )
