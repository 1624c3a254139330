"""Builds a LlavaModel from a recipe's components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.component_calls import call_error
from llavactl.core.errors import ModelError
from llavactl.core.protocols import GridConnector
from llavactl.core.registry import registry
from llavactl.core.tokenizer_check import TOKENIZER_HINT, tokenizer_fault
from llavactl.model.exactness import is_causal
from llavactl.model.llava import LlavaModel
from llavactl.model.quantized import Bits, load_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.schema import FeatureShape


@dataclass(frozen=True)
class ModelBundle:
    """A model, its tokenizer, and Q, the number of tokens per image."""

    model: LlavaModel
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int


def build(
    connector: Mapping[str, Any],
    language: Mapping[str, Any],
    shape: FeatureShape,
    *,
    dtype: str,
    seed: int = 0,
    quantize_on: str | None = None,
    bits: Bits = 4,
) -> ModelBundle:
    """A new connector (initialized with ``seed``) and the pretrained language model, on the CPU in ``dtype``.

    With ``quantize_on``, the language model is loaded in ``bits`` on this device; it computes in ``dtype``.

    Raises:
        ModelError: the language model or its tokenizer can't be used, or they don't match.
        RecipeError: the connector doesn't fit features of this ``shape``, or the language model can't be quantized.
    """
    component = registry().create("languages", language)
    tokenizer = component.tokenizer()
    if quantize_on is None:
        language_model = component.load(dtype)
    else:
        language_model = load_quantized(component, dtype, quantize_on, bits)
    embeddings = language_model.get_input_embeddings().weight
    if fault := tokenizer_fault(tokenizer, len(embeddings)):
        raise ModelError(fault, hint=TOKENIZER_HINT)
    if not is_causal(language_model):
        raise ModelError(
            f"{language_model.config.model_type} is not a causal language model: its logits depend on later tokens",
            hint="set `language.model` to a causal language model, such as Llama or Qwen",
        )
    torch.manual_seed(seed)
    module, tokens = build_connector(connector, shape, embeddings.shape[1])
    language_model.config.use_cache = False
    return ModelBundle(LlavaModel(module.to(embeddings.dtype), language_model), tokenizer, tokens)


def build_connector(spec: Mapping[str, Any], shape: FeatureShape, width: int) -> tuple[nn.Module, int]:
    """The connector ``spec`` for features of ``shape`` and a language model of ``width`` Dl, in float32; and Q.

    It is run once on zeros, since embeddings of a wrong shape would be inserted without an error.
    ``validate_connector`` tests more.

    Raises:
        RecipeError: it doesn't fit features of this ``shape``.
        PluginError: its output isn't embeddings [I, Q, Dl].
    """
    component = registry().create("connectors", spec)
    module, tokens = component.build(shape, width), int(component.tokens(shape))
    mode, features = module.training, torch.zeros(2, shape.patches, shape.width)
    with torch.no_grad():
        embeddings = module.eval()(features)
    module.train(mode)
    if why := embeddings_fault(embeddings, features, (tokens, width)):
        raise call_error(module, "forward", why)
    return module, tokens


def connector_tokens(spec: Mapping[str, Any], shape: FeatureShape) -> int:
    """Q, the number of tokens per image of the connector ``spec``.

    Raises:
        PluginError: it isn't a positive integer.
    """
    return int(registry().create("connectors", spec).tokens(shape))


def connector_grid(spec: Mapping[str, Any], shape: FeatureShape) -> tuple[int, int] | None:
    """The grid (h, w) of the cells that the tokens of the connector ``spec`` belong to; None if it declares none.

    Raises:
        PluginError: it isn't a pair of positive integers.
    """
    connector = registry().create("connectors", spec)
    if not isinstance(connector, GridConnector):
        return None
    if why := grid_fault(connector, shape):
        raise call_error(connector, "grid", why)
    return connector.grid(shape)


def grid_fault(connector: GridConnector, shape: FeatureShape) -> str:
    """Why ``connector.grid(shape)`` isn't valid; "" if it is."""
    grid = connector.grid(shape) if callable(connector.grid) else connector.grid
    sides = grid if isinstance(grid, tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return f"returned {grid!r}, expected a tuple of two positive integers"
    tokens, cells = connector.tokens(shape), grid[0] * grid[1]
    tokens -= tokens_before_cells(tokens, shape, grid)
    if tokens < 1 or tokens % cells:
        return f"returned {grid!r}, but {tokens} tokens can't be divided over {cells} cells"
    return ""


def tokens_before_cells(tokens: int, shape: FeatureShape, grid: tuple[int, int]) -> int:
    """How many of a connector's ``tokens`` precede those of the cells of ``grid``.

    One for each of ``shape.prefix``, or 0 if the connector drops these: then, the remaining tokens wouldn't fill the
    cells.
    """
    cells = tokens - shape.prefix
    return shape.prefix if cells > 0 and cells % (grid[0] * grid[1]) == 0 else 0


def embeddings_fault(output: Any, features: torch.Tensor, size: tuple[int, int]) -> str:
    """Why ``output`` for ``features`` [I, P, Dv] isn't embeddings [I, Q, Dl], ``size`` = (Q, Dl); "" if it is."""
    expected = (len(features), *size)
    if isinstance(output, torch.Tensor) and tuple(output.shape) == expected:
        return "" if output.is_floating_point() else f"returned dtype {output.dtype}, expected floating point"
    actual = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
    return (
        f"returned {actual} for features {tuple(features.shape)}, expected {expected} "
        "(tokens() and the language model's width)"
    )
