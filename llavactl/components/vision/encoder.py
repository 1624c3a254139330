"""A vision transformer with its weights: pixels [I, 3, H, W] in, features [I, P, Dv] out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from llavactl.components.vision.pretrained import HINT, INSIDE, WHAT
from llavactl.core import progress
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import loading, out_of_memory, reason
from llavactl.core.schema import FeatureShape

if TYPE_CHECKING:
    from PIL import Image

    from llavactl.components.vision.pretrained import TransformersVision


@dataclass(frozen=True)
class Preprocess:
    """An RGB image to pixels [3, H, W] float32: padded to a square if asked, then the model's own processor."""

    processor: Any
    image: Literal["square", "pad"]

    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.image == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in channel_means(self.processor)))
        pixels = self.processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)


def channel_means(processor: Any) -> tuple[float, ...]:
    """The mean of each colour channel that ``processor`` subtracts; padding is filled with it.

    Raises:
        ModelError: it has none.
    """
    found = getattr(processor, "image_mean", None)
    if found is None:
        raise ModelError(
            "vision.image: pad needs image_mean, which is missing in preprocessor_config.json",
            hint="set `vision.image: square`, or add image_mean to preprocessor_config.json beside the weights",
        )
    return (found,) * 3 if isinstance(found, int | float) else tuple(found)


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """``image`` in the middle of a square of ``colour``; what is odd goes right or below (LLaVA's expand2square)."""
    import PIL.Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


_SUPPORTED = "a vision transformer such as CLIP, SigLIP or DINOv2 is expected; a plugin can add other encoders"

MAX_PREFIX = 32
"""Tokens before the patches, CLS and registers: more of them, and what is taken for patches is something else."""


