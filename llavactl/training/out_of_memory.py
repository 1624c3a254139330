"""Names what didn't fit in memory, and the settings that make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llavactl.core.errors import RecipeError
from llavactl.core.library_errors import out_of_memory, reason
from llavactl.training.placement import sharding_blocker

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.recipe.stages import AnyStage
    from llavactl.training.placement import Placement


@contextmanager
def out_of_memory_named(
    section: str, settings: AnyStage, placement: Placement, phase: str, batch: Batch | None = None
) -> Iterator[None]:
    """Converts an out-of-memory error in this context to one that names ``phase``, ``batch`` and settings to change.

    ``section`` is that of the stage, such as ``stage1``. Without ``batch``, weights or optimizer state didn't fit.

    Raises:
        RecipeError: a device or the host has no memory left.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        where = f"{section}, {phase}" if batch is None else f"{section}, {phase}, {_description(batch)}"
        changes = _for_weights(section, settings, placement)
        if batch is not None:
            changes = _for_micro_batch(section, settings, batch) or [*changes, _shorter_samples(section, batch)]
        raise RecipeError(
            f"{where}: out of memory: {reason(error)}",
            hint=f"use less memory with {', or '.join(changes)}",
        ) from error


def _description(batch: Batch) -> str:
    """The size of ``batch`` and its longest sample. A process without samples computes an empty one."""
    tokens, name = max(zip(_lengths(batch), batch.names, strict=False), default=(0, "none"))
    samples = f"{len(batch.names)} sample{'s' * (len(batch.names) != 1)}"
    return f"micro-batch of {samples} and {batch.mask.numel():,} tokens (longest: {name}, {tokens:,} tokens)"


def _lengths(batch: Batch) -> list[int]:
    """The number of tokens of each sample, its prefix included and padding excluded."""
    if not batch.spans:
        return [int(length) for length in batch.mask.sum(1)]
    lengths = [int(part.sum()) for part in batch.mask[0].split([span.length for span in batch.spans])]
    prefixes = {span.after for span in batch.spans}
    return [
        length + (0 if span.after is None else lengths[span.after])
        for index, (span, length) in enumerate(zip(batch.spans, lengths, strict=True))
        if index not in prefixes
    ]


def _for_micro_batch(section: str, settings: AnyStage, batch: Batch) -> list[str]:
    """Ways to need less memory for ``batch`` without changing the result."""
    changes = []
    samples, tokens = len(batch.names), batch.mask.numel()
    if samples > 1 and settings.micro_batch_tokens:
        changes.append(f"`-o {section}.micro_batch_tokens={tokens // 2}`")
    elif samples > 1:
        size = max(n for n in range(1, samples // 2 + 1) if settings.batch_size % n == 0)
        changes.append(f"`-o {section}.micro_batch_size={size}`")
    if not settings.gradient_checkpointing:
        changes.append(f"`-o {section}.gradient_checkpointing=true`")
    return changes


def _for_weights(section: str, settings: AnyStage, placement: Placement) -> list[str]:
    """Ways to need less memory for weights, gradients and optimizer state; those that change the result come last."""
    method, changes = settings.method, []
    if not sharding_blocker(settings):
        changes.append("more processes" if placement.sharded else "several processes and `-o sharding=full`")
    if method != "connector" and placement.optimizer_state == "device":
        changes.append("`-o optimizer_state=host`")
    if smaller := {"full": "lora", "lora": "qlora"}.get(method):
        changes.append(f"`-o {section}.method={smaller}`")
    if method == "qlora":
        changes.append(f"a smaller `{section}.lora.r`")
    return changes


def _shorter_samples(section: str, batch: Batch) -> str:
    return f"`-o {section}.max_length={max(_lengths(batch), default=2) // 2}`"
