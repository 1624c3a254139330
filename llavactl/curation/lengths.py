"""Lengths of samples in tokens, and the effect of ``max_length``, as in training but computed in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavactl.core.errors import ConversationError
from llavactl.core.protocols import Finding, ShapedVision
from llavactl.core.registry import registry
from llavactl.core.schema import Sample, Turn
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.features.checked_encoder import load_encoder
from llavactl.features.reader import stage_vision

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber
    from llavactl.recipe.values import ImageOrder


@dataclass(frozen=True)
class Lengths:
    """Lengths with ``encoding``, which doesn't truncate; ``max_length`` is the limit of the stage."""

    encoding: Encoding
    image_order: ImageOrder
    max_length: int

    def count(self, samples: Sequence[Sample]) -> list[int | None]:
        """T of each of ``samples`` before truncation; None if the template refuses the sample."""
        renderable = [not self.refusal(sample) for sample in samples]
        turns = [self._turns(sample) for sample, valid in zip(samples, renderable, strict=True) if valid]
        lengths = iter(self.encoding.lengths(turns))
        return [next(lengths) if valid else None for valid in renderable]

    def refusal(self, sample: Sample) -> str:
        """Why the template refuses ``sample``, or ""."""
        try:
            self.encoding.rendered_text(self._turns(sample))
        except ConversationError as error:
            return error.message
        return ""

    def too_long(self, samples: Sequence[Sample]) -> list[bool]:
        """Which of ``samples`` are longer than ``max_length``; samples that can't be are not tokenized."""
        candidates = [self.encoding.may_exceed(self._turns(sample), self.max_length) for sample in samples]
        lengths = iter(self.count([sample for sample, may in zip(samples, candidates, strict=True) if may]))
        return [may and (next(lengths) or 0) > self.max_length for may in candidates]

    def findings(self, sample: Sample) -> list[Finding]:
        """The effect of ``max_length`` on ``sample``, which is longer."""
        turns = self._turns(sample)
        full = self.encoding.encode(turns)
        truncated = replace(self.encoding, max_length=self.max_length).encode(turns)
        lost = full.target_tokens - truncated.target_tokens
        detail = f"{len(full)} tokens, {lost} of {full.target_tokens} target tokens truncated"
        if not truncated.target_tokens:
            return [Finding("untrained", detail)]
        findings = [Finding("truncated", detail)]
        if lost_images := len(full.images) - len(truncated.images):
            findings.append(Finding("image-cut", f"{lost_images} of {len(full.images)} images"))
        return findings

    def _turns(self, sample: Sample) -> tuple[Turn, ...]:
        return arrange(sample.turns, self.image_order, sample.id)


def stage_lengths(recipe: Recipe, stage: StageNumber) -> Lengths:
    """The lengths in training ``stage`` of ``recipe``; for a random image order, those of one possible draw.

    Raises:
        LlavactlError: the tokenizer or the backbone isn't available.
    """
    chosen = recipe.stage(stage)
    encoding = Encoding(
        registry().create("templates", chosen.template),
        registry().create("languages", recipe.language.spec()).tokenizer(),
        image_tokens(recipe, stage),
    )
    return Lengths(encoding, chosen.settings.image_order, chosen.settings.max_length)


def image_tokens(recipe: Recipe, stage: StageNumber) -> int:
    """Q, the tokens per image of ``stage``; the backbone is loaded only if its shape isn't known otherwise."""
    from llavactl.model.build import connector_tokens

    vision = stage_vision(recipe, stage)
    if isinstance(vision, ShapedVision):
        shape = vision.shape()
    else:
        shape = load_encoder(vision, "cpu", recipe.features.compute).shape
    return connector_tokens(recipe.connector.spec(), shape)
