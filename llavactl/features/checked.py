"""Validation of the pixels and features of a loaded vision backbone, which may be a plugin's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core.errors import PluginError
from llavactl.core.protocols import ShapedVision
from llavactl.core.registry import plugin_of
from llavactl.core.schema import FeatureShape

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from llavactl.core.protocols import Encoder, Vision

ALIKE = 5e-2
"""Of the norm of an image's features: half precision in batches of another size costs less."""

_HINT = "`llavactl.testing.check_vision` tests a backbone by itself"


def load_encoder(vision: Vision, device: str, dtype: str) -> Encoder:
    """The encoder that ``vision`` loads, with its pixels and features validated.

    Raises:
        PluginError: it lacks a method, its shape is not a FeatureShape, or differs from ``vision.shape()``.
        ModelError: as of ``Vision.load``.
    """
    encoder = vision.load(device, dtype)
    label = f"vision backbone {type(vision).__name__} of plugin {plugin_of(vision)}"
    shape: Any = getattr(encoder, "shape", None)
    if not isinstance(shape, FeatureShape):
        raise PluginError(f"{label}: its encoder's shape is {shape!r}, expected a FeatureShape", hint=_HINT)
    if missing := [name for name in ("preprocess", "encode") if not callable(getattr(encoder, name, None))]:
        raise PluginError(f"{label}: its encoder has no {' and no '.join(missing)}", hint=_HINT)
    if isinstance(vision, ShapedVision) and (stated := vision.shape()) != shape:
        raise PluginError(f"{label}: shape() returned {stated}, but its encoder has {shape}", hint=_HINT)
    return CheckedEncoder(encoder, label, shape, CheckedPixels(encoder.preprocess, _pixel_shape(encoder)))


def _pixel_shape(encoder: Encoder) -> tuple[int, ...]:
    """The shape of a blank image's pixels; () if preprocessing refuses it."""
    from PIL import Image

    try:
        return np.shape(encoder.preprocess(Image.new("RGB", (64, 64))))
    except (Exception, SystemExit, GeneratorExit):  # noqa: BLE001 - it may refuse blank images
        return ()


@dataclass(frozen=True)
class CheckedPixels:
    """``preprocess``, validated: pixels [3, H, W] float32, of the shape ``size`` unless that is ()."""

    preprocess: Callable[[Image.Image], Any]
    size: tuple[int, ...]

    def __call__(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(self.preprocess(image), dtype=np.float32)
        if pixels.ndim != 3 or len(pixels) != 3 or (self.size and pixels.shape != self.size):
            expected = self.size if self.size[:1] == (3,) else "[3, H, W]"
            raise ValueError(f"preprocess returned pixels {pixels.shape}, expected {expected}")
        return pixels


@dataclass
class CheckedEncoder:
    """``encoder``, validated: features [I, P, Dv] of ``shape``, on the device of the pixels.

    The first batch of several images is compared with one of them alone.
    """

    encoder: Encoder
    label: str
    shape: FeatureShape
    preprocess: CheckedPixels
    compared: bool = False

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, H, W] to features [I, P, Dv].

        Raises:
            PluginError: the encoder returned something else.
        """
        import torch

        features: Any = self.encoder.encode(pixels)
        expected = (len(pixels), self.shape.patches, self.shape.width)
        found = type(features).__name__
        if isinstance(features, torch.Tensor):
            found = f"{tuple(features.shape)} on {features.device}"
        if not isinstance(features, torch.Tensor) or found != f"{expected} on {pixels.device}":
            raise PluginError(
                f"{self.label}: encode() returned {found}, expected {expected} on {pixels.device}", hint=_HINT
            )
        if not self.compared and len(pixels) > 1:
            self.compared = True
            alone = self.encode(pixels[-1:])
            if (alone - features[-1:]).norm() > ALIKE * features[-1:].norm():
                why = "an image's features depend on the other images of its batch, or differ between calls"
                raise PluginError(f"{self.label}: {why}", hint=_HINT)
        return features.detach()