class VisionEncoder:
    """The frozen backbone, an ``Encoder``."""

    def __init__(
        self, model: nn.Module, preprocess: Preprocess, shape: FeatureShape, layers: tuple[int, ...], skip: int
    ):
        self.model = model
        self.preprocess = preprocess
        self.shape = shape
        self._layers = layers
        self._skip = skip
        self._blocks = _blocks(model)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        first = next(self.model.parameters())
        seen: dict[int, torch.Tensor] = {}
        hooks = [self._watch(layer, seen) for layer in set(self._layers)]
        try:
            self.model(pixels.to(first.device, first.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([seen[layer] for layer in self._layers], dim=-1)[:, self._skip :]

    def _watch(self, layer: int, seen: dict[int, torch.Tensor]) -> Any:
        """Keeps hidden state ``layer``: what goes into the first block (0) or comes out of block ``layer - 1``.

        Not ``output_hidden_states``: some models put their final norm into the last one, which after
        the cut would be the one we need.
        """

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[0] = args[0] if args else kwargs["hidden_states"]

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        if layer == 0:
            return self._blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        return self._blocks[layer - 1].register_forward_hook(after)


def load_tower(vision: TransformersVision, device: str, dtype: str) -> VisionEncoder:
    """The tower of ``vision`` on ``device`` in ``dtype``, cut after the last block it needs.

    Raises:
        ModelError: a layer that doesn't exist, weights that don't fit, or pixels of another size.
    """
    model = read_whole(vision).to(device=torch.device(device), dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise ModelError(f"vision model {vision.options.model} has weights that are not finite in {dtype}")
    return _tower(vision, model)


def measure(vision: TransformersVision) -> FeatureShape:
    """The shape of the features of ``vision`` from its configuration: on PyTorch's meta device nothing is computed.

    Raises:
        ModelError: as ``load_tower``.
    """
    from transformers import AutoConfig, AutoModel

    kind = _kind(vision)
    with loading(WHAT, vision.options.model, HINT):
        config = AutoConfig.from_pretrained(vision.options.model, trust_remote_code=False)
        own = getattr(config, "vision_config", config)
        with torch.device("meta"):
            made = kind.from_config(own, trust_remote_code=False) if kind is AutoModel else kind(own)
    return _tower(vision, made.eval()).shape


def _tower(vision: TransformersVision, model: nn.Module) -> VisionEncoder:
    vision.number("num_hidden_layers")
    depth = len(_blocks(model))
    layers = tuple(layer if layer >= 0 else depth + 1 + layer for layer in vision.layers)
    if not all(0 <= layer <= depth for layer in layers) or not layers:
        raise ModelError(f"vision.layer {vision.options.layer}: the model has hidden states 0 to {depth}")
    _cut(model, max(max(layers), 1))
    side, patch = vision.number("image_size"), vision.number("patch_size")
    grid = (side // patch, side // patch)
    tower = VisionEncoder(model, Preprocess(vision.processor, vision.options.image), FeatureShape(grid, 1), layers, 0)
    return _measured(tower, vision, side)


def _measured(tower: VisionEncoder, vision: TransformersVision, side: int) -> VisionEncoder:
    """``tower`` with its shape measured on two blank images: tokens beyond the grid are CLS and registers.

    Two images, because some models process a batch as one sequence.
    """
    from PIL import Image

    what = f"vision model {vision.options.model}"
    pixels = torch.from_numpy(tower.preprocess(Image.new("RGB", (side, side))))[None].expand(2, -1, -1, -1)
    if pixels.shape[-2:] != (side, side):
        got = "x".join(map(str, pixels.shape[-2:]))
        raise ModelError(
            f"{what}: its processor returns {got} pixels, the model expects {side}x{side}",
            hint="correct preprocessor_config.json beside the weights",
        )
    try:
        features = tower.encode(pixels)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModelError(f"{what}: it can't be run on pixels only: {reason(error)}", hint=_SUPPORTED) from error
    grid = tower.shape.grid
    prefix = features.shape[1] - grid[0] * grid[1]
    if features.ndim != 3 or len(features) != 2 or not 0 <= prefix <= MAX_PREFIX:
        raise ModelError(
            f"{what}: its blocks return {tuple(features.shape)} for two images, expected a token for each of "
            f"{grid[0]}x{grid[1]} patches",
            hint=_SUPPORTED,
        )
    keep = prefix if vision.options.select == "cls-patch" else 0
    shape = FeatureShape(grid, features.shape[2], keep)
    return VisionEncoder(tower.model, tower.preprocess, shape, tower._layers, prefix - keep)


def _kind(vision: TransformersVision) -> Any:
    """The class of its model."""
    import transformers

    kinds = {"clip": transformers.CLIPVisionModel, "clip_vision_model": transformers.CLIPVisionModel}
    kinds |= {"siglip": transformers.SiglipVisionModel, "siglip_vision_model": transformers.SiglipVisionModel}
    return kinds.get(str(vision.config["model_type"]), transformers.AutoModel)


def read_whole(vision: TransformersVision) -> nn.Module:
    """The whole backbone; it may lie inside a LLaVA checkpoint of transformers."""
    from transformers import AutoConfig

    progress.quiet_transformers()
    part: dict[str, Any] = {}
    vision.check()
    with loading(WHAT, vision.options.model, HINT, weights=True):
        if vision.nested:
            part["config"] = AutoConfig.from_pretrained(vision.options.model, trust_remote_code=False).vision_config
            part["key_mapping"] = {INSIDE.pattern: ""}
        model, info = _kind(vision).from_pretrained(
            vision.options.model, output_loading_info=True, trust_remote_code=False, **part
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"vision model {vision.options.model}: {len(missing)} weights are missing, such as {missing[0]}"
        )
    found: nn.Module = model
    return found


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of blocks to take hidden states from")
    return max(lists, key=len)


def _cut(model: nn.Module, keep: int) -> None:
    """Drops the blocks after ``keep``: what they compute is never looked at."""
    blocks = _blocks(model)
    del blocks[keep:]
