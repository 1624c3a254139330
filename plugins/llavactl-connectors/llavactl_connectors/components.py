"""The connectors and their options, without torch; the modules are in the other files of this package.

Tokens of ``average-pooling``, ``pixel-shuffle``, ``c-abstractor`` and ``ldp-v2`` belong to the cells of a grid over the
image. These connectors drop the tokens before the patches (CLS, registers). ``perceiver-resampler`` and ``q-former``
attend to all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from llavactl import FeatureShape, Options, RecipeError, RecipePath

if TYPE_CHECKING:
    from torch import nn

Factor = Annotated[int, Field(ge=1, le=64, description="n: merge n×n patches into one token")]
Norm = Annotated[
    bool, Field(strict=True, description="first normalize each patch to mean 0 and variance 1, without weights")
]
Heads = Annotated[int, Field(ge=1, le=256, description="attention heads")]


class MergingOptions(Options):
    """Options of connectors that merge each block of patches into one token."""

    factor: Factor = 2


@dataclass(frozen=True)
class MergingConnector:
    """A connector with a token for each block of ``factor`` x ``factor`` patches."""

    options: MergingOptions

    def tokens(self, shape: FeatureShape) -> int:
        h, w = self.grid(shape)
        return h * w

    def grid(self, shape: FeatureShape) -> tuple[int, int]:
        """The blocks (h, w), row by row.

        Raises:
            RecipeError: ``factor`` doesn't divide the patch grid.
        """
        (h, w), factor = shape.grid, self.options.factor
        if h % factor or w % factor:
            divisors = [str(n) for n in range(1, min(h, w) + 1) if h % n == w % n == 0]
            raise RecipeError(
                f"connector.factor {factor} does not divide the patch grid {h}x{w}",
                hint=f"available: {', '.join(divisors)}",
            )
        return h // factor, w // factor


class AveragePoolingOptions(MergingOptions):
    """``factor: 2`` replaces 2x2 patches by their mean: a quarter of the tokens."""

    layers: Annotated[Literal[1, 2], Field(description="linear layers of the projection, with a GELU in between")] = 2
    norm: Norm = False


@dataclass(frozen=True)
class AveragePooling(MergingConnector):
    """Mean of each block of patches, then a projection (DeCo)."""

    options: AveragePoolingOptions

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl].

        Raises:
            RecipeError: ``factor`` doesn't divide the patch grid.
        """
        from llavactl_connectors import pooling

        self.grid(shape)
        projection = pooling.projection(shape.width, language_width, self.options.layers)
        module = pooling.AveragePooling(shape.grid, self.options.factor, projection)
        return pooling.normalized(shape.width, module) if self.options.norm else module


class PixelShuffleOptions(MergingOptions):
    """``factor: 2`` concatenates 2x2 patches: a quarter of the tokens, four times as wide before the projection."""


@dataclass(frozen=True)
class PixelShuffle(MergingConnector):
    """Concatenation of each block of patches, layer normalization, then a projection (InternVL)."""

    options: PixelShuffleOptions

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl].

        Raises:
            RecipeError: ``factor`` doesn't divide the patch grid.
        """
        from llavactl_connectors import pooling

        self.grid(shape)
        return pooling.PixelShuffle(shape.grid, self.options.factor, shape.width, language_width)


class CAbstractorOptions(Options):
    """The defaults are those of Honeybee: 144 tokens per image."""

    tokens: Annotated[int, Field(ge=1, le=16384, description="tokens per image, a square number")] = 144
    depth: Annotated[int, Field(ge=1, le=24, description="blocks before and after the pooling, each")] = 3
    hidden: Annotated[int, Field(ge=1, le=16384, description="channels of the blocks")] = 1024
    norm: Norm = False

    @model_validator(mode="after")
    def _square(self) -> CAbstractorOptions:
        if isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens: expected a square number such as 64, 144 or 256, got {self.tokens}")
        return self


@dataclass(frozen=True)
class CAbstractor:
    """Residual blocks, adaptive average pooling, residual blocks and an MLP (Honeybee)."""

    options: CAbstractorOptions

    def tokens(self, shape: FeatureShape) -> int:
        self.grid(shape)
        return self.options.tokens

    def grid(self, shape: FeatureShape) -> tuple[int, int]:
        side, (h, w) = isqrt(self.options.tokens), shape.grid
        if side > min(h, w):
            raise RecipeError(
                f"connector.tokens {side**2} is a grid of {side}x{side}, larger than the patch grid {h}x{w}",
                hint=f"set `connector.tokens` to {min(h, w) ** 2} or less",
            )
        return side, side

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl].

        Raises:
            RecipeError: the patch grid has fewer rows or columns than the tokens.
        """
        from llavactl_connectors import honeybee, pooling

        options, cells = self.options, self.grid(shape)
        sizes = (shape.width, options.hidden, options.depth, language_width)
        module = honeybee.CAbstractor(shape.grid, cells, *sizes)
        return pooling.normalized(shape.width, module) if options.norm else module


