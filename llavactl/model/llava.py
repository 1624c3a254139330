"""LlavaModel: a connector and a causal language model over vision features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.errors import ModelError
from llavactl.core.schema import IMAGE_TOKEN, Batch
from llavactl.model.inputs import image_features
from llavactl.model.last_layer import padded_indices
from llavactl.model.loss import chunked_cross_entropy, cross_entropy, predictions
from llavactl.model.packed import PACKABLE_MODEL_TYPES, PackedLayout, packed_layout
from llavactl.model.rotary import reset_frequencies_per_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaModel(nn.Module):
    """Maps features [I, P, Dv] with ``connector`` to embeddings [I, Q, Dl], inserts them into the text's embeddings
    [B, T, Dl], and runs ``language``.

    ``frozen`` names the connector's parameters that its component froze; no stage trains them.
    """

    def __init__(self, connector: nn.Module, language: PreTrainedModel) -> None:
        super().__init__()
        self.connector = connector
        self.language = language
        reset_frequencies_per_call(language)
        self.frozen = frozenset(name for name, weight in connector.named_parameters() if not weight.requires_grad)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.language.get_input_embeddings().weight.device
        return device

    def embed(self, ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """ids [B, T] and features [I, P, Dv] to embeddings [B, T, Dl]; IMAGE_TOKENs are replaced in row-major order.

        Raises:
            ModelError: the number of IMAGE_TOKENs is not the number of the connector's tokens.
        """
        is_image = ids == IMAGE_TOKEN
        embedded = self.language.get_input_embeddings()(ids.masked_fill(is_image, 0))
        if features is None:
            return embedded
        # Not the embeddings' dtype, which is float32 with 4-bit weights. Integer parameters don't count.
        weight = next((p for p in self.connector.parameters() if p.is_floating_point()), embedded)
        tokens = self.connector(features.to(weight.dtype)).flatten(0, 1)
        if (expected := int(is_image.sum())) != len(tokens):
            raise ModelError(f"the batch has {expected} image tokens, but the connector computed {len(tokens)}")
        return embedded.masked_scatter(is_image[..., None], tokens.to(embedded.dtype))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [B, T, V] at every position."""
        output = self.language(**self._inputs(batch, packed_layout(batch)), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the cross entropy over all target tokens, a float32 scalar.

        The caller divides the sum by the number of target tokens of the global batch, which makes the loss independent
        of gradient accumulation and the number of processes. Logits [N, V] are computed only where a target is
        predicted.
        """
        layout = packed_layout(batch)
        indices, targets = predictions(batch, layout)
        if self.language.config.model_type in PACKABLE_MODEL_TYPES:
            hidden = self._hidden(batch, layout, indices)
            return chunked_cross_entropy(self.language.get_output_embeddings(), hidden, targets)
        with _head_input(self.language, lambda hidden: hidden.flatten(0, 1)[indices]):
            logits = self.language(**self._inputs(batch, layout), use_cache=False).logits
        return cross_entropy(logits, targets)

    def _hidden(self, batch: Batch, layout: PackedLayout | None, indices: torch.Tensor) -> torch.Tensor:
        """The head's input [N, Dl] at ``indices``; the head isn't run."""
        selected = []

        def select(hidden: torch.Tensor) -> torch.Tensor:
            selected.append(hidden.flatten(0, 1)[indices])
            return hidden[:, :0]

        inputs = self._inputs(batch, layout)
        if layout is not None:
            inputs["output_indices"] = padded_indices(indices, batch.ids.shape[1])
        with _head_input(self.language, select):
            self.language(**inputs, use_cache=False)
        return selected[0]

    def _inputs(self, batch: Batch, layout: PackedLayout | None) -> dict[str, Any]:
        """The language model's keyword arguments."""
        inputs: dict[str, Any] = {"inputs_embeds": self.embed(batch.ids, image_features(batch))}
        if layout is not None:
            inputs["packed_layout"] = layout
            inputs["position_ids"] = layout.positions
        elif not bool(batch.mask.all()):
            inputs["attention_mask"] = batch.mask.long()
            inputs["position_ids"] = positions(batch.mask)
        return inputs


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] that don't count padding, on either side (mask [B, T], False: padding)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@contextmanager
def _head_input(language: nn.Module, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """In this context the language model's head gets ``select(hidden)`` instead of hidden [B, T, Dl].

    A hook, because operations that a model applies to logits after its head (scaling, soft caps) must still run.
    """
    head = language.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _module, args: (select(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
