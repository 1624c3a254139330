"""The last decoder layer, computed where something is predicted: elsewhere it needs keys and values alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MULTIPLE = 32
"""So many places, or a multiple of it, are computed: for the reason that ``llavactl.data.rows.MULTIPLE`` has."""


def filled(places: torch.Tensor, length: int) -> torch.Tensor:
    """``places`` [N] of a row of ``length``, rising and each once, and the row's first others up to a MULTIPLE."""
    wanted = torch.zeros(length, dtype=torch.bool, device=places.device)
    wanted[places] = True
    (others,) = (~wanted).nonzero(as_tuple=True)
    wanted[others[: -int(wanted.sum()) % MULTIPLE]] = True
    (found,) = wanted.nonzero(as_tuple=True)
    return found


@contextmanager
def narrowed(language: PreTrainedModel) -> Iterator[None]:
    """While this lasts, a forward of a Llama-like ``language`` with ``places`` [N], in its rows laid end to end, has
    projections and MLP of its last layer computed there alone; what it gives elsewhere means nothing.

    Nothing sees the difference: no layer comes after, and the loss looks at no other place. Around a whole run, not
    a forward: with gradient checkpointing the backward pass computes the layer once more.
    """
    layer = language.get_decoder().layers[-1]
    seen = _Places()
    with ExitStack() as hooks:
        hooks.callback(layer.self_attn.register_forward_pre_hook(seen.take, with_kwargs=True).remove)
        for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            hooks.callback(part.register_forward_pre_hook(seen.gather).remove)
            hooks.callback(part.register_forward_hook(seen.scatter).remove)
        yield


class _Places:
    """The places of the forward in progress, taken from what its attention is called with."""

    def __init__(self) -> None:
        self.places: torch.Tensor | None = None
        self.rows = torch.Size()

    def take(self, _module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        self.places = given.get("places")

    def gather(self, _module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """[B, T, D] to [N, D]."""
        if self.places is None:
            return args
        self.rows = args[0].shape[:2]
        return (args[0].flatten(0, 1).index_select(0, self.places),)

    def scatter(self, _module: nn.Module, _args: Any, made: torch.Tensor) -> torch.Tensor:
        """[N, D] to [B, T, D], zeros elsewhere."""
        if self.places is None:
            return made
        whole = made.new_zeros(self.rows.numel(), made.shape[-1])
        return whole.index_copy(0, self.places, made).view(*self.rows, -1)
