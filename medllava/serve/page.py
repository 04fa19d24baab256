"""The page of the web chat, in Gradio: the viewer on the left, the conversation on the right.

:func:`lay_out` puts the components on the page; each ``bind_...`` then says what happens in one part of it. What the
page holds is in :mod:`medllava.serve.session`, how it is shown in :mod:`medllava.serve.screen`, who answers in
:mod:`medllava.serve.answering`. Gradio finds out what a handler takes from its annotations, so this module imports it
at the top; the command in :mod:`medllava.serve.web` imports this module only when it starts to serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from medllava.errors import DataError, ImageTooLarge, ServiceError
from medllava.geometry import parse_boxes
from medllava.jsonl import Appender
from medllava.regions import POINT_SIDE, mentions_region
from medllava.serve.answering import Choice, Workers
from medllava.serve.body_limit import BodyLimit
from medllava.serve.client import Worker
from medllava.serve.export import read_geojson, region_json
from medllava.serve.screen import chat_of, example_strip, head_of, saved_file, tray_of, viewer_of
from medllava.serve.session import Exchange, Looking, Session, Source, open_picture, region_of, view_of
from medllava.serve.tiles import ShownSlide, add_routes, slide_strip

STATUS_S = 2.0
"""How often an open page asks the workers how they are; with the time a worker may take, a change shows within 5 s."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""How every handler of the page is bound: no name in the API, no spinner over what it fills."""
PICK_NUMBER = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-number]");
  if (button) trigger("picked", { number: Number(button.dataset.number) });
});
"""
WITH_MARKED = "(session, text, marked, choice) => [session, text, window.medllavaMarked?.() ?? null, choice]"
"""Runs in the browser with each question: the region as it is seen at that moment."""
WITH_VIEW = """(session, text, marked, choice) => {
  const seen = window.medllavaMarked?.() ?? null;
  return [session, text, seen && { ...seen, box: null, point: null, path: null }, choice];
}"""
"""The same for an offered question that is about the whole image: what is still marked does not belong to it."""


@dataclass(frozen=True)
class Components:
    """What stands on the page, by place. ``shelf`` is there only with slides."""

    session: gr.State
    head: gr.HTML
    viewer: gr.HTML
    tray: gr.HTML
    shelf: gr.HTML | None
    strip: gr.HTML
    chat: gr.HTML
    chips: list[gr.Button]
    text: gr.Textbox
    ask: gr.Button
    stop: gr.Button


def build(
    workers: Sequence[Worker], examples: Sequence[Path], questions: Sequence[str], *, feedback: Path | None = None,
    slides: Sequence[ShownSlide] = (),
) -> gr.Blocks:
    """The page. ``workers``: at least one. ``examples``: picture files to choose from. ``questions``: to click.
    ``feedback``: file to append votes to; None offers no votes. ``slides``: whole slides to choose from."""
    crew = Workers(workers)
    with gr.Blocks(title="medllava", analytics_enabled=False, fill_width=True) as page:
        ui = lay_out(crew, examples, questions, slides, votes=feedback is not None)
        bind_questions(ui, crew)
        bind_pictures(ui, crew, examples, slides)
        bind_regions(ui)
        bind_answers(ui, crew, feedback)
        bind_state(page, ui, crew)
        bind_api(crew)
    return page


def lay_out(
    crew: Workers, examples: Sequence[Path], questions: Sequence[str], slides: Sequence[ShownSlide], *, votes: bool
) -> Components:
    """Put the components on the page that is open."""
    session = gr.State(Session())
    head = part("head", elem_id="head", value=str(crew.first()), choices=[], feedback=votes)
    with gr.Row(equal_height=False, elem_id="desk"):
        with gr.Column(scale=6, min_width=380):
            viewer = part(
                "viewer", value=None, elem_id="viewer", src="", size=[0, 0], picture=0, boxes=[],
                point_side=POINT_SIDE, tiles=None, mpp=None, power=None,
            )
            tray = part("tray", elem_id="tray", pictures=[], shown=None, regions=[])
            shelf = offer(slide_strip(slides), "slides") if slides else None
            strip = offer(example_strip(examples), "examples")
        with gr.Column(scale=5, min_width=360):
            chat = part("chat", elem_id="chat", exchanges=[], current=None, busy=False, pictures=0, feedback=votes)
            with gr.Row(elem_classes="questions", elem_id="questions"):
                chips = [gr.Button(question, size="sm", variant="secondary") for question in questions]
            with gr.Row(elem_id="composer"):
                text = gr.Textbox(
                    label="Question", container=False, placeholder="Ask about the image or region", lines=1,
                    max_lines=6, scale=6, elem_id="question",
                )
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
    return Components(session, head, viewer, tray, shelf, strip, chat, chips, text, ask, stop)


def part(name: str, **props: Any) -> gr.HTML:
    """One of the page's own components: NAME.html and NAME.js beside this file."""
    here = Path(__file__).parent
    return gr.HTML(
        html_template=(here / f"{name}.html").read_text(encoding="utf-8"),
        js_on_load=(here / f"{name}.js").read_text(encoding="utf-8"), apply_default_css=False, **props,
    )


