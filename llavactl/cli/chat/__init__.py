"""``llavactl chat``: chat with a model about images."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from llavactl.cli import completion, output
from llavactl.cli.chat.browser import chat_in_browser
from llavactl.cli.chat.maps import print_maps
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options
from llavactl.core.errors import DataError

if TYPE_CHECKING:
    from llavactl.chat.conversation import Conversation
    from llavactl.chat.loading import Dtype
    from llavactl.core.schema import ImageRef
    from llavactl.model.generate import Sampling
    from llavactl.model.quantized import Bits

log = logging.getLogger(__name__)


@click.command(
    cls=Command,
    examples=[
        "llavactl chat --image photo.jpg",
        'llavactl chat --image photo.jpg --prompt "What is in this image?"',
        "llavactl chat --model llava-hf/llava-1.5-7b-hf --batch prompts.jsonl --json",
        "llavactl chat --temperature 0.7 --seed 1 --save-code pages/",
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
@click.option(
    "--prompt",
    metavar="TEXT|-",
    help="Answer this prompt, or all of stdin (-), and exit.  [default: start a conversation]",
)
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
@click.option("--system", metavar="TEXT", help="Replace the template's system prompt.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Generate at most N tokens per answer.  [default: 512]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="T",
    help="Sample with temperature T; 0: greedy decoding.  [default: the model's generation config]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    metavar="P",
    help="Sample from the most likely tokens of total probability P.  [default: the model's generation config]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    help="Seed of the first answer; it increases by 1 with each answer.  [default: 0]",
)
@click.option(
    "--save-code",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Save each code block of the answers to its own file in DIR.",
)
@click.option("--force", is_flag=True, help="Replace existing files in the folder of --save-code.")
@click.option(
    "--explain",
    is_flag=True,
    help="Show which parts of the image the words of each answer depend on; takes several times as long.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Load the weights in this dtype.  [default: as trained]",
)
@click.option(
    "--quantize",
    type=click.Choice(["4", "8"]),
    metavar="BITS",
    help="Load the language model's linear layers in 4 or 8 bits (bitsandbytes).",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile decoding, with CUDA graphs on a GPU; the first answer waits for the compiler.",
)
@click.option("--web", "web", is_flag=True, help="Chat in the browser instead (plugin llavactl-web).")
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    source: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    images: tuple[str, ...],
    prompt: str | None,
    batch: Path | None,
    template: str | None,
    system: str | None,
    save_code: Path | None,
    force: bool,
    explain: bool,
    dtype: Dtype | None,
    quantize: Literal["4", "8"] | None,
    compiled: bool,
    web: bool,
    as_json: bool,
    **sampling: float | None,
) -> None:
    """Chat with a model about images.

    The default model is the recipe's newest: the latest preview of a stage in training, otherwise the model of the last
    finished stage.
    """
    if web:
        chat_in_browser(context)
        return
    if batch is not None and (prompt is not None or images):
        raise click.UsageError("--batch can't be combined with --prompt or --image")
    if batch is not None and (explain or compiled):
        raise click.UsageError("--batch can't be combined with --explain or --compile")
    if compiled and quantize:
        raise click.UsageError("--compile can't be combined with --quantize")
    if as_json and batch is None and prompt is None:
        raise click.UsageError("--json requires --prompt or --batch")
    if force and save_code is None:
        raise click.UsageError("--force requires --save-code")
    if explain and prompt is not None and not images:
        raise DataError("nothing to explain: no image", hint="add --image FILE")
    from llavactl.cli.chat import line_input

    prompt = line_input.piped_text() if prompt == "-" else prompt
    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty")
    recipe = load_outline_if_given(source, overrides) if model is not None else load_outline(source, overrides)
    from llavactl.chat.inputs import open_image, read_batch
    from llavactl.chat.sampling import changed
    from llavactl.model.generate import GREEDY
    from llavactl.verbs import chat

    # Report unreadable files and invalid options before loading the model.
    given = {name: value for name, value in sampling.items() if value is not None}
    changed(GREEDY, given)
    opened = [open_image(name) for name in images]
    records = [] if batch is None else read_batch(batch)
    bits: Bits | None = {"4": 4, "8": 8}[quantize] if quantize else None  # type: ignore[assignment]
    conversation = chat.open_chat(recipe, model, template, dtype=dtype, quantize=bits, compiled=compiled)
    conversation.system = system or ""
    chosen = changed(conversation.assistant.sampling, given)
    save = _saver(save_code, overwrite=force)
    if batch is not None:
        answers = chat.answer_batch(conversation.assistant, records, chosen, system=conversation.system)
        _print_batch(answers, as_json)
        save(*(str(answer["answer"]) for answer in answers))
    elif prompt is None:
        _converse(conversation, opened, chosen, save, explain=explain)
    elif as_json:
        report = chat.answer_prompt(conversation, prompt, opened, chosen)
        save(report.answer)
        maps = {"explanation": chat.explanation(conversation)} if explain else {}
        output.document({**asdict(replace(report, images=images)), **maps})
    else:
        save(_stream(conversation, prompt, opened, chosen))
        if explain:
            print_maps(conversation)


def _print_batch(answers: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        output.document(answers)
        return
    for answer in answers:
        output.print_json(answer)


def _stream(conversation: Conversation, prompt: str, images: Sequence[ImageRef], sampling: Sampling) -> str:
    from llavactl.chat.inputs import user_content
    from llavactl.cli.chat.answers import print_answer

    answer = conversation.ask(*user_content(prompt, images), sampling=sampling)
    print_answer(answer)
    return answer.text


def _saver(folder: Path | None, *, overwrite: bool) -> Callable[..., None]:
    """A function that saves the code of answers to ``folder``; None: that does nothing."""
    if folder is None:
        return lambda *_answers: None
    from llavactl.cli.chat.saved_code import save_code_of

    return functools.partial(save_code_of, folder=folder, overwrite=overwrite)


def _converse(
    conversation: Conversation,
    images: Sequence[ImageRef],
    sampling: Sampling,
    save_code: Callable[[str], None],
    *,
    explain: bool,
) -> None:
    """Answers questions from stdin until its end or /quit."""
    from llavactl.chat.conversation import Conversation
    from llavactl.cli.chat.line_input import reader
    from llavactl.cli.chat.repl import Repl, described
    from llavactl.cli.chat.slash_commands import COMMANDS

    arguments = {name: bool(each.argument) for name, each in COMMANDS.items()}
    read, is_edited = reader(arguments, [*asdict(sampling)])
    assistant = conversation.assistant
    repl = Repl(
        conversation,
        lambda system, turns=(): Conversation(assistant, system, turns),
        sampling,
        save_code=save_code,
        explain=explain,
        is_edited=is_edited,
    )
    repl.pending = [conversation.open_image(image) for image in images]
    shown = [f"image {described(conversation, image)}" for image in repl.pending]
    log.info("%s", "; ".join([f"model {assistant.name}", *shown, "/help for commands"]))
    repl.run(read)
