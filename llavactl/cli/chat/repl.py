"""The conversation on a terminal, or over a pipe: questions, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from llavactl.cli import boundary
from llavactl.cli.chat import arguments
from llavactl.cli.chat.answers import no_echo, print_answer
from llavactl.cli.chat.maps import print_maps
from llavactl.cli.chat.slash_commands import COMMANDS, QuitError, parse
from llavactl.core import stopping
from llavactl.core.errors import LlavactlError

if TYPE_CHECKING:
    from llavactl.chat.conversation import AnswerStream, Conversation
    from llavactl.core.schema import ImageRef
    from llavactl.model.generate import Sampling

log = logging.getLogger(__name__)


class Repl:
    """A conversation with its settings, and the images of the next question (``pending``).

    ``new`` starts a conversation with a system prompt and turns.
    """

    def __init__(
        self,
        conversation: Conversation,
        new: Callable[..., Conversation],
        sampling: Sampling,
        *,
        save_code: Callable[[str], None] = lambda _answer: None,
        explain: bool = False,
        is_edited: bool = False,
    ) -> None:
        self.conversation, self.new, self.sampling = conversation, new, sampling
        self.is_edited = is_edited
        """Whether a question can be edited at the prompt."""
        self.pending: list[ImageRef] = []
        self.to_edit = ""
        self._save_code, self._explain = save_code, explain
        self._answers = 0
        self._last: Sampling | None = None
        """The settings of the last answer with seed 0; None if it is incomplete."""

    def run(self, read: Callable[[str], str | None]) -> None:
        """Answers until the end of the input or /quit; errors and Ctrl-C end a question, not the conversation."""
        interrupts = stopping.Interrupts()
        with interrupts.handled(), no_echo() if self.is_edited else contextlib.nullcontext():
            while True:
                try:
                    interrupts.arm()
                    line = read(self.to_edit)
                    if line is None or not self._handled(line):
                        return
                except KeyboardInterrupt:
                    if stopping.terminated():
                        raise
                    self.to_edit = ""

    def _handled(self, line: str) -> bool:
        """Handles ``line`` and reports an error in it; False if the conversation ends."""
        try:
            self.handle(line)
        except QuitError:
            return False
        except Exception as error:
            if boundary.explained(error) is None:
                raise
            boundary.report(error)
        return True

    def handle(self, line: str) -> None:
        """Answers the question, or carries out the command, in ``line``.

        Raises:
            QuitError: /quit.
        """
        edited, self.to_edit = bool(self.to_edit), ""
        if command := parse(line):
            COMMANDS[command.name].run(self, command.rest)
        elif names := arguments.dropped_images(line) or arguments.missing_images(line):
            self.add_images(names)
        elif line.strip():
            self.edit(line.strip()) if edited else self.ask(line.strip())

    def ask(self, text: str) -> None:
        """Answers the question ``text`` about the pending images, which stay pending if it fails."""
        from llavactl.chat.inputs import user_content

        content = user_content(text, self.pending)
        self._answer(lambda sampling: self.conversation.ask(*content, sampling=sampling))

    def edit(self, text: str) -> None:
        """Replaces the text of the last question, keeps its images, and answers it."""
        before, left_out, pending = list(self.conversation.turns), self.conversation.left_out, self.pending
        self.undo()
        try:
            self.ask(text)
        finally:
            if len(self.conversation.turns) < len(before):  # there is no new answer
                self.conversation.turns[:], self.conversation.left_out = before, left_out
                self.pending = pending

    def set(self, name: str, value: object) -> None:
        """Changes a setting of the next answers.

        Raises:
            RecipeError: an unknown setting, or an invalid value.
        """
        from llavactl.chat.sampling import changed

        self.sampling = changed(self.sampling, {name: value})
        if name == "seed":
            self._answers = 0

    def undo(self) -> bool:
        """Removes the last question and its answer, and makes its images pending; False without a question."""
        from llavactl.core.schema import Turn

        content = self.conversation.undo()
        self.pending = [*Turn("user", content).images, *self.pending]
        self._last = None
        return bool(content)

    def retry(self) -> None:
        """Answers the last question again, unless the answer would be the same."""
        if self._last is not None and self.sampling.temperature == 0 and self._last == replace(self.sampling, seed=0):
            raise LlavactlError(
                "greedy decoding gives the same answer again", hint="/set temperature 0.7 samples other answers"
            )
        self._answer(self.conversation.retry)

    def _answer(self, start: Callable[[Sampling], AnswerStream]) -> None:
        """Prints an answer; the seed increases by 1 with each."""
        from llavactl.chat.sampling import MAX_SEED

        sampling = replace(self.sampling, seed=(self.sampling.seed + self._answers) % (MAX_SEED + 1))
        self._answers += 1
        self._last = None
        turns = len(self.conversation.turns)
        try:
            stream = start(sampling)
            try:
                print_answer(stream)
            finally:
                stream.close()
            self._last = replace(sampling, seed=0)
        except KeyboardInterrupt:
            if not stopping.terminated():
                log.info("interrupted")
            raise
        finally:
            if len(self.conversation.turns) > turns:
                self.pending = []
        self._save_code(stream.text)
        if self._explain and any(turn.images for turn in self.conversation.turns):
            print_maps(self.conversation)

    def add_images(self, names: Sequence[str]) -> None:
        """Adds images to the next question; encodes each now, and logs its size or an error."""
        for name in names:
            try:
                image = self.conversation.open_image(name)
            except LlavactlError as error:
                boundary.report(error)
            else:
                self.pending.append(image)
                log.info("image %d: %s", len(self.pending), described(self.conversation, image))

    def load(self, conversation: Conversation) -> None:
        """Continues with ``conversation``, and encodes its images now."""
        for turn in conversation.turns:
            for image in turn.images:
                conversation.open_image(image)
        self.conversation, self.pending, self._last = conversation, [], None


def described(conversation: Conversation, image: ImageRef) -> str:
    """``image`` with its size in pixels and tokens."""
    from llavactl.images.decode import read, size

    width, height = size(read(image))
    return f"{image.name} ({width} × {height} pixels, {conversation.assistant.encoding.image_tokens:,} tokens)"


def print_lines(lines: Sequence[str]) -> None:
    """Prints ``lines`` to stderr: stdout is for answers."""
    for line in lines:
        click.echo(line, err=True)
