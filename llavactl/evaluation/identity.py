"""Digests of everything that an evaluation depends on: equal digests mean that stored answers or results are reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.hashes import hash_json
from llavactl.evaluation.models import BLIND_BASELINE
from llavactl.features import ContentKeys

if TYPE_CHECKING:
    from llavactl.core.schema import Content, Question
    from llavactl.evaluation.models import EvaluatedModel
    from llavactl.recipe.sections import Eval

_NAMES_IN_DIGESTS = {BLIND_BASELINE: "blind twin"}
"""Baselines whose name in digests differs from the name in reports; a new one would invalidate stored results."""


def answer_digests(models: Sequence[EvaluatedModel], questions: Sequence[Question], settings: Eval) -> dict[str, str]:
    """By model name, a digest of what determines the model's answers: model, questions, and ``max_new_tokens``."""
    content = question_content(questions)
    return {
        model.name: hash_json([model.identity, model.shuffled_images, content, settings.max_new_tokens])
        for model in models
    }


def result_digest(answers: Mapping[str, str], scoring: Any) -> str:
    """A digest of what determines a result: ``answer_digests`` and ``Benchmark.scoring_identity``."""
    return hash_json([{_NAMES_IN_DIGESTS.get(name, name): digest for name, digest in answers.items()}, scoring])


def question_content(questions: Sequence[Question]) -> list[Any]:
    """Ids, roles and contents of ``questions``; images as content hashes, or by name if they can't be read."""
    images = list(dict.fromkeys(image for question in questions for turn in question.turns for image in turn.images))
    keys = dict(zip(images, ContentKeys().keys_of(images), strict=True))

    def part_content(part: Content) -> Any:
        if isinstance(part, str):
            return part
        key = keys[part]
        return [key] if isinstance(key, str) else [part.name]

    return [
        [question.id, [[turn.role, [part_content(part) for part in turn.content]] for turn in question.turns]]
        for question in questions
    ]