def offer(html: str, name: str) -> gr.HTML:
    """A strip of pictures to choose from: its event ``picked`` tells the ``number`` of the button."""
    return gr.HTML(html, js_on_load=PICK_NUMBER, elem_id=name, apply_default_css=False)


# -- what handlers give back


def unchanged(count: int, why: str) -> tuple[Any, ...]:
    """Tell what is wrong in a note of its own, and leave the page as it is (gr.Error would blank it)."""
    gr.Warning(why)
    return (gr.skip(),) * count


def all_of(session: Session, **viewer: Any) -> tuple[Any, ...]:
    """Viewer, conversation and tray."""
    return viewer_of(session, **viewer), chat_of(session), tray_of(session)


# -- pictures


def bind_pictures(ui: Components, crew: Workers, examples: Sequence[Path], slides: Sequence[ShownSlide]) -> None:
    """Open a picture from a file, an example or a slide; go back to one that is open."""
    offered = "Choose one below." if slides else "Ask the operator to start this page with --slides FOLDER."

    def show_picture(session: Session, source: str | Path | Source, choice: str) -> tuple[Any, ...]:
        if session.answering or session.reading:
            return unchanged(3, "Still answering: wait for it or press Stop, then open another picture.")
        try:
            picture = open_picture(source) if isinstance(source, str | Path) else source
        except DataError as error:
            why = str(error).removeprefix("image data URI: ")
            hint = f". Of a slide: {offered}" if isinstance(error, ImageTooLarge) else ""
            return unchanged(3, f"This picture cannot be opened: {why}{hint}")
        session.open(picture)
        model = crew.model(Choice.parse(choice))
        if len(session.pictures) == 2 and model and model.single_exchange:
            gr.Info(
                f"{model.name} was trained on one question about one picture: it sees the picture that is shown and"
                " cannot compare it with another."
            )
        return all_of(session, value=None)

    def open_file(session: Session, choice: str, event: gr.EventData) -> tuple[Any, ...]:
        return show_picture(session, str(event.uri), choice)

    def too_large(event: gr.EventData) -> None:
        unchanged(0, f"{event.megabytes} MB is too much for a picture. Cut a field of view out. Of a slide: {offered}")

    def whole_slide() -> None:
        unchanged(0, f"Whole slides are not sent through the browser; they are read where they lie. {offered}")

    def open_example(session: Session, choice: str, event: gr.EventData) -> tuple[Any, ...]:
        number = int(event.number)
        if not 0 <= number < len(examples):
            return unchanged(3, f"There are {len(examples)} examples.")
        return show_picture(session, examples[number], choice)

    def open_slide(session: Session, choice: str, event: gr.EventData) -> tuple[Any, ...]:
        number = int(event.number)
        if not 0 <= number < len(slides):
            return unchanged(3, f"There are {len(slides)} slides.")
        return show_picture(session, slides[number], choice)

    opened = [ui.viewer, ui.chat, ui.tray]
    ui.viewer.opened(open_file, [ui.session, ui.head], opened, **PRIVATE)
    ui.viewer.too_large(too_large, None, None, **PRIVATE)
    ui.viewer.whole_slide(whole_slide, None, None, **PRIVATE)
    ui.strip.picked(open_example, [ui.session, ui.head], opened, **PRIVATE)
    if ui.shelf is not None:
        ui.shelf.picked(open_slide, [ui.session, ui.head], opened, **PRIVATE)
    ui.tray.shown(choose_picture, ui.session, opened, **PRIVATE)


