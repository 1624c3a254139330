"""A loaded vision backbone whose pixels and features are checked where they enter: it may be any author's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core.errors import PluginError
from llavactl.core.protocols import MeasuredVision
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
    """The encoder that ``vision`` loads, checked.

    Raises:
        PluginError: its shape is none, or not the one that ``vision.shape()`` gives.
        ModelError: as of ``Vision.load``.
    """
    encoder, who = vision.load(device, dtype), f"vision backbone {type(vision).__name__} of plugin {plugin_of(vision)}"
    shape: Any = getattr(encoder, "shape", None)
    if not isinstance(shape, FeatureShape):
        raise PluginError(f"{who}: the shape of its encoder is {shape!r}, not a FeatureShape", hint=_HINT)
    if isinstance(vision, MeasuredVision) and (said := vision.shape()) != shape:
        raise PluginError(f"{who}: shape() gives {said}, its encoder has {shape}", hint=_HINT)
    return CheckedEncoder(encoder, who, shape, CheckedPixels(encoder.preprocess, _size(encoder)))


def _size(encoder: Encoder) -> tuple[int, ...]:
    """The shape of what it makes of a blank image; () if it makes nothing of that."""
    from PIL import Image

    try:
        return np.shape(encoder.preprocess(Image.new("RGB", (64, 64))))
    except (Exception, SystemExit, GeneratorExit):  # noqa: BLE001 - it may well refuse such an image
        return ()


@dataclass(frozen=True)
class CheckedPixels:
    """``preprocess``, giving pixels [3, H, W] float32 alone, of shape ``size`` if that is not ()."""

    preprocess: Callable[[Image.Image], Any]
    size: tuple[int, ...]

    def __call__(self, image: Image.Image) -> np.ndarray:
        made = np.asarray(self.preprocess(image), dtype=np.float32)
        if made.ndim != 3 or len(made) != 3 or (self.size and made.shape != self.size):
            wanted = self.size if self.size[:1] == (3,) else "[3, H, W]"
            raise ValueError(f"preprocess gives pixels {made.shape}, not {wanted}")
        return made


@dataclass
class CheckedEncoder:
    """``encoder``, giving features [I, P, Dv] of ``shape`` alone, on the device of the pixels.

    The first batch of several images is compared with one of them alone.
    """

    encoder: Encoder
    who: str
    shape: FeatureShape
    preprocess: CheckedPixels
    compared: bool = False

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, H, W] to features [I, P, Dv].

        Raises:
            PluginError: it gave something else.
        """
        import torch

        made: Any = self.encoder.encode(pixels)
        wanted = (len(pixels), self.shape.patches, self.shape.width)
        if not isinstance(made, torch.Tensor) or tuple(made.shape) != wanted or made.device != pixels.device:
            found = f"{tuple(made.shape)} on {made.device}" if isinstance(made, torch.Tensor) else type(made).__name__
            raise PluginError(f"{self.who}: encode() should give {wanted} on {pixels.device}, gave {found}", hint=_HINT)
        if not self.compared and len(pixels) > 1:
            self.compared = True
            alone = self.encode(pixels[-1:])
            if (alone - made[-1:]).norm() > ALIKE * made[-1:].norm():
                why = "an image's features change with the other images of its batch, or from call to call"
                raise PluginError(f"{self.who}: {why}", hint=_HINT)
        return made.detach()
