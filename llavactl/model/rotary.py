"""Rotary position embeddings whose frequencies depend on the sequence length (``dynamic``, ``longrope``)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_MAX_LENGTH = "max_seq_len_cached"
"""The attribute of transformers' modules with the longest sequence so far; with layer types, one per type, prefixed."""


def length_dependent_rope(language: PreTrainedModel) -> str:
    """The type of the position embeddings if they depend on the longest sequence of the batch, else ""."""
    types = (parameters.get("rope_type") for parameters in _rope_parameters(language))
    return next((str(kind) for kind in types if kind in ("dynamic", "longrope")), "")


def frequency_key(language: PreTrainedModel, length: int) -> Hashable:
    """Equal for two sequence lengths with the same frequencies: keys cached at one are then valid at the other."""
    max_positions = getattr(language.config.get_text_config(), "max_position_embeddings", 0)
    return tuple(_key(parameters, max_positions, length) for parameters in _rope_parameters(language))


def _key(parameters: Mapping[str, Any], max_positions: int, length: int) -> int:
    rope_type = parameters.get("rope_type")
    if rope_type == "longrope":
        return int(length > parameters.get("original_max_position_embeddings", max_positions))
    return max(length, max_positions) if rope_type == "dynamic" else 0


def reset_frequencies_per_call(language: nn.Module) -> None:
    """Makes the frequencies of ``language`` depend only on the current input.

    transformers keeps those of the longest input so far, which would make answers depend on earlier prompts.
    """
    for module in language.modules():
        if hasattr(module, _MAX_LENGTH) and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_reset)


def _reset(module: Any, _args: Any) -> None:
    for name in [attribute for attribute in vars(module) if attribute.endswith(_MAX_LENGTH)]:
        prefix = name.removesuffix(_MAX_LENGTH)
        if getattr(module, name) > module.original_max_seq_len and hasattr(module, f"{prefix}inv_freq"):
            current = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(current.device))
            setattr(module, name, module.original_max_seq_len)


def _rope_parameters(language: PreTrainedModel) -> Iterator[Mapping[str, Any]]:
    """The parameters of the position embeddings; if layer types have different ones, also those of each type."""
    parameters = getattr(language.config.get_text_config(), "rope_parameters", None) or {}
    yield from (parameters, *(value for value in parameters.values() if isinstance(value, dict)))
