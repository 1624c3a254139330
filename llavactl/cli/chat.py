"""``llavactl chat``: chat with a model about images."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llavactl.cli import completion, output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options
from llavactl.core import stopping
from llavactl.core.errors import LlavactlError
from llavactl.core.paths import json_text
from llavactl.core.streams import real_stdout, result_stream

if TYPE_CHECKING:
    from llavactl.chat.conversation import Conversation
    from llavactl.core.schema import ImageRef
    from llavactl.model.generate import Sampling

COMMANDS = """\
/image FILE  add an image to the next question
/new         start a new conversation
/quit        exit
Ctrl-C       interrupt an answer"""


@click.command(
    cls=Command,
    examples=[
        "llavactl chat --image photo.jpg",
        'llavactl chat --image photo.jpg --prompt "What is in this image?"',
        "llavactl chat --model llava-hf/llava-1.5-7b-hf --batch prompts.jsonl --json",
    ],
)
@recipe_options
@click.option(
    "--model",
    metavar="DIR|ID",
    shell_complete=completion.file_names,
    help="Use this model instead of the recipe's; a recipe is then optional.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE|URL",
    shell_complete=completion.file_names,
    help="Add an image to the question (repeatable).",
)
@click.option("--prompt", metavar="TEXT", help="Answer this prompt and exit.  [default: start a conversation]")
@click.option(
    "--batch",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='Answer the prompts in a JSONL file: {"image": …, "prompt": …}.',
)
@click.option(
    "--template",
    metavar="NAME",
    shell_complete=completion.names_of("templates"),
    help="Override the model's conversation template.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Generate at most N tokens per answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="Sample with temperature T; 0: greedy decoding.",
)
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
    """Chat with a model about images.

    By default, the model is the recipe's newest one: that of a stage in training, if it has previews, or else that of
    the last finished stage.
    """
    if batch is not None and (prompt is not None or images):
        raise click.UsageError("--batch can't be combined with --prompt or --image")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty")
    if as_json and batch is None and prompt is None:
        raise click.UsageError("--json requires --prompt or --batch")
    recipe = load_outline_if_given(source, overrides) if model is not None else load_outline(source, overrides)
    from llavactl.chat.inputs import open_image, read_batch
    from llavactl.model.generate import Sampling
    from llavactl.verbs import chat

    # Report unreadable files before loading the model.
    opened = [open_image(name) for name in images]
    records = [] if batch is None else read_batch(batch)
    conversation = chat.open_chat(recipe, model, template)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    if batch is not None:
        _print_batch(chat.answer_batch(conversation.assistant, records, sampling), as_json)
    elif prompt is None:
        _converse(conversation, [*opened], sampling)
    elif as_json:
        output.document(replace(chat.answer_prompt(conversation, prompt, opened, sampling), images=images))
    else:
        _stream(conversation, prompt, opened, sampling)


def _print_batch(answers: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        output.document(answers)
        return
    for answer in answers:
        output.line(json_text(answer))


def _stream(conversation: Conversation, prompt: str, images: Sequence[str | ImageRef], sampling: Sampling) -> None:
    from llavactl.chat.inputs import user_content

    for piece in conversation.ask(*user_content(prompt, images), sampling=sampling):
        output.text(piece)
    output.line()


def _converse(conversation: Conversation, images: list[str | ImageRef], sampling: Sampling) -> None:
    """Answers questions from stdin until end of file or /quit."""
    from llavactl.chat.conversation import Conversation

    click.echo(COMMANDS, err=True)
    for line in _lines():
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            conversation, images = Conversation(conversation.assistant), []
        elif word == "/image" and rest.strip():
            images.append(_unquoted(rest.strip()))
        elif word.startswith("/"):
            click.echo(f"unknown or incomplete command {word}\n{COMMANDS}", err=True)
        elif line:
            _answer(conversation, line, images, sampling)
            images = []


def _unquoted(name: str) -> str:
    """``name`` without the quotes that terminals add around a dropped file."""
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "'\""
    return name[1:-1] if quoted else name


def _answer(conversation: Conversation, line: str, images: Sequence[str | ImageRef], sampling: Sampling) -> None:
    """Streams the answer to one turn; an error or Ctrl-C ends the turn, but not the conversation."""
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
    prompt = "> " if sys.stdin.isatty() and result_stream().isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            with real_stdout():
                line = input(prompt).strip()
            yield line
