"""How long samples are in tokens, and what ``max_length`` cuts off them: what training would do, counted in bulk."""

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
from llavactl.features.checked import load_encoder
from llavactl.features.reader import stage_vision

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber
    from llavactl.recipe.values import ImageOrder


@dataclass(frozen=True)
class Lengths:
    """The tokens of samples as ``encoding`` makes them; its ``max_length`` is not applied but asked about."""

    encoding: Encoding
    image_order: ImageOrder
    max_length: int

    def count(self, samples: Sequence[Sample]) -> list[int | None]:
        """T of each of ``samples``, untruncated; None for one that the template refuses."""
        written = [not self.refusal(sample) for sample in samples]
        turns = [self._turns(sample) for sample, fine in zip(samples, written, strict=True) if fine]
        counted = iter(self.encoding.lengths(turns))
        return [next(counted) if fine else None for fine in written]

    def refusal(self, sample: Sample) -> str:
        """Why the template refuses ``sample``, or ""."""
        try:
            self.encoding.rendered_text(self._turns(sample))
        except ConversationError as error:
            return error.message
        return ""

    def too_long(self, samples: Sequence[Sample]) -> list[bool]:
        """Which of ``samples`` are longer than ``max_length``; those that can't be are not tokenised to find out."""
        maybe = [self.encoding.may_exceed(self._turns(sample), self.max_length) for sample in samples]
        counted = iter(self.count([sample for sample, may in zip(samples, maybe, strict=True) if may]))
        return [may and (next(counted) or 0) > self.max_length for may in maybe]

    def findings(self, sample: Sample) -> list[Finding]:
        """What ``max_length`` does to ``sample``, which is longer."""
        turns = self._turns(sample)
        whole = self.encoding.encode(turns)
        cut = replace(self.encoding, max_length=self.max_length).encode(turns)
        lost = whole.target_tokens - cut.target_tokens
        what = f"{len(whole)} tokens, {lost} of {whole.target_tokens} target tokens truncated"
        if not cut.target_tokens:
            return [Finding("untrained", what)]
        gone = len(whole.images) - len(cut.images)
        also = [Finding("image-cut", f"{gone} of {len(whole.images)} images")] if gone else []
        return [Finding("truncated", what), *also]

    def _turns(self, sample: Sample) -> tuple[Turn, ...]:
        return arrange(sample.turns, self.image_order, sample.id)


def stage_lengths(recipe: Recipe, stage: StageNumber) -> Lengths:
    """The lengths that training ``stage`` of ``recipe`` would see; of a random image order one that may be drawn.

    Raises:
        LlavactlError: the tokenizer or the backbone can't be had.
    """
    chosen = recipe.stage(stage)
    encoding = Encoding(
        registry().create("templates", chosen.template),
        registry().create("languages", recipe.language.spec()).tokenizer(),
        image_tokens(recipe, stage),
    )
    return Lengths(encoding, chosen.settings.image_order, chosen.settings.max_length)


def image_tokens(recipe: Recipe, stage: StageNumber) -> int:
    """Q, how many tokens an image of ``stage`` becomes; the backbone is loaded only where it can't say otherwise."""
    vision = stage_vision(recipe, stage)
    measured = vision if isinstance(vision, ShapedVision) else None
    shape = measured.shape() if measured else load_encoder(vision, "cpu", recipe.features.compute).shape
    return int(registry().create("connectors", recipe.connector.spec()).tokens(shape))
