"""Computes the last decoder layer only where a target is predicted; other positions need only keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INDEX_MULTIPLE = 32
"""The number of computed positions is a multiple of this, for the reason given in ``data.packing.PAD_MULTIPLE``."""


def padded_indices(indices: torch.Tensor, length: int) -> torch.Tensor:
    """``indices`` [N] into a sequence of ``length``, sorted and without duplicates, padded to INDEX_MULTIPLE.

    The padding is the first indices that are not in ``indices``.
    """
    selected = torch.zeros(length, dtype=torch.bool, device=indices.device)
    selected[indices] = True
    (others,) = (~selected).nonzero(as_tuple=True)
    selected[others[: -int(selected.sum()) % INDEX_MULTIPLE]] = True
    (padded,) = selected.nonzero(as_tuple=True)
    return padded


@contextmanager
def selective_last_layer(language: PreTrainedModel) -> Iterator[None]:
    """In this context ``language`` accepts ``output_indices`` [N], into the flattened positions.

    Query and output projection and MLP of the last layer are then computed only there; outputs at other positions are
    undefined. The result is exact for Llama-like models: no layer follows, and the loss uses no other output. The
    context must enclose the backward pass as well: with gradient checkpointing it computes the layer again.
    """
    layer = language.get_decoder().layers[-1]
    selection = _Selection()
    with ExitStack() as hooks:
        hooks.callback(layer.self_attn.register_forward_pre_hook(selection.set_indices, with_kwargs=True).remove)
        for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            hooks.callback(part.register_forward_pre_hook(selection.gather).remove)
            hooks.callback(part.register_forward_hook(selection.scatter).remove)
        yield


class _Selection:
    """The indices of the current forward pass, from the keyword arguments of its attention module."""

    def __init__(self) -> None:
        self.indices: torch.Tensor | None = None
        self.shape = torch.Size()

    def set_indices(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.indices = kwargs.get("output_indices")

    def gather(self, _module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """[B, T, D] to [N, D]."""
        if self.indices is None:
            return args
        self.shape = args[0].shape[:2]
        return (args[0].flatten(0, 1).index_select(0, self.indices),)

    def scatter(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        """[N, D] to [B, T, D], zero elsewhere."""
        if self.indices is None:
            return output
        scattered = output.new_zeros(self.shape.numel(), output.shape[-1])
        return scattered.index_copy(0, self.indices, output).view(*self.shape, -1)
