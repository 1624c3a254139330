"""DINOv3's image processor without torchvision, which transformers' own needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

CLASS_NAMES = ("DINOv3ViTImageProcessor", "DINOv3ViTImageProcessorFast")
"""The values of ``image_processor_type`` in DINOv3 checkpoints."""

_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


class Dinov3Processor(PilBackend):
    """``DINOv3ViTImageProcessor`` of transformers, bit for bit: pixels are scaled to 0 … 1, resized, then normalized.

    Other processors resize 8-bit images and round, which differs by up to half a level per pixel.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012 - read by the base class
    do_resize = True
    do_rescale = True
    do_normalize = True

    def to_dict(self) -> dict[str, Any]:
        """The settings, under the name of transformers' class, which reads them from a saved model."""
        return {**super().to_dict(), "image_processor_type": CLASS_NAMES[0]}

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: Any,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **_: Any,
    ) -> BatchFeature:
        """Images [3, H, W] uint8 to pixels [3, size.height, size.width] float32."""
        pixels = []
        for image in images:
            values = torch.from_numpy(np.ascontiguousarray(image)).to(torch.float32)
            if do_rescale:
                values = values * rescale_factor
            if do_resize:
                values = torch.nn.functional.interpolate(
                    values[None], size=(size.height, size.width), mode=_MODES[resample], antialias=True
                )[0]
            if do_normalize:
                mean, std = (
                    torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (image_mean, image_std)
                )
                values = (values - mean) / std
            pixels.append(values.numpy())
        return BatchFeature(data={"pixel_values": np.stack(pixels)})
