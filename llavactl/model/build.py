"""Making a LlavaModel out of a recipe's components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.errors import ModelError, PluginError
from llavactl.core.registry import registry
from llavactl.model.exactness import is_causal
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
    if not is_causal(written):
        raise ModelError(
            f"{written.config.model_type} models see the tokens that they should predict",
            hint="`language.model` must be a causal language model, such as Llama or Qwen",
        )
    torch.manual_seed(seed)
    made, tokens = build_connector(connector, shape, embeddings.shape[1])
    written.config.use_cache = False
    return Parts(LlavaModel(made.to(embeddings.dtype), written), tokenizer, tokens)


def build_connector(spec: Mapping[str, Any], shape: FeatureShape, width: int) -> tuple[nn.Module, int]:
    """The connector ``spec`` for features of ``shape`` and a language model of ``width`` Dl, in float32; and Q.

    It is run on zeros first, as embeddings of another shape would silently be inserted wrongly; ``try_connector`` finds
    more.

    Raises:
        RecipeError: it doesn't fit features of this ``shape``.
        PluginError: its output isn't embeddings [I, Q, Dl].
    """
    maker = registry().create("connectors", spec)
    made, tokens = maker.build(shape, width), maker.tokens(shape)
    if not isinstance(made, nn.Module) or not isinstance(tokens, Integral) or int(tokens) < 1:
        found = f"a {type(made).__name__}, tokens() {tokens!r}"
        raise broken(spec, f"build() gives {found}; expected a torch module and 1 or more")
    mode, features = made.training, torch.zeros(2, shape.patches, shape.width)
    with torch.no_grad():
        seen = made.eval()(features)
    made.train(mode)
    if why := misshapen(seen, features, (int(tokens), width)):
        raise broken(spec, why)
    return made, int(tokens)


def misshapen(made: Any, features: torch.Tensor, wanted: tuple[int, int]) -> str:
    """Why ``made`` of ``features`` [I, P, Dv] isn't embeddings [I, Q, Dl] for Q and Dl ``wanted``; "" if it is."""
    shape = (len(features), *wanted)
    if isinstance(made, torch.Tensor) and tuple(made.shape) == shape:
        return "" if made.is_floating_point() else f"it makes numbers of type {made.dtype}"
    found = tuple(made.shape) if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
    return (
        f"it makes {found} of features {tuple(features.shape)}; tokens() and the language model's width require {shape}"
    )


def broken(spec: Mapping[str, Any], why: str) -> PluginError:
    """The error for a connector ``spec`` that breaks a rule of its Protocol."""
    plugin = registry().get("connectors", spec["name"]).plugin
    return PluginError(
        f"connector {spec['name']!r} of plugin {plugin}: {why}",
        hint="`llavactl.testing.check_connector` tests a connector by itself",
    )
