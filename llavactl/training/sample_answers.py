"""The trained model's answers to the first question of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.schema import Turn
from llavactl.model.folder import PREVIEW
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.core.schema import Sample
    from llavactl.data.split import DataSplit

SAMPLES = "samples"
"""The folder, in that of a stage, with the answers of ``evaluate_every``."""

COUNT = 8
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class AnsweredSample:
    """A question (``turns`` ends with the user's), the sample's own answer, and the model's."""

    turns: tuple[Turn, ...]
    reference: str
    answer: str


def shown_samples(data: DataSplit, count: int = COUNT) -> Sequence[Sample]:
    """The first ``count`` validation samples, or training samples if there are none."""
    return (data.validation if len(data.validation) else data.train).samples[:count]


def answer_samples(assistant: Assistant, samples: Sequence[Sample], max_new_tokens: int) -> list[AnsweredSample]:
    """The answers of ``assistant`` to the first question of each of ``samples``."""
    assistant.model.eval()
    max_new_tokens = min(MAX_NEW_TOKENS, max_new_tokens)
    answered = []
    for sample in samples:
        first_answer = next(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
        question = sample.turns[:first_answer]
        (answer,) = assistant.answer([question], Sampling(max_new_tokens=max_new_tokens))
        if len(assistant.encoding.tokenizer(answer, add_special_tokens=False)["input_ids"]) >= max_new_tokens:
            answer += " …"  # truncated
        answered.append(AnsweredSample(question, sample.turns[first_answer].text, answer))
    return answered


def answers_file(folder: Path, step: int, kind: str = SAMPLES) -> Path:
    """The file, in the folder of a stage, with the answers after ``step`` of training: SAMPLES or PREVIEW."""
    return folder / kind / f"step-{step:08d}.json"


def remove_later_answers(folder: Path, step: int) -> None:
    """Removes the sample answers of an earlier run after later steps than ``step``."""
    for kind in (SAMPLES, PREVIEW):
        for file in (folder / kind).glob("step-*.json"):
            if file > answers_file(folder, step, kind):
                file.unlink(missing_ok=True)
