"""Who answers a task: the model, and those that its score must be held against.

A score says little alone. The *blind twin* is the same model shown another picture of the task: what it
still gets right is told by the words. *Stage 1* is the model before it learned to answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from llavactl.chat.loading import load_assistant
from llavactl.chat.transformers_model import load_transformers_model, model_digest
from llavactl.core.schema import ImageRef, Question, Turn
from llavactl.model.folder import identity
from llavactl.model.generate import GREEDY, Sampling

BLIND = "blind twin"
STAGE1 = "stage 1"


class Answerer(Protocol):
    """What answers conversations that end with the user's turn."""

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]: ...


@dataclass(frozen=True)
class View:
    """One who answers: the model in ``folder``, another program's (``foreign``), shown other pictures (``blind``)."""

    name: str
    folder: Path
    blind: bool = False
    foreign: bool = False

    @cached_property
    def identity(self) -> str:
        """A hash of everything that determines the model's answers."""
        return model_digest(self.folder) if self.foreign else identity(self.folder)

    def open(self, questions: Sequence[Question]) -> Answerer:
        """The model, ready to answer ``questions``."""
        model: Answerer = load_transformers_model(self.folder) if self.foreign else load_assistant(self.folder)
        return Blind(model, other_pictures(questions)) if self.blind else model


@dataclass(frozen=True)
class Blind:
    """A model that is ``shown`` another picture in the place of each."""

    model: Answerer
    shown: Mapping[ImageRef, ImageRef]

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        return self.model.answer([[self._other(turn) for turn in turns] for turns in conversations], sampling)

    def _other(self, turn: Turn) -> Turn:
        said = (part if isinstance(part, str) else self.shown[part] for part in turn.content)
        return replace(turn, content=tuple(said))


def other_pictures(questions: Sequence[Question]) -> dict[ImageRef, ImageRef]:
    """For each image another of the same questions: half of them further on, so never a neighbour's."""
    images = list(dict.fromkeys(image for each in questions for turn in each.turns for image in turn.images))
    shift = len(images) // 2
    return dict(zip(images, images[shift:] + images[:shift], strict=True))
