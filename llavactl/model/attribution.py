"""How much the tokens of an answer depend on parts of an image: by attention, and by occlusion of features."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.errors import ModelError
from llavactl.core.schema import IGNORE
from llavactl.model.inputs import image_features
from llavactl.model.llava import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel

ROWS = 8
"""Occluded copies of the image per forward pass."""

_RECORDING = threading.Lock()
"""Held while attention is recorded: the implementation of attention is a setting of the model, for all threads."""


@torch.inference_mode()
def attention(model: LlavaModel, batch: Batch) -> torch.Tensor:
    """The attention [A, T] from the A positions that predict the targets to the tokens of ``batch`` (one row [1, T]).

    It is the mean over all heads and layers. The targets are the last tokens; each is predicted by the token before.

    Raises:
        ModelError: the language model has no attention weights.
    """
    rows = slice(-int((batch.labels != IGNORE).sum()) - 1, -1)
    layers: list[torch.Tensor] = []
    with _recorded_attention(model.language, lambda weights: layers.append(weights[0, :, rows].mean(0).float())):
        _logits(model, batch, image_features(batch), keep=1)
    if not layers:
        raise ModelError(f"{model.language.config.model_type} has no attention weights")
    return torch.stack(layers).mean(0)


@torch.inference_mode()
def occlusion(
    model: LlavaModel,
    batch: Batch,
    image: int,
    masks: Sequence[torch.Tensor],
    advance: Callable[[int], object] = lambda _count: None,
) -> torch.Tensor:
    """The decrease [N, A] of the log-probability (in nats) of each of the A targets if a block of one image is hidden.

    ``batch`` is one row [1, T] whose targets are its last tokens. For block n, the features [P, Dv] of the image with
    the index ``image`` are replaced by their mean where ``masks[n]`` [P] is True. ``advance`` is called with the
    number of blocks after each forward pass.
    """
    features = image_features(batch)
    assert features is not None
    whole = _target_log_probabilities(model, batch, features)
    falls = []
    for start in range(0, len(masks), ROWS):
        copies = []
        for mask in masks[start : start + ROWS]:
            occluded = features.clone()
            occluded[image, mask] = features[image].float().mean(0).to(features.dtype)
            copies.append(occluded)
        falls.append(whole - _target_log_probabilities(model, batch, torch.cat(copies), rows=len(copies)))
        advance(len(copies))
    return torch.cat(falls)


def _target_log_probabilities(model: LlavaModel, batch: Batch, features: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """The log-probabilities [rows, A] of the targets with ``features`` [rows * I, P, Dv]."""
    count = int((batch.labels != IGNORE).sum())
    repeated = replace(batch, ids=batch.ids.expand(rows, -1), mask=batch.mask.expand(rows, -1))
    logits = _logits(model, repeated, features, keep=count + 1)[:, -count - 1 : -1]
    targets = batch.labels[:, -count:].expand(rows, -1)
    return logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]


def _logits(model: LlavaModel, batch: Batch, features: torch.Tensor | None, keep: int) -> torch.Tensor:
    logits: torch.Tensor = model.language(
        inputs_embeds=model.embed(batch.ids, features),
        attention_mask=batch.mask.long(),
        position_ids=positions(batch.mask),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    return logits


@contextmanager
def _recorded_attention(language: PreTrainedModel, record: Any) -> Iterator[None]:
    """Calls ``record`` with the attention weights [1, H, T, T] of each layer, which aren't kept: they can be large.

    Those of forward passes in other threads are not recorded.
    """
    thread = threading.get_ident()

    def hook(_module: object, _inputs: object, outputs: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        if isinstance(outputs, tuple) and len(outputs) > 1 and _are_weights(outputs[1]):
            record(outputs[1])
            return (outputs[0], None, *outputs[2:])
        return None

    config = language.config
    with _RECORDING:
        previous, config._attn_implementation = config._attn_implementation, "eager"
        hooks = [
            module.register_forward_hook(hook)
            for module in language.modules()
            if type(module).__name__.endswith("Attention")
        ]
        try:
            yield
        finally:
            config._attn_implementation = previous
            for handle in hooks:
                handle.remove()


def _are_weights(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-1] == value.shape[-2]