def choose_picture(session: Session, event: gr.EventData) -> tuple[Any, ...]:
    try:
        session.show(int(event.number))
    except IndexError as error:
        return unchanged(3, f"This picture cannot be shown: {error}.")
    return all_of(session, value=None)


# -- regions from files


def bind_regions(ui: Components) -> None:
    """Load regions of the shown picture from a file, mark one of them, put them away."""
    ui.tray.loaded(load_regions, ui.session, [ui.viewer, ui.tray], **PRIVATE)
    ui.tray.refused(regions_too_large, None, None, **PRIVATE)
    ui.tray.removed(remove_regions, ui.session, [ui.viewer, ui.tray], **PRIVATE)
    ui.tray.chosen(choose_region, ui.session, ui.viewer, **PRIVATE)


def load_regions(session: Session, event: gr.EventData) -> tuple[Any, ...]:
    picture = session.picture()
    if picture is None or session.shown is None:
        return unchanged(2, "Open the picture first that the regions belong to.")
    try:
        session.loaded[session.shown] = read_geojson(str(event.text), picture.size)
    except DataError as error:
        return unchanged(2, f"These regions cannot be read: {error}")
    return viewer_of(session), tray_of(session)


def regions_too_large(event: gr.EventData) -> None:
    unchanged(0, f"{event.megabytes} MB is too much for a file of regions: export the annotations without cells.")


def remove_regions(session: Session) -> tuple[Any, ...]:
    if session.shown is not None:
        session.loaded.pop(session.shown, None)
    return viewer_of(session), tray_of(session)


def choose_region(session: Session, event: gr.EventData) -> Any:
    loaded = session.loaded.get(session.shown, []) if session.shown is not None else []
    number = int(event.number)
    if not 0 <= number < len(loaded):
        return unchanged(1, f"There are {len(loaded)} regions.")[0]
    return viewer_of(session, value={"picture": session.shown, "view": None, **region_json(loaded[number].region)})


# -- questions


