"""Rotary position embeddings whose frequencies change with the length of a row (dynamic, longrope)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_LONGEST = "max_seq_len_cached"
"""What a module of transformers calls the longest row it has seen; with layer types each has its own, by a prefix."""


def changes_with_length(language: PreTrainedModel) -> str:
    """The kind of its position embeddings if they change with the longest row of a batch; "" if they don't."""
    kinds = (part.get("rope_type") for part in _parts(language))
    return next((str(kind) for kind in kinds if kind in ("dynamic", "longrope")), "")


def frequencies(language: PreTrainedModel, length: int) -> Hashable:
    """Equal for two lengths at which ``language`` has the same frequencies: keys that were cached at one then hold at
    the other.
    """
    longest = getattr(language.config.get_text_config(), "max_position_embeddings", 0)
    return tuple(_frequencies(part, longest, length) for part in _parts(language))


def _frequencies(part: Mapping[str, Any], longest: int, length: int) -> int:
    kind = part.get("rope_type")
    if kind == "longrope":
        return int(length > part.get("original_max_position_embeddings", longest))
    return max(length, longest) if kind == "dynamic" else 0


def forget_longest(language: nn.Module) -> None:
    """Makes the frequencies of ``language`` depend only on the current input.

    transformers keeps those of the longest input so far, so that answers would depend on earlier prompts.
    """
    for module in language.modules():
        if hasattr(module, _LONGEST) and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, _args: Any) -> None:
    for name in [each for each in vars(module) if each.endswith(_LONGEST)]:
        prefix = name.removesuffix(_LONGEST)
        if getattr(module, name) > module.original_max_seq_len and hasattr(module, f"{prefix}inv_freq"):
            now = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(now.device))
            setattr(module, name, module.original_max_seq_len)


def _parts(language: PreTrainedModel) -> Iterator[Mapping[str, Any]]:
    """The parameters of its position embeddings; one for each kind of layer, where these differ."""
    given = getattr(language.config.get_text_config(), "rope_parameters", None) or {}
    yield from (given, *(part for part in given.values() if isinstance(part, dict)))
