"""The commands of a conversation."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from llavactl.cli.chat import arguments
from llavactl.core.errors import LlavactlError

if TYPE_CHECKING:
    from llavactl.cli.chat.repl import Repl
    from llavactl.core.schema import Turn

log = logging.getLogger(__name__)

_COMMAND = re.compile(r"(/[A-Za-z]+!?)(?:\s+(.*))?", re.DOTALL)
_QUESTION_HINT = "to ask a question that starts with /, put a space before it"

KEYS = {
    "Alt-Enter, or \\ Enter": "start a new line",
    "Tab": "complete a command or the name of a file",
    "Up; Ctrl-R": "earlier questions; search them",
    "Ctrl-C": "stop the answer, or clear the line",
    "Ctrl-D": "exit",
}


class SlashCommand(NamedTuple):
    """A command: its argument and purpose in the help, and the function that carries it out."""

    argument: str
    text: str
    run: Callable[[Repl, str], None]


class QuitError(Exception):
    """The conversation ends."""


@dataclass(frozen=True)
class Parsed:
    """A line that is the command ``name`` with the argument ``rest``."""

    name: str
    rest: str


def parse(line: str) -> Parsed | None:
    """The command in ``line``; None for a question: a path, or a line that begins with a space.

    Raises:
        LlavactlError: an unknown command, or an argument of one that takes none.
    """
    match = _COMMAND.fullmatch(line.rstrip())
    if match is None:
        return None
    if match[1] not in COMMANDS:
        from llavactl.core.suggest import suggest

        hint = f"{suggest(match[1], COMMANDS)}; {_QUESTION_HINT}"
        raise LlavactlError(f"unknown command {match[1]}", hint=hint)
    if match[2] and not COMMANDS[match[1]].argument:
        raise LlavactlError(f"{match[1]} takes no argument", hint=_QUESTION_HINT)
    return Parsed(match[1], match[2] or "")


def _image(repl: Repl, rest: str) -> None:
    names = arguments.files(rest)
    if not names:
        raise LlavactlError("/image without a file", hint="/image FILE…; quote names with spaces")
    repl.add_images(names)


def _new(repl: Repl, _rest: str) -> None:
    repl.load(repl.new(repl.conversation.system or None))
    log.info("new conversation; /system and /set are kept")


def _undo(repl: Repl, _rest: str) -> None:
    if not repl.undo():
        raise LlavactlError("no question to remove")
    images = f"; images of the next question: {len(repl.pending)}" if repl.pending else ""
    log.info("removed the last question and its answer%s", images)


def _retry(repl: Repl, _rest: str) -> None:
    repl.retry()


def _edit(repl: Repl, rest: str) -> None:
    question = next((turn for turn in reversed(repl.conversation.turns) if turn.role == "user"), None)
    if question is None:
        raise LlavactlError("no question to edit")
    if rest:
        repl.edit(rest)
    elif repl.is_edited:
        repl.to_edit = _question_text(question)
    else:
        raise LlavactlError("/edit without a text needs a terminal", hint="/edit TEXT")


def _question_text(question: Turn) -> str:
    """The question as typed: text, and ``<image>`` tags unless all images precede it."""
    text = "".join(part if isinstance(part, str) else "<image>" for part in question.content)
    bare = re.sub(r"\A(<image>\n)+", "", text)
    return text if "<image>" in bare else bare


def _save(repl: Repl, rest: str, *, replace: bool = False) -> None:
    from llavactl.chat.transcript import save_turns

    file = arguments.file(rest)
    if not any(turn.role == "user" for turn in repl.conversation.turns):
        raise LlavactlError("nothing to save: no question yet")
    if file.is_dir():
        raise LlavactlError(f"{file} is a folder", hint="name a file in it")
    if (file.exists() or file.is_symlink()) and not replace:
        raise LlavactlError(f"{file} exists", hint="/save! FILE replaces it")
    save_turns(file, repl.conversation.turns, repl.conversation.assistant.name)
    log.info("saved to %s", file)


def _load(repl: Repl, rest: str) -> None:
    from llavactl.chat.transcript import load_turns

    file = arguments.file(rest)
    turns = load_turns(file)
    repl.load(repl.new(None, turns))
    questions, images = sum(turn.role == "user" for turn in turns), sum(len(turn.images) for turn in turns)
    log.info("loaded %s: questions: %d, images: %d", file, questions, images)


def _system(repl: Repl, rest: str) -> None:
    repl.conversation.system = rest
    log.info("system prompt %s", "replaced" if rest else "reset to the template's")


def _set(repl: Repl, rest: str) -> None:
    from llavactl.cli.chat.repl import print_lines

    name, _, value = rest.partition(" ")
    if not name:
        print_lines([f"{key} {value}" for key, value in asdict(repl.sampling).items()])
        return
    name = name.replace("-", "_")
    repl.set(name, _number(value.strip()))
    log.info("%s is %s", name, getattr(repl.sampling, name))


def _number(text: str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _help(_repl: Repl, _rest: str) -> None:
    from llavactl.cli.chat.repl import print_lines

    rows = {f"{name} {each.argument}".rstrip(): each.text for name, each in COMMANDS.items() if each.text} | KEYS
    width = max(map(len, rows))
    print_lines([f"{term:<{width}}  {text}" for term, text in rows.items()])


def _quit(_repl: Repl, _rest: str) -> None:
    raise QuitError


COMMANDS = {
    "/image": SlashCommand("FILE…", "add images to the next question; a URL is downloaded", _image),
    "/new": SlashCommand("", "start a new conversation", _new),
    "/undo": SlashCommand("", "remove the last question and its answer", _undo),
    "/retry": SlashCommand("", "answer the last question again", _retry),
    "/edit": SlashCommand("[TEXT]", "change the last question and answer it", _edit),
    "/save": SlashCommand("FILE", "save the conversation as JSON; /save! replaces a file", _save),
    "/save!": SlashCommand("FILE", "", lambda repl, rest: _save(repl, rest, replace=True)),
    "/load": SlashCommand("FILE", "continue a saved conversation", _load),
    "/system": SlashCommand("[TEXT]", "replace the system prompt; without TEXT, use the template's", _system),
    "/set": SlashCommand("[NAME VALUE]", "list or change sampling settings", _set),
    "/help": SlashCommand("", "show this help", _help),
    "/quit": SlashCommand("", "exit", _quit),
}
