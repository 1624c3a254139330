"""The page: its components, and which handler each event calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from .gallery import Filter, Gallery
from .handlers import EMPTY_MESSAGE, SETTINGS, Handlers, Updates
from .images import MAX_BYTES, MAX_IMAGES
from .sessions import Sessions
from .store import Outcome

MAX_FILE = 64 << 20
"""Bytes of an uploaded file; a conversation may contain many images."""
MAX_UPLOAD = MAX_IMAGES * MAX_BYTES + (1 << 20)
"""Bytes of one request."""

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
# The default themes load fonts from Google.
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

_ADDRESS = "(id) => { history.replaceState(null, '', id ? '?c=' + encodeURIComponent(id) : location.pathname) }"
"""A reload opens the same conversation. The argument is gradio's value of the component, never part of the code."""


def build(sessions: Sessions, gallery: Gallery | None) -> gr.Blocks:
    """The page of all tabs."""
    handlers = Handlers(sessions, gallery)
    parts: dict[str, Any] = {}
    with gr.Blocks(title="llavactl", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        _sidebar(parts)
        with gr.Tab("Chat"):
            _conversation(parts, sessions)
        if gallery is not None and gallery.tasks():
            with gr.Tab("Evaluation") as tab:
                _gallery(parts, gallery)
            _wire_gallery(tab, parts, handlers)
        _wire_answers(page, parts, handlers)
        _wire_conversations(page, parts, handlers)
        _wire_input(parts, handlers, sessions)
    page.queue(max_size=64)
    return page


def _html(**options: Any) -> gr.HTML:
    return gr.HTML(js_on_load=None, **options)


def _button(name: str, label: str, **options: Any) -> gr.Button:
    return gr.Button(label, size="sm", min_width=80, elem_id=name, **options)


def _sidebar(parts: dict[str, Any]) -> None:
    with gr.Sidebar(width=280):
        parts["new"] = gr.Button("New conversation", variant="primary")
        parts["list"] = gr.Radio(choices=[], label="Conversations", elem_id="conversations")
        parts["title"] = gr.Textbox(label="Title", max_length=80, elem_id="title")
        with gr.Row():
            parts["rename"] = gr.Button("Rename", size="sm")
            parts["delete"] = gr.Button("Delete", size="sm")
        parts["confirm"] = gr.Button("Delete this conversation", size="sm", variant="stop", visible=False)
        parts["upload"] = gr.UploadButton("Load a file", file_types=[".json"], size="sm")
        parts["export"] = _html(elem_id="export")


def _conversation(parts: dict[str, Any], sessions: Sessions) -> None:
    setup = sessions.setup
    with gr.Row(equal_height=True):
        for side in range(len(setup.models)):
            with gr.Column(elem_classes="chat"):
                # CSS reverses the order, so that the end stays visible.
                parts[f"maps{side}"] = _html(elem_id=f"maps{side}")
                parts[f"live{side}"] = _html(elem_id=f"live{side}", elem_classes="live")
                parts[f"history{side}"] = _html(elem_id=f"history{side}")
    if len(setup.models) > 1:
        with gr.Row(visible=False, elem_id="votes") as parts["votes"]:
            for outcome, label in zip(
                get_args(Outcome), ("A is better", "B is better", "Tie", "Both bad"), strict=True
            ):
                parts[f"vote {outcome}"] = gr.Button(label, size="sm")
    parts["message"] = gr.MultimodalTextbox(
        value=EMPTY_MESSAGE,
        file_types=["image"],
        file_count="multiple",
        placeholder="Ask a question; drop or paste images here",
        show_label=False,
        autofocus=True,
        max_plain_text_length=1_000_000,
        elem_id="message",
    )
    with gr.Row():
        parts["stop"] = _button("stop", "Stop", variant="stop", interactive=False)
        for name, label in (("retry", "Retry"), ("edit", "Edit last question"), ("undo", "Undo")):
            parts[name] = _button(name, label, interactive=False)
        parts["explain"] = _button("explain", "Explain", interactive=False)
    with gr.Accordion("Camera", open=False):
        parts["webcam"] = gr.Image(sources=["webcam"], type="filepath", show_label=False, height=260)
    if setup.allow_urls:
        with gr.Row():
            parts["url"] = gr.Textbox(label="Image URL", max_length=2000, scale=4, elem_id="url")
            parts["add_url"] = gr.Button("Add image", size="sm")
    _settings(parts, setup.models[0].assistant.sampling)
    if len(setup.models) > 1:
        with gr.Accordion("Votes", open=False):
            parts["wins"] = _html(elem_id="wins")
            _html(value='<a href="votes.jsonl" download>Export the votes</a>')
    parts["current"] = gr.Textbox(visible="hidden", elem_id="current")


def _settings(parts: dict[str, Any], defaults: Any) -> None:
    with gr.Accordion("Settings", open=False):
        parts["system"] = gr.Textbox(label="System prompt", placeholder="the model's", lines=2, elem_id="system")
        with gr.Row():
            parts["temperature"] = gr.Slider(
                0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: greedy decoding"
            )
            parts["top_p"] = gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p")
            parts["seed"] = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0)
            parts["max_new_tokens"] = gr.Number(
                defaults.max_new_tokens, label="Maximum tokens", precision=0, minimum=1, elem_id="max_new_tokens"
            )


