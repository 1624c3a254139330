"""Evaluation during training: the first questions of a few tasks, answered by the model as it is.

The images are encoded once, before training, and their features kept in memory: the vision encoder needs no memory
during training, and every evaluation sees the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Judged, TeacherScored
from llavactl.core.registry import registry
from llavactl.core.schema import Answer
from llavactl.evaluation.runner import question_batches
from llavactl.evaluation.scoring import Benchmark, choose_protocol

if TYPE_CHECKING:
    import numpy as np

    from llavactl.core.protocols import Ask
    from llavactl.core.schema import ImageRef
    from llavactl.evaluation.models import Answerer
    from llavactl.model.generate import Sampling
    from llavactl.recipe.specs import PeriodicTask

TaskAnswers = Mapping[str, Mapping[str, Answer]]
"""Answers by task and question id."""


@dataclass(frozen=True)
class FixedFeatures:
    """The features of a fixed set of images, in memory."""

    features: Mapping[ImageRef, tuple[np.ndarray, ...]]

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        return self.features[image]


def periodic_benchmarks(tasks: Sequence[PeriodicTask], section: str) -> tuple[Benchmark, ...]:
    """The benchmarks of ``tasks``; ``section`` is the recipe key for messages.

    Raises:
        RecipeError: a task needs a judge, and the recipe names none.
        LlavactlError: the questions can't be read, or the protocol is unknown.
    """
    return tuple(_benchmark(task, f"{section}.tasks.{index}") for index, task in enumerate(tasks))


def _benchmark(task: PeriodicTask, key: str) -> Benchmark:
    component = registry().create("tasks", task.spec())
    has_judge = isinstance(component, TeacherScored) and component.teacher is not None
    if isinstance(component, Judged) and not has_judge:
        raise RecipeError(
            f"{key}: {task.name} needs a judge to score new answers",
            hint=f"set `judge` in {key}, or run `llavactl eval {task.name}` after training",
        )
    protocol = choose_protocol(component.protocols, task.protocol)
    return Benchmark(component, task.spec(), list(component.questions()), task.limit, protocol)


def task_images(benchmarks: Iterable[Benchmark]) -> list[ImageRef]:
    """The distinct images of the questions of ``benchmarks``."""
    turns = (turn for benchmark in benchmarks for question in benchmark.questions for turn in question.turns)
    return list(dict.fromkeys(image for turn in turns for image in turn.images))


def score_names(benchmark: Benchmark) -> list[str]:
    """The names of the scores of ``benchmark`` in ``scores``; empty if a judge would have to be asked for them."""
    empty = {question.id: Answer(question.id, "") for question in benchmark.questions}
    return [] if benchmark.judge is not None else list(scores([benchmark], {benchmark.name: empty}))


def answer(
    benchmarks: Iterable[Benchmark],
    model: Answerer,
    batch_size: int,
    sampling: Sampling,
    *,
    part: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Answer]] | None:
    """The answers of ``model`` to part ``part`` (index, count) of the questions, by task and question id.

    None once ``stopped`` returns True, which is called before every batch.
    """
    answers: dict[str, dict[str, Answer]] = {}
    index, count = part
    for benchmark in benchmarks:
        answers[benchmark.name] = {}
        for batch in list(question_batches(benchmark.questions, batch_size))[index::count]:
            if stopped():
                return None
            texts = model.answer([question.turns for question in batch], sampling)
            for question, text in zip(batch, texts, strict=True):
                answers[benchmark.name][question.id] = Answer(question.id, text)
    return answers


def scores(
    benchmarks: Iterable[Benchmark], answers: TaskAnswers, ask: Callable[[Benchmark], Ask | None] = lambda _: None
) -> dict[str, float]:
    """The scores of ``answers``, named ``task.score`` or, in groups, ``task.group.score``.

    ``ask`` returns the function that asks a benchmark's judge.
    """
    flat: dict[str, float] = {}
    for benchmark in benchmarks:
        result = benchmark.score(answers[benchmark.name], Path(), ask(benchmark))
        flat |= flat_scores(result.scores, f"{benchmark.name}.")
    return flat


def flat_scores(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in ``scores``, those of groups included, as ``group.score``."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            flat |= flat_scores(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + name] = value
    return flat
