"""SigLIP, DINOv2 and DINOv3: llavactl's ``TransformersVision`` with defaults and, for DINO, any image size.

A layer is an index of transformers' ``hidden_states``: the output of a block, before the model's final norm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from llavactl import ModelError, ModelId, TransformersVision, TransformersVisionOptions

_MODEL = "model id or folder"


class SiglipOptions(TransformersVisionOptions):
    """SigLIP has no class token. The image size is that of the checkpoint: 224, 256, 384 or 512 pixels."""

    model: ModelId = Field("google/siglip-so400m-patch14-384", description=_MODEL)


class Siglip2Options(TransformersVisionOptions):
    """As ``SiglipOptions``; SigLIP 2 with a fixed image size is a SigLIP model with other weights."""

    model: ModelId = Field("google/siglip2-so400m-patch14-384", description=_MODEL)


class SizedOptions(TransformersVisionOptions):
    """Options of a backbone that encodes squares of any size."""

    image_size: int = Field(gt=0, description="side of the square input in pixels")


class Dinov2Options(SizedOptions):
    """The default size has 24×24 patches, as many as CLIP ViT-L/14 at 336 pixels."""

    model: ModelId = Field("facebook/dinov2-with-registers-large", description=_MODEL)
    image_size: int = Field(
        336, gt=0, description="side of the square input in pixels; position embeddings are interpolated"
    )


class Dinov3Options(SizedOptions):
    """The default size has 24×24 patches, as many as CLIP ViT-L/14 at 336 pixels."""

    model: ModelId = Field("facebook/dinov3-vitl16-pretrain-lvd1689m", description=_MODEL)
    image_size: int = Field(384, gt=0, description="side of the square input in pixels; positions are rotary")


class FamilyVision(TransformersVision):
    """A model of transformers, checked to belong to one of ``families``."""

    families: ClassVar[tuple[str, ...]]
    """The values of ``model_type`` in config.json."""

    def check(self) -> None:
        super().check()
        _ = self.config  # checks the family

    @property
    def config(self) -> Mapping[str, Any]:
        """As in ``TransformersVision``.

        Raises:
            ModelError: the model belongs to another family.
        """
        config = super().config
        if config["model_type"] not in self.families:
            raise ModelError(
                f"vision model {self.options.model}: model_type is {config['model_type']!r}, expected "
                f"{' or '.join(self.families)}",
                hint="`vision.name: clip` accepts any vision transformer of transformers",
            )
        return config


class Siglip(FamilyVision):
    """A SigLIP model, at the image size of its checkpoint."""

    families = ("siglip", "siglip_vision_model")


class Dinov2(FamilyVision):
    """A DINOv2 model at ``options.image_size`` pixels.

    Its processor resizes the shorter side to that size and crops the longer one; the checkpoint's resizes to 256 and
    crops to 224, which cuts off the borders of padded images.
    """

    families: ClassVar[tuple[str, ...]] = ("dinov2", "dinov2_with_registers")
    options: SizedOptions

    def number(self, key: str) -> int:
        if key == "image_size":
            return _checked_size(self.options.image_size, super().number("patch_size"))
        return super().number(key)

    @property
    def processor(self) -> Any:
        return with_size(super().processor, self.options.image_size)


class Dinov3(Dinov2):
    """A DINOv3 ViT at ``options.image_size`` pixels; its processor stretches images that are not square."""

    families = ("dinov3_vit",)

    @property
    def processor(self) -> Any:
        from llavactl_backbones.dinov3_pixels import CLASS_NAMES, Dinov3Processor

        _ = self.config  # checks the files
        if path := self.file("preprocessor_config.json", required=False):
            settings = json.loads(path.read_text(encoding="utf-8"))
            if settings.get("image_processor_type") in CLASS_NAMES:
                return with_size(Dinov3Processor.from_dict(settings), self.options.image_size)
        return super().processor


def _checked_size(image_size: int, patch_size: int) -> int:
    if image_size < patch_size:
        raise ModelError(f"vision.image_size {image_size}: a patch has {patch_size} pixels")
    return image_size


def with_size(processor: Any, side: int) -> Any:
    """A copy of ``processor``, an image processor of transformers, whose pixels are ``side`` × ``side``."""
    square = {"height": side, "width": side}
    settings = processor.to_dict()
    if settings.get("do_center_crop"):
        settings |= {"size": {"shortest_edge": side}, "crop_size": square}
    else:
        settings |= {"size": square}
    return type(processor).from_dict(settings)
