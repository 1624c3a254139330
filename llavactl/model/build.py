"""Making a LlavaModel out of a recipe's components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.errors import ModelError
from llavactl.core.registry import registry
from llavactl.model.llava import LlavaModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.schema import FeatureShape


@dataclass(frozen=True)
class Parts:
    """A model, its tokenizer and Q, the tokens an image becomes."""

    model: LlavaModel
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int


def build(
    connector: Mapping[str, Any], language: Mapping[str, Any], shape: FeatureShape, *, dtype: str, seed: int = 0
) -> Parts:
    """A new connector (initialised from ``seed``) before the language model's own weights, on the CPU in ``dtype``.

    Raises:
        ModelError: the language model, its tokenizer, or the two together can't be used.
        RecipeError: the connector doesn't fit features of this ``shape``.
    """
    speaker = registry().create("languages", language)
    tokenizer, written = speaker.tokenizer(), speaker.load(dtype)
    embeddings = written.get_input_embeddings().weight
    if len(tokenizer) > len(embeddings):
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the language model embeds {len(embeddings)}",
            hint="the tokenizer belongs to another model",
        )
    torch.manual_seed(seed)
    maker = registry().create("connectors", connector)
    made = maker.build(shape, embeddings.shape[1]).to(embeddings.dtype)
    written.config.use_cache = False
    return Parts(LlavaModel(made, written), tokenizer, maker.tokens(shape))
