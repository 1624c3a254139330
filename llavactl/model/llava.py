"""LlavaModel: a connector and a causal language model over vision features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.errors import ModelError
from llavactl.core.schema import IMAGE_TOKEN, Batch
from llavactl.model.cpu.block_attention import Layout
from llavactl.model.cpu.last_layer import filled
from llavactl.model.inputs import image_features
from llavactl.model.loss import cross_entropy, predictions, summed
from llavactl.model.packed import LIKE_LLAMA, span_positions
from llavactl.model.rotary import forget_longest

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
        forget_longest(language)
        self.frozen = frozenset(name for name, each in connector.named_parameters() if not each.requires_grad)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.language.get_input_embeddings().weight.device
        return device

    def embed(self, ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """ids [B, T] and features [I, P, Dv] to embeddings [B, T, Dl]; IMAGE_TOKENs take the images' in reading order.

        Raises:
            ModelError: the places and the connector's tokens don't match in number.
        """
        places = ids == IMAGE_TOKEN
        embedded = self.language.get_input_embeddings()(ids.masked_fill(places, 0))
        if features is None:
            return embedded
        # Not the embeddings' dtype, which is float32 with 4-bit weights. Integer parameters don't count.
        weight = next((each for each in self.connector.parameters() if each.is_floating_point()), embedded)
        tokens = self.connector(features.to(weight.dtype)).flatten(0, 1)
        if (wanted := int(places.sum())) != len(tokens):
            raise ModelError(f"{wanted} places for image tokens, but the connector made {len(tokens)}")
        return embedded.masked_scatter(places[..., None], tokens.to(embedded.dtype))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [B, T, V] of every position."""
        output = self.language(**self._inputs(batch), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the cross entropy over the trained positions, a float32 scalar.

        A sum, not a mean: the caller divides by the trained positions of the whole global batch, so
        that neither accumulation nor the number of processes changes the loss. Logits are made at
        trained positions alone, [N, V].
        """
        places, targets = predictions(batch)
        if self.language.config.model_type in LIKE_LLAMA:
            return summed(self.language.get_output_embeddings(), self._hidden(batch, places), targets)
        with _head_sees(self.language, lambda hidden: hidden.flatten(0, 1)[places]):
            logits = self.language(**self._inputs(batch), use_cache=False).logits
        return cross_entropy(logits, targets)

    def _hidden(self, batch: Batch, places: torch.Tensor) -> torch.Tensor:
        """What the head would see [N, Dl] at ``places``."""
        seen = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden.flatten(0, 1)[places])
            return hidden[:, :0]

        inputs = self._inputs(batch)
        if batch.spans:
            inputs["places"] = filled(places, batch.ids.shape[1])
        with _head_sees(self.language, keep):
            self.language(**inputs, use_cache=False)
        return seen[0]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"inputs_embeds": self.embed(batch.ids, image_features(batch))}
        if batch.spans:
            inputs["layout"] = Layout(batch.spans)
            inputs["position_ids"] = span_positions(batch.spans, batch.ids.device)
        elif not bool(batch.mask.all()):
            inputs["attention_mask"] = batch.mask.long()
            inputs["position_ids"] = positions(batch.mask)
        return inputs


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] that count real tokens only, whichever side is padded (mask [B, T], False: padding)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@contextmanager
def _head_sees(language: nn.Module, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While this lasts, the language model's head is given ``choose(hidden)`` in place of hidden [B, T, Dl].

    A hook, because what a model does to logits after its head (scaling, soft caps) must still happen.
    """
    head = language.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _module, args: (choose(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
