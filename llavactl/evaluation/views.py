"""Who answers a task: the model, and those that its score must be held against.

A score says little alone. The *blind twin* is the same model shown another picture of the task: what it
still gets right is told by the words. *Stage 1* is the model before it learned to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.chat.opening import open_assistant
from llavactl.core.schema import ImageRef, Question

if TYPE_CHECKING:
    import numpy as np

    from llavactl.chat.assistant import Assistant
    from llavactl.data.batches import Loads

BLIND = "blind twin"
STAGE1 = "stage 1"


@dataclass(frozen=True)
class View:
    """One who answers: the model in ``folder``; ``blind``: it is shown other pictures."""

    name: str
    folder: Path
    blind: bool = False

    def open(self, questions: Sequence[Question]) -> Assistant:
        """The model, ready to answer ``questions``."""
        assistant = open_assistant(self.folder)
        if not self.blind:
            return assistant
        return replace(assistant, features=OtherPictures(assistant.features, questions))


class OtherPictures:
    """The features of another image of the same questions: half of them further on, so never a neighbour's."""

    def __init__(self, features: Loads, questions: Sequence[Question]) -> None:
        images = list(dict.fromkeys(image for each in questions for turn in each.turns for image in turn.images))
        shift = len(images) // 2
        self.features = features
        self.shown: dict[ImageRef, ImageRef] = dict(zip(images, images[shift:] + images[:shift], strict=True))

    def load(self, image: ImageRef) -> np.ndarray:
        return self.features.load(self.shown[image])
