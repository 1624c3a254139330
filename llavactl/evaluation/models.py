"""The evaluated model, and the baselines to compare its scores with.

- Shuffled-image baseline (blind baseline): the same model, with each image replaced by another one of the
  task. Its score shows how much the questions reveal without the image.
- Stage 1: the model before instruction tuning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llavactl.chat.context import check_fits
from llavactl.chat.loading import load_assistant
from llavactl.chat.transformers_model import (
    PREFIX,
    load_transformers_model,
    model_digest,
    prompt_format_of,
    resolve_folder,
)
from llavactl.core.schema import ImageRef, Question, Turn
from llavactl.model.folder import identity, latest_model
from llavactl.model.generate import GREEDY, Sampling
from llavactl.model.imported import resolve

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.sections import Eval

BLIND_BASELINE = "blind baseline"
STAGE1_BASELINE = "stage 1"


class Answerer(Protocol):
    """A loaded model that answers conversations which end with the user's turn."""

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]: ...


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that answers a task's questions: the model itself (``name`` is ""), or a baseline.

    ``from_transformers``: loaded with transformers and its own processor. ``shuffled_images``: each image is replaced
    by another one of the task.
    """

    name: str
    folder: Path
    shuffled_images: bool = False
    from_transformers: bool = False

    @cached_property
    def identity(self) -> str:
        """A hash of everything that determines the model's answers."""
        return model_digest(self.folder) if self.from_transformers else identity(self.folder)

    @property
    def prompt_format(self) -> str | None:
        """The prompt format of a transformers model; None for llavactl's own models, which have a template."""
        return prompt_format_of(self.folder) if self.from_transformers else None

    def load(self, questions: Sequence[Question], asked: Sequence[Question] = ()) -> Answerer:
        """Loads the model; ``questions`` are all questions of the task, whose images are shuffled for a baseline.

        Raises:
            DataError: the prompt of a question in ``asked`` exceeds the context of a model of llavactl.
        """
        model: Answerer
        if self.from_transformers:
            model = load_transformers_model(self.folder)
        else:
            model = load_assistant(self.folder)
            for question in asked:
                check_fits(model, question.turns, f"question {question.id}")
        return ShuffledImageModel(model, image_replacements(questions)) if self.shuffled_images else model


@dataclass(frozen=True)
class EvaluationTarget:
    """The model to evaluate, the folder of its results, and its name in reports."""

    model: EvaluatedModel
    results_dir: Path
    name: str


def evaluation_target(recipe: Outline | None, model: str | None) -> EvaluationTarget:
    """The target for ``--model`` (a model folder or id, with ``hf:`` for transformers), or the recipe's model."""
    if model is not None and model.startswith(PREFIX):
        name = re.sub(r"[^\w.-]+", "--", model.removeprefix(PREFIX)).strip("-.") or "model"
        results = Path("runs", name, "eval").absolute() if recipe is None else recipe.run_dir / "eval" / "others" / name
        evaluated = EvaluatedModel("", resolve_folder(model), from_transformers=True)
        return EvaluationTarget(evaluated, results, model)
    if model is None:
        assert recipe is not None
        folder = latest_model(recipe.run_dir)
    else:
        folder = resolve(model, recipe)
    # A converted checkpoint has no run folder around it: its results go into its own folder.
    run_dir = folder.parent if folder.name == "model" else folder
    results = (run_dir if recipe is None else recipe.run_dir) / "eval"
    return EvaluationTarget(EvaluatedModel("", folder), results, str(folder))


def with_baselines(
    target: EvaluationTarget, recipe: Outline | None, settings: Eval, questions: Sequence[Question]
) -> list[EvaluatedModel]:
    """The evaluated model and the baselines that ``settings`` enable.

    The blind baseline requires at least two images, the stage 1 baseline a model of this recipe's run.
    """
    models = [target.model]
    if settings.blind_baseline and len(image_replacements(questions)) > 1:
        models.append(replace(target.model, name=BLIND_BASELINE, shuffled_images=True))
    stage1 = None if recipe is None else recipe.run_dir / "stage1" / "model"
    use_stage1 = settings.stage1_baseline and not target.model.from_transformers
    if use_stage1 and stage1 is not None and stage1.is_dir() and stage1 != target.model.folder:
        models.append(EvaluatedModel(STAGE1_BASELINE, stage1))
    return models


@dataclass(frozen=True)
class ShuffledImageModel:
    """A model that sees ``replacements[image]`` instead of each image."""

    model: Answerer
    replacements: Mapping[ImageRef, ImageRef]

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        return self.model.answer([[self._replaced(turn) for turn in turns] for turns in conversations], sampling)

    def _replaced(self, turn: Turn) -> Turn:
        content = (part if isinstance(part, str) else self.replacements[part] for part in turn.content)
        return replace(turn, content=tuple(content))


def image_replacements(questions: Sequence[Question]) -> dict[ImageRef, ImageRef]:
    """Maps each image to another image of ``questions``: the list of images is rotated by half its length.

    Adjacent images, such as those of a minimal pair, thus never replace each other.
    """
    images = list(dict.fromkeys(image for question in questions for turn in question.turns for image in turn.images))
    shift = len(images) // 2
    return dict(zip(images, images[shift:] + images[:shift], strict=True))
