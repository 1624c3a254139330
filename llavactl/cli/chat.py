"""``llavactl chat``: talk with a model about images."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options
from llavactl.core import stopping
from llavactl.core.errors import LlavactlError
from llavactl.core.paths import json_text
from llavactl.core.streams import restored, results

if TYPE_CHECKING:
    from llavactl.chat.conversation import Conversation
    from llavactl.core.schema import ImageRef
    from llavactl.model.generate import Sampling

HELP = "/image FILE adds an image to the next question; /new starts over; /quit ends; Ctrl-C stops an answer"


@click.command()
@recipe_options
@click.option("--model", metavar="DIR|ID", help="A model instead of the recipe's; no recipe is needed then.")
@click.option("--image", "images", multiple=True, metavar="FILE|URL", help="Show an image (repeatable).")
@click.option("--prompt", metavar="TEXT", help="Ask this and end; without it or --batch, a conversation begins.")
@click.option(
    "--batch", metavar="FILE", type=click.Path(path_type=Path), help='Answer a JSONL of {"image": …, "prompt": …}.'
)
@click.option("--template", metavar="NAME", help="How the conversation is written, for a model that doesn't say.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest.")
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    images: tuple[str, ...],
    prompt: str | None,
    batch: Path | None,
    template: str | None,
    max_new_tokens: int,
    temperature: float,
    as_json: bool,
) -> None:
    """Talk with the recipe's last finished stage, or with --model, about images."""
    if batch is not None and (prompt is not None or images):
        raise click.UsageError("--batch brings its own images and prompts")
    if as_json and batch is None and prompt is None:
        raise click.UsageError("--json needs --prompt or --batch: a conversation is no document")
    recipe = load_outline_if_given(source, overrides) if model is not None else load_outline(source, overrides)
    from llavactl.model.generate import Sampling
    from llavactl.verbs import chat

    # Report a wrong file before loading the model.
    shown = chat.open_images(images)
    records = [] if batch is None else chat.read_batch(batch)
    conversation = chat.open_chat(recipe, model, template)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    if batch is not None:
        _print_batch(chat.answer_batch(conversation.assistant, records, sampling), as_json)
    elif prompt is None:
        _converse(conversation, [*shown], sampling)
    elif as_json:
        output.document(replace(chat.say(conversation, prompt, shown, sampling), images=images))
    else:
        _stream(conversation, prompt, shown, sampling)


def _print_batch(answers: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        output.document(answers)
        return
    for answer in answers:
        output.line(json_text(answer))


def _stream(conversation: Conversation, prompt: str, images: Sequence[str | ImageRef], sampling: Sampling) -> None:
    from llavactl.verbs.chat import content

    for piece in conversation.ask(*content(prompt, images), sampling=sampling):
        output.text(piece)
    output.line()


def _converse(conversation: Conversation, images: list[str | ImageRef], sampling: Sampling) -> None:
    """Questions from stdin until it ends."""
    from llavactl.chat.conversation import Conversation

    click.echo(HELP, err=True)
    for line in _lines():
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            conversation, images = Conversation(conversation.assistant), []
        elif word == "/image" and rest.strip():
            images.append(_unquoted(rest.strip()))
        elif word.startswith("/"):
            click.echo(HELP, err=True)
        elif line:
            _answer(conversation, line, images, sampling)
            images = []


def _unquoted(name: str) -> str:
    """``name`` without the quotes with which terminals insert a dropped file."""
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "'\""
    return name[1:-1] if quoted else name


def _answer(conversation: Conversation, line: str, images: Sequence[str | ImageRef], sampling: Sampling) -> None:
    """One turn; what is wrong with it, or Ctrl-C, ends the turn and not the conversation."""
    try:
        _stream(conversation, line, images, sampling)
    except LlavactlError as error:
        click.echo(f"error: {error.message}", err=True)
    except KeyboardInterrupt:
        if stopping.terminated():
            raise
        click.echo(" …", err=True)


def _lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and arrow keys
    prompt = "> " if sys.stdin.isatty() and results().isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            with restored():
                line = input(prompt).strip()
            yield line
