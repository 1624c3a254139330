"""Sequences in one batch that begin and end independently: continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from llavactl.model.exactness import new_cache
from llavactl.model.generate import last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prefilled(NamedTuple):
    """A processed sequence of T tokens: its key/value cache, and the logits [1, V] at its last token."""

    cache: Any
    logits: torch.Tensor
    tokens: int


class Rows:
    """Sequences that are extended together; ``logits`` [B, V] are those at the last token of each.

    They have one key/value cache, padded on the left to the longest sequence. An exception may leave it inconsistent,
    except in ``prefill``, which doesn't change it.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        self.language = language
        self.logits = torch.empty(0)
        self._cache: Any = None
        self._mask = torch.empty(0)

    def __len__(self) -> int:
        return len(self.logits)

    @torch.inference_mode()
    def prefill(self, embeds: torch.Tensor) -> Prefilled:
        """Processes one sequence, ``embeds`` [1, T, Dl]; ``add`` makes it a row."""
        cache, mask = new_cache(self.language), _ones(embeds.shape[1], embeds.device)
        state = {"use_cache": True, "past_key_values": cache}
        return Prefilled(cache, last_logits(self.language, embeds, mask, state), embeds.shape[1])

    @torch.inference_mode()
    def add(self, row: Prefilled) -> None:
        """Adds ``row`` as the last one."""
        mask = _ones(row.tokens, row.logits.device)
        if not len(self):
            self._cache, self._mask, self.logits = row.cache, mask, row.logits
            return
        length = max(mask.shape[1], self._mask.shape[1])
        for layer, added in zip(self._cache.layers, row.cache.layers, strict=True):
            if layer.is_initialized:  # not in layers that share the keys of another one
                layer.keys = torch.cat([_padded(layer.keys, length), _padded(added.keys, length)])
                layer.values = torch.cat([_padded(layer.values, length), _padded(added.values, length)])
        self._mask = torch.cat([pad(each, (length - each.shape[1], 0)) for each in (self._mask, mask)])
        self.logits = torch.cat([self.logits, row.logits])

    @torch.inference_mode()
    def keep(self, indices: Sequence[int]) -> None:
        """Removes all rows but ``indices``, and columns that contain padding only."""
        selected = torch.tensor(indices, dtype=torch.long, device=self.logits.device)
        self.logits, self._mask = self.logits[selected], self._mask[selected]
        padding = int(self._mask.any(dim=0).int().argmax())
        self._mask = self._mask[:, padding:]
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (
                    layer.keys[selected, ..., padding:, :],
                    layer.values[selected, ..., padding:, :],
                )

    @torch.inference_mode()
    def extend(self, embeds: torch.Tensor) -> None:
        """Appends one token to each row: ``embeds`` [B, 1, Dl]."""
        self._mask = pad(self._mask, (0, 1), value=True)
        state = {"use_cache": True, "past_key_values": self._cache}
        self.logits = last_logits(self.language, embeds, self._mask, state)


def _ones(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.bool, device=device)


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values [B, …, T, D], padded on the left to ``length`` tokens."""
    return pad(states, (0, 0, length - states.shape[-2], 0))
