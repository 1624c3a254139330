"""What predictions assume about samples whose lengths aren't known."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llavactl.core.quantities import quantity

if TYPE_CHECKING:
    from llavactl.recipe.stages import AnyStage


class LongestMicroBatch(NamedTuple):
    """What is assumed about data that isn't known: a micro-batch of ``samples`` of ``tokens`` tokens each.

    These are the longest that the recipe allows, and every token of their text is a target: an upper bound.
    """

    samples: int
    tokens: int

    def __str__(self) -> str:
        return f"micro-batches of {quantity(self.samples, 'sample')} of {self.tokens:,} tokens"


def longest_micro_batch(settings: AnyStage, micro_batch_tokens: int | None, processes: int) -> LongestMicroBatch:
    """The longest micro-batch that a stage allows on each of ``processes`` devices, within ``micro_batch_tokens``."""
    samples = samples_limit(settings, processes)
    if micro_batch_tokens is not None:
        samples = min(samples, micro_batch_tokens // settings.max_length)
    return LongestMicroBatch(max(1, samples), settings.max_length)


def samples_limit(settings: AnyStage, processes: int) -> int:
    """The most samples of a micro-batch."""
    return max(1, min(settings.micro_batch_size, settings.batch_size // processes))