def bind_questions(ui: Components, crew: Workers) -> None:
    """Ask, ask again, stop, take back, start anew."""

    async def stream(
        session: Session, exchange: Exchange, choice: str, put_back: str
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Viewer, conversation, tray and text field while the exchange is answered."""
        yield *all_of(session), ""
        async for _ in crew.reply(session, exchange, Choice.parse(choice)):
            yield gr.skip(), chat_of(session), gr.skip(), gr.skip()
        if exchange not in session.exchanges:
            return  # dropped meanwhile
        if exchange.picture == session.shown:
            session.drawn = exchange
        failed = exchange.state == "failed" and not exchange.answer
        yield viewer_of(session), chat_of(session), gr.skip(), put_back if failed and put_back else gr.skip()

    async def answer(session: Session, text: str, marked: Any, choice: str) -> AsyncIterator[tuple[Any, ...]]:
        if session.answering or session.reading:
            yield unchanged(4, "Still answering: wait for it or press Stop, then ask again.")
            return
        region = region_of(marked)
        if not text.strip() and region is None:
            yield unchanged(4, "Type a question, or mark a region and ask.")
            return
        if region is None and mentions_region(text) and not parse_boxes(text):
            yield unchanged(4, "Draw a box on the image or click a point first.")
            return
        session.reading = True
        try:
            # In a thread: a field of a slide takes a moment to read, in which the other pages would stand still.
            exchange = await asyncio.to_thread(session.ask, text, region, view_of(marked))
        except DataError:
            # Its text names the operator's file.
            yield unchanged(4, "The slide is damaged at this place and cannot be read. Move the view and ask again.")
            return
        finally:
            session.reading = False
        async for shown in stream(session, exchange, choice, text):
            yield shown

    async def retry(session: Session, choice: str) -> AsyncIterator[tuple[Any, ...]]:
        if session.answering or not session.exchanges:
            yield unchanged(4, "There is no answer to ask for again.")
            return
        async for shown in stream(session, session.again(len(session.exchanges) - 1), choice, ""):
            yield shown

    async def edit(session: Session, choice: str, event: gr.EventData) -> AsyncIterator[tuple[Any, ...]]:
        number, text = int(event.number), str(event.text)
        if not 0 <= number < len(session.exchanges):
            yield unchanged(4, "This question is gone.")
            return
        if not text.strip() and session.exchanges[number].region is None:
            yield unchanged(4, "Type a question.")
            return
        async for shown in stream(session, session.again(number, text), choice, ""):
            yield shown

    told = [ui.viewer, ui.chat, ui.tray, ui.text]
    running = [
        event(answer, [ui.session, asked, ui.viewer, ui.head], told, js=js, concurrency_limit=None, **PRIVATE)
        for event, asked, js in [
            (ui.text.submit, ui.text, WITH_MARKED), (ui.ask.click, ui.text, WITH_MARKED),
            *((chip.click, chip, WITH_MARKED if mentions_region(chip.value) else WITH_VIEW) for chip in ui.chips),
        ]
    ]
    running += [
        event(handler, [ui.session, ui.head], told, concurrency_limit=None, **PRIVATE)
        for event, handler in [(ui.chat.retry, retry), (ui.chat.edit, edit)]
    ]
    # First the end of the stream, then what the page says about it: together, a late piece may be shown last.
    ui.stop.click(None, cancels=running, **PRIVATE).then(stopped, ui.session, ui.chat, **PRIVATE)
    ui.chat.undo(undo, ui.session, told, cancels=running, **PRIVATE)
    ui.chat.restart(restart, ui.session, told, cancels=running, **PRIVATE)


def stopped(session: Session) -> Any:
    session.stop()
    return chat_of(session)


def undo(session: Session) -> tuple[Any, ...]:
    if not session.exchanges:
        return unchanged(4, "There is nothing to undo.")
    dropped = session.cut(len(session.exchanges) - 1)
    if session.shown is not None:
        session.show(session.shown)
    return *all_of(session), dropped.typed


def restart(session: Session) -> tuple[Any, ...]:
    session.forget()
    return *all_of(session, value=None), ""


# -- answers


def bind_answers(ui: Components, crew: Workers, feedback: Path | None) -> None:
    """What is done with an answer that is there: show its places, save it, ask what it depends on, vote."""

    async def look(session: Session, event: gr.EventData) -> AsyncIterator[Any]:
        number = int(event.number)
        if not 0 <= number < len(session.exchanges) or session.exchanges[number].waits():
            yield unchanged(1, "This answer is gone.")[0]
            return
        one = session.exchanges[number]
        before, one.looked = one.looked, Looking("Covering the image part by part…")
        yield chat_of(session)
        try:
            one.looked = await crew.looking(session, one)
        except (ServiceError, ValueError) as error:
            one.looked = before
            # ValueError: the exchange was dropped meanwhile.
            gr.Warning(str(error) if isinstance(error, ServiceError) else "This answer is gone.")
        yield chat_of(session)

    def vote(session: Session, event: gr.EventData) -> Any:
        number, given = int(event.number), str(event.vote)
        if feedback is None or given not in {"up", "down"} or not 0 <= number < len(session.exchanges):
            return gr.skip()
        one = session.exchanges[number]
        one.vote = "up" if given == "up" else "down"
        row = {
            "vote": given, "question": one.asked, "answer": one.answer,
            "region": None if one.region is None else region_json(one.region), "model": one.model,
        }
        try:
            with Appender(feedback) as file:
                file.write(row)
        except OSError as error:
            one.vote = None
            gr.Warning(f"The vote could not be written ({error.strerror}); tell the operator of this page.")
        return chat_of(session)

    ui.chat.place(show_place, ui.session, [ui.viewer, ui.chat, ui.tray], **PRIVATE)
    ui.chat.save(save, ui.session, ui.chat, **PRIVATE)
    ui.chat.vote(vote, ui.session, ui.chat, **PRIVATE)
    ui.chat.look(look, ui.session, ui.chat, concurrency_limit=None, **PRIVATE)


def show_place(session: Session, event: gr.EventData) -> tuple[Any, ...]:
    """A phrase of an earlier answer was clicked: draw its places, then flash the one."""
    number = int(event.number)
    if not 0 <= number < len(session.exchanges):
        return unchanged(3, "This answer is gone.")
    one = session.exchanges[number]
    if one.picture is not None and one.picture != session.shown:
        session.show(one.picture)
    session.drawn = one
    session.flashes += 1
    chat = chat_of(session, flash={"count": session.flashes, "index": int(event.index)})
    return viewer_of(session), chat, tray_of(session)


def save(session: Session, event: gr.EventData) -> Any:
    try:
        file = saved_file(session, str(event.kind), bool(event.pictures))
    except DataError as error:
        return unchanged(1, f"Nothing to save: {error}")[0]
    session.saves += 1
    return gr.HTML(download={"count": session.saves, **file})


# -- the workers' state, the end of a page, the API


def bind_state(page: gr.Blocks, ui: Components, crew: Workers) -> None:
    """Keep the line on top up to date; give a closed page's memory back."""

    async def refresh(choice: str) -> Any:
        await crew.refresh()
        return head_of(crew, crew.kept(Choice.parse(choice)))

    def leave(request: gr.Request) -> None:
        # Gradio would keep a closed page's state, pictures included, for an hour.
        page.state_holder.session_data.pop(request.session_hash, None)

    gr.Timer(STATUS_S).tick(refresh, ui.head, ui.head, queue=False, **PRIVATE)
    page.load(refresh, ui.head, ui.head, **PRIVATE)
    page.unload(leave)


def bind_api(crew: Workers) -> None:
    """One question without a page, for programs: the API's only name is ``ask``."""

    async def ask_api(image: str, question: str, box: list[float] | None = None) -> dict[str, Any]:
        """Ask one question about one picture.

        image: data URI such as "data:image/png;base64,...", or "" for none. question: text. box: x1, y1, x2, y2 in 0..1
        of the image, or null. Returns {"text", "boxes": [[x1, y1, x2, y2], ...], "model", "note"}.
        """
        alone = Session()
        try:
            if image:
                alone.open(open_picture(image))
            exchange = alone.ask(question, region_of({"box": box}))
        except DataError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if box is not None and exchange.region is None:
            why = "box: expected [x1, y1, x2, y2] in 0..1 of the image, with x1 < x2 and y1 < y2"
            raise gr.Error(why, print_exception=False)
        await crew.refresh()
        async for _ in crew.reply(alone, exchange, crew.kept(crew.first())):
            pass
        if exchange.state != "done":
            raise gr.Error(exchange.note, print_exception=False)
        boxes = [box.model_dump() for box in parse_boxes(exchange.answer)]
        return {"text": exchange.answer, "boxes": boxes, "model": exchange.model, "note": exchange.note}

    gr.api(ask_api, api_name="ask", concurrency_limit=None)


def launch(
    page: gr.Blocks, host: str, port: int, *, root_path: str = "", logins: list[tuple[str, str]] | None = None,
    slides: Sequence[ShownSlide] = (),
) -> None:
    """Serve the page in a thread: no share link, no analytics, no run history, no file uploads, no outside fonts, no
    request without an end."""
    fonts = ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="purple", secondary_hue="pink", neutral_hue="gray", font=fonts, font_mono=["monospace"]
    )
    here = Path(__file__).parent
    app, _, _ = page.launch(
        server_name=host, server_port=port, root_path=root_path or None, auth=logins, prevent_thread_lock=True,
        quiet=True, share=False, inbrowser=False, theme=theme,
        css="\n".join((here / name).read_text(encoding="utf-8") for name in ("web.css", "viewer.css", "chat.css")),
        footer_links=[], run_history=False,
        enable_monitoring=False, max_file_size=1, ssr_mode=False, pwa=False, mcp_server=False, show_error=True,
        app_kwargs={"middleware": [Middleware(BodyLimit)]},
    )
    add_routes(app, slides)