class LdpV2Options(MergingOptions):
    """``factor: 2`` is that of MobileVLM V2: 24x24 patches become 144 tokens."""

    norm: Norm = False


@dataclass(frozen=True)
class LdpV2(MergingConnector):
    """An MLP, average pooling and a residual depthwise convolution (MobileVLM V2)."""

    options: LdpV2Options

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl].

        Raises:
            RecipeError: ``factor`` doesn't divide the patch grid.
        """
        from llavactl_connectors import mobilevlm, pooling

        self.grid(shape)
        module = mobilevlm.LdpV2(shape.grid, self.options.factor, shape.width, language_width)
        return pooling.normalized(shape.width, module) if self.options.norm else module


class PerceiverResamplerOptions(Options):
    """The defaults are those of OpenFlamingo: 64 tokens per image for any patch grid."""

    tokens: Annotated[int, Field(ge=1, le=4096, description="tokens per image: learned latents")] = 64
    layers: Annotated[int, Field(ge=1, le=48, description="layers of attention and feed-forward")] = 6
    heads: Heads = 8
    head_width: Annotated[int, Field(ge=1, le=1024, description="width of an attention head")] = 64


@dataclass(frozen=True)
class PerceiverResampler:
    """Learned latents that attend to all features and to themselves (Flamingo)."""

    options: PerceiverResamplerOptions

    def tokens(self, shape: FeatureShape) -> int:  # noqa: ARG002
        return self.options.tokens

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        from llavactl_connectors import flamingo

        options = self.options
        sizes = (options.tokens, options.layers, options.heads, options.head_width)
        return flamingo.PerceiverResampler(shape.width, *sizes, language_width)


class QFormerOptions(Options):
    """The defaults are the sizes of BLIP-2; ``model`` replaces them by those of its folder."""

    model: Annotated[
        RecipePath | None,
        Field(description="folder of a BLIP-2 model whose Q-Former and queries are the initial weights"),
    ] = None
    tokens: Annotated[int, Field(ge=1, le=4096, description="tokens per image: learned queries")] = 32
    layers: Annotated[int, Field(ge=1, le=48, description="layers; every other one has cross-attention")] = 12
    hidden: Annotated[int, Field(ge=1, le=16384, description="width of the layers, a multiple of `heads`")] = 768
    heads: Heads = 12
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout during training; BLIP-2: 0.1")] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> QFormerOptions:
        sizes = {"tokens", "layers", "hidden", "heads"}
        if self.model is not None and (given := sorted(sizes & self.model_fields_set)):
            raise ValueError(f"{given[0]}: determined by `model`; leave out one of both")
        if self.hidden % self.heads:
            raise ValueError(f"hidden: {self.hidden} is not a multiple of {self.heads} heads")
        return self


@dataclass(frozen=True)
class QFormer:
    """Learned queries that attend to each other and to all features (BLIP-2)."""

    options: QFormerOptions

    def tokens(self, shape: FeatureShape) -> int:  # noqa: ARG002
        if self.options.model is None:
            return self.options.tokens
        from llavactl_connectors import blip2

        tokens: int = blip2.pretrained_config(self.options.model).num_query_tokens
        return tokens

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl].

        Raises:
            ModelError: ``model`` isn't the folder of a BLIP-2 model, or was trained for features of another width.
        """
        from llavactl_connectors import blip2

        options = self.options
        if options.model is not None:
            return blip2.pretrained(options.model, options.dropout, shape.width, language_width)
        config = blip2.new_config(options.layers, options.hidden, options.heads, options.dropout, shape.width)
        return blip2.QFormer(options.tokens, config, language_width)
