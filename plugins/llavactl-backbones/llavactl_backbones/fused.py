"""Features of several backbones, concatenated in width for every patch, as in prismatic (DINOv2 and SigLIP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from llavactl import (
    FeatureShape,
    LlavactlError,
    ModelError,
    Options,
    ShapedVision,
    check_component,
    component_identity,
    registry,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

PRISMATIC = (
    {"name": "dinov2", "model": "facebook/dinov2-with-registers-large", "image_size": 384},
    {"name": "siglip", "model": "google/siglip-so400m-patch14-384"},
)
"""27×27 patches of width 1024 + 1152."""


class FusedOptions(Options):
    """Each part is a vision backbone with its options, of this or another plugin."""

    parts: tuple[dict[str, Any], ...] = Field(
        PRISMATIC,
        min_length=2,
        validate_default=True,
        description="vision backbones with their options, such as `[{name: dinov2, …}, {name: siglip, …}]`; "
        "all must have the same grid",
    )

    @field_validator("parts")
    @classmethod
    def _complete(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """The parts with all their options, and paths made absolute."""
        complete, problems = [], []
        for index, part in enumerate(parts):
            try:
                complete.append(_complete(part))
            except (LlavactlError, ValueError) as error:
                problems.append(f"{index}: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(complete)


def _complete(part: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(part.get("name"), str):
        raise ValueError("expected a mapping with a name: the name of a vision backbone")
    options = registry().options("vision", part)
    return {"name": part["name"], **options.model_dump(mode="json")}


class Fused:
    """Several backbones, a ``Vision``; only their patches are used, without class tokens and registers."""

    def __init__(self, options: FusedOptions) -> None:
        self.options = options

    @cached_property
    def _parts(self) -> list[Any]:
        return [registry().create("vision", part) for part in self.options.parts]

    def check(self) -> None:
        for part in self._parts:
            check_component(part)
        self.shape()

    def identity(self) -> Mapping[str, Any]:
        """The parts in order; options only of parts that don't identify their weights: llavactl adds all options."""
        parts: list[Any] = [component_identity("vision", part) for part in self.options.parts]
        weights = [part.get("identity", {}).get("weights") for part in parts]
        for part, known in zip(parts, weights, strict=True):
            if known:
                del part["options"]
        return {"backbone": "fused", "parts": parts} | ({"weights": weights} if all(weights) else {})

    def shape(self) -> FeatureShape:
        for part, spec in zip(self._parts, self.options.parts, strict=True):
            if not isinstance(part, ShapedVision):
                raise ModelError(f"vision backbone {spec['name']} can't be fused: it is not a ShapedVision (no shape)")
        return self._fused_shape([part.shape() for part in self._parts])

    def load(self, device: str, dtype: str) -> FusedEncoder:
        encoders = tuple(part.load(device, dtype) for part in self._parts)
        shape = self._fused_shape([encoder.shape for encoder in encoders])
        return FusedEncoder(encoders, FusedPreprocess(tuple(encoder.preprocess for encoder in encoders)), shape)

    def _fused_shape(self, shapes: Sequence[FeatureShape]) -> FeatureShape:
        names = [part["name"] for part in self.options.parts]
        grids = [f"{name} {shape.grid[0]}×{shape.grid[1]}" for name, shape in zip(names, shapes, strict=True)]
        if len({shape.grid for shape in shapes}) > 1:
            raise ModelError(
                f"fused backbones need the same grid of patches, got {', '.join(grids)}",
                hint="change `image_size` of a part: a grid has image_size / patch size patches per side",
            )
        if prefixed := [name for name, shape in zip(names, shapes, strict=True) if shape.prefix]:
            raise ModelError(
                f"fused backbones can't keep class tokens: {', '.join(prefixed)}",
                hint="set `select: patch` in every part",
            )
        return FeatureShape(shapes[0].grid, sum(shape.width for shape in shapes))


@dataclass(frozen=True)
class FusedPreprocess:
    """RGB image to the pixels of all parts as one array [3, N, 1], N the sum of their H · W."""

    parts: tuple[Any, ...]

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.concatenate([np.reshape(part(image), (3, -1, 1)) for part in self.parts], axis=1)


class FusedEncoder:
    """The encoders of all parts."""

    def __init__(self, encoders: Sequence[Any], preprocess: FusedPreprocess, shape: FeatureShape) -> None:
        from PIL import Image

        self.preprocess = preprocess
        self.shape = shape
        self._encoders = encoders
        blank = Image.new("RGB", (64, 64))
        self._sizes = [np.shape(part(blank))[1:] for part in preprocess.parts]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, N, 1] to features [I, P, Dv]."""
        import torch

        parts = pixels[..., 0].split([height * width for height, width in self._sizes], dim=2)
        features = [
            encoder.encode(part.unflatten(2, size).contiguous())
            for encoder, part, size in zip(self._encoders, parts, self._sizes, strict=True)
        ]
        return torch.cat(features, dim=-1)
