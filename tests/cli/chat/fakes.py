"""A conversation whose answers are written by the test."""

from __future__ import annotations

import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

from llavactl.chat.conversation import Conversation
from llavactl.chat.inputs import open_image
from llavactl.core.schema import Turn
from llavactl.model.generate import GREEDY, Sampling

ASSISTANT: Any = SimpleNamespace(name="fake", sampling=GREEDY, encoding=SimpleNamespace(image_tokens=576))


class FakeConversation(Conversation):
    """Answers with ``answer``, or else with the question, its number of images and the settings.

    ``delay_s``: the time between two pieces of an answer.
    """

    answer = ""
    delay_s = 0.0
    assistant: Any

    def open_image(self, image: Any) -> Any:
        return open_image(str(image)) if isinstance(image, str) else image

    def _pieces(self, question: Turn, former_answer: Turn | None, sampling: Sampling) -> Generator[str]:
        self.turns.append(question)
        text = question.text.strip()
        if text.startswith("interrupt"):
            if text.endswith("late"):
                self.turns.append(Turn("assistant", ("half",)))
                yield "half"
            else:
                self.turns[-1:] = [former_answer] if former_answer else []
            raise KeyboardInterrupt
        settings = f"{sampling.temperature}/{sampling.seed}"
        said: list[str] = []
        try:
            for piece in self.answer or [f"{len(question.images)} images, ", text, f" {settings}"]:
                time.sleep(self.delay_s)
                said.append(piece)
                yield piece
        finally:
            self.turns.append(Turn("assistant", ("".join(said),)))