def _gallery(parts: dict[str, Any], gallery: Gallery) -> None:
    tasks = gallery.tasks()
    with gr.Row():
        parts["task"] = gr.Dropdown(tasks, value=tasks[0], label="Task")
        parts["show"] = gr.Radio([*get_args(Filter)], value="all", label="Answers", elem_id="show")
        parts["page"] = gr.Number(1, label="Page", precision=0, minimum=1)
    parts["cases"] = _html(elem_id="cases")


def _named(parts: dict[str, Any], handler: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """``handler``, whose updates are by name, as gradio calls it, and the components that it may update."""

    def by_component(updates: Updates | None) -> dict[Any, Any]:
        found = {parts[name]: value for name, value in (updates or {}).items() if name in parts}
        # gradio takes an empty mapping for one value.
        return found or {parts["current"]: gr.skip()}

    if inspect.isgeneratorfunction(handler):

        def stream(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
            for updates in handler(request, *values):
                yield by_component(updates)

        return stream, [*parts.values()]

    def call(request: gr.Request, *values: Any) -> dict[Any, Any]:
        return by_component(handler(request, *values))

    return call, [*parts.values()]


def _on(
    parts: dict[str, Any], event: Any, handler: Callable[..., Any], inputs: Sequence[str] = (), **options: Any
) -> Any:
    function, outputs = _named(parts, handler)
    options = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"} | options
    return event(function, [parts[name] for name in inputs], outputs, **options)


def _wire_answers(page: gr.Blocks, parts: dict[str, Any], handlers: Handlers) -> None:
    timer: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": parts["live0"]}
    _on(parts, parts["message"].submit, handlers.ask, ["message", *SETTINGS], **timer)
    _on(parts, parts["retry"].click, handlers.retry, SETTINGS, **timer)
    _on(parts, parts["explain"].click, handlers.explain, **timer)
    _on(parts, parts["stop"].click, handlers.stop)
    page.unload(handlers.closed)


def _wire_conversations(page: gr.Blocks, parts: dict[str, Any], handlers: Handlers) -> None:
    _on(parts, page.load, handlers.load)
    for name in ("new", "undo", "edit"):
        _on(parts, parts[name].click, getattr(handlers, name))
    _on(parts, parts["list"].input, handlers.open, ["list"])
    _on(parts, parts["rename"].click, handlers.rename, ["title"])
    _on(parts, parts["title"].submit, handlers.rename, ["title"])
    _on(parts, parts["upload"].upload, handlers.upload, ["upload"])
    parts["delete"].click(lambda: gr.update(visible=True), None, parts["confirm"], api_visibility="private")
    _on(parts, parts["confirm"].click, handlers.delete)
    parts["confirm"].click(lambda: gr.update(visible=False), None, parts["confirm"], api_visibility="private")
    parts["current"].change(None, parts["current"], None, js=_ADDRESS, api_visibility="private")
    for outcome in get_args(Outcome):
        if (button := parts.get(f"vote {outcome}")) is not None:
            _on(parts, button.click, _voting(handlers, outcome))


def _voting(handlers: Handlers, outcome: Outcome) -> Callable[[gr.Request], Updates]:
    def vote(request: gr.Request) -> Updates:
        return handlers.vote(outcome, request)

    return vote


def _wire_input(parts: dict[str, Any], handlers: Handlers, sessions: Sessions) -> None:
    _on(parts, parts["webcam"].input, handlers.add_image, ["webcam", "message"])
    if sessions.setup.allow_urls:
        for event in (parts["add_url"].click, parts["url"].submit):
            _on(parts, event, handlers.add_url, ["url", "message"])


def _wire_gallery(tab: Any, parts: dict[str, Any], handlers: Handlers) -> None:
    def show(_request: gr.Request, *values: Any) -> Updates:
        return handlers.gallery_page(*values)

    for event in (tab.select, parts["task"].change, parts["show"].change, parts["page"].submit):
        _on(parts, event, show, ["task", "show", "page"])
