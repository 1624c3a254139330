"""SigLIP 2 NaFlex on a fixed square grid.

NaFlex gives every image its own grid, with its aspect ratio. A feature store has one shape, so images are made square
first; every image then has the same grid, the largest square one with at most ``max_num_patches`` patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llavactl import FeatureShape, ModelId, Options, TransformersVisionOptions, pad_to_square
from llavactl_backbones.layers import checked_layers, load_frozen
from llavactl_backbones.sized import FamilyVision

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


class NaflexOptions(Options):
    """NaFlex has no class token. 256 patches: 16×16; 576: 24×24; 1024: 32×32."""

    model: ModelId = Field("google/siglip2-so400m-patch16-naflex", description="model id or folder")
    layer: int | tuple[int, ...] = Field(
        -2, description="index of the hidden state (0: embeddings); several layers are concatenated in width"
    )
    image: Literal["square", "pad"] = Field(
        "pad", description="square: stretch to a square; pad: pad to a square with the mean color"
    )
    max_num_patches: int = Field(576, gt=0, description="most patches per image; the grid is square")


class _Checkpoint(FamilyVision):
    """The files of a NaFlex model; ``side`` is the number of patches in a row of the grid."""

    families = ("siglip2", "siglip2_vision_model")

    def __init__(self, options: TransformersVisionOptions, side: int) -> None:
        super().__init__(options)
        self.side = side

    def number(self, key: str) -> int:
        return self.side * super().number("patch_size") if key == "image_size" else super().number(key)

    @property
    def processor(self) -> Any:
        processor = super().processor
        settings = {"max_num_patches": self.side**2, "patch_size": self.number("patch_size")}
        return type(processor).from_dict({**processor.to_dict(), **settings})


class Naflex:
    """SigLIP 2 NaFlex, a ``Vision``."""

    def __init__(self, options: NaflexOptions) -> None:
        self.options = options
        self._side = math.isqrt(options.max_num_patches)
        self._checkpoint = _Checkpoint(
            TransformersVisionOptions(model=options.model, layer=options.layer, image=options.image), self._side
        )

    def check(self) -> None:
        self._checkpoint.check()
        self.shape()

    def identity(self) -> Mapping[str, Any]:
        return self._checkpoint.identity()

    def shape(self) -> FeatureShape:
        width = self._checkpoint.number("hidden_size") * len(self._layers())
        return FeatureShape((self._side, self._side), width)

    def load(self, device: str, dtype: str) -> NaflexEncoder:
        whole: Any = self._checkpoint.whole()
        model = getattr(whole, "vision_model", whole)
        layers = self._layers()
        del model.encoder.layers[max(layers) :]
        model = load_frozen(model, self.options.model, device, dtype)
        return NaflexEncoder(model, self._preprocess(), self.shape(), layers)

    def _layers(self) -> tuple[int, ...]:
        return checked_layers(self._checkpoint.layers, self._checkpoint.number("num_hidden_layers"), first=0)

    def _preprocess(self) -> NaflexPreprocess:
        return NaflexPreprocess(self._checkpoint.processor, self._side, self.options.image)


@dataclass(frozen=True)
class NaflexPreprocess:
    """RGB image to pixels [3, H, W] float32: made square, then the model's processor."""

    processor: Any
    side: int
    image: Literal["square", "pad"]

    def __call__(self, image: Image.Image) -> np.ndarray:
        processor = self.processor
        if self.image == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in processor.image_mean))
        # At this size the processor keeps the image as it is. It would enlarge small ones by a factor of at most 100.
        pixels = self.side * processor.patch_size
        image = image.resize((pixels, pixels), processor.resample)
        patches = processor(images=image, return_tensors="np")["pixel_values"][0]  # [side · side, p · p · 3]
        grid = patches.reshape(self.side, self.side, processor.patch_size, processor.patch_size, 3)
        joined: np.ndarray = grid.transpose(4, 0, 2, 1, 3).reshape(3, pixels, pixels)
        return joined.astype("float32")


@dataclass(frozen=True)
class NaflexEncoder:
    """The frozen model; its ``layers`` are non-negative indexes of hidden states, before the final norm."""

    model: Any
    preprocess: NaflexPreprocess
    shape: FeatureShape
    layers: tuple[int, ...]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, H, W] to features [I, P, Dv]. No patch is padding, so attention needs no mask."""
        import torch

        with torch.inference_mode():
            weight = self.model.embeddings.patch_embedding.weight
            side = self.preprocess.side
            grid = pixels.to(weight.device, weight.dtype).unflatten(3, (side, -1)).unflatten(2, (side, -1))
            patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            shapes = torch.tensor([self.shape.grid] * len(pixels))
            states = [self.model.embeddings(patches, shapes)]
            for block in self.model.encoder.layers:
                states.append(block(states[-1], None))
            return torch.cat([states[layer] for layer in self.layers], dim=-1)
