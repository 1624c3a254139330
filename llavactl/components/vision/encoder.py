"""Vision transformers with weights: pixels [I, 3, H, W] to features [I, P, Dv]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from llavactl.components.vision.pretrained import CHECKPOINT_PREFIX, HINT, LABEL
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import loading, out_of_memory, reason
from llavactl.core.schema import FeatureShape

if TYPE_CHECKING:
    from PIL import Image

    from llavactl.components.vision.pretrained import TransformersVision


@dataclass(frozen=True)
class Preprocess:
    """RGB image to pixels [3, H, W] float32: pad to a square if ``image`` is ``pad``, then the model's processor."""

    processor: Any
    image: Literal["square", "pad"]

    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.image == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in channel_means(self.processor)))
        pixels = self.processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)


def channel_means(processor: Any) -> tuple[float, ...]:
    """The mean that ``processor`` subtracts from each color channel; padding is filled with it.

    Raises:
        ModelError: the processor has no image_mean.
    """
    means = getattr(processor, "image_mean", None)
    if means is None:
        raise ModelError(
            "vision.image: pad needs image_mean, which is missing in preprocessor_config.json",
            hint="set `vision.image: square`, or add image_mean to preprocessor_config.json beside the weights",
        )
    return (means,) * 3 if isinstance(means, int | float) else tuple(means)


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """``image`` centered in a square of ``color``; an odd pixel goes right or below (LLaVA's expand2square)."""
    import PIL.Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


_SUPPORTED = "use a vision transformer such as CLIP, SigLIP or DINOv2; plugins can add other encoders"

MAX_PREFIX = 32
"""Most tokens (CLS, registers) expected before the patches; more mean that the output isn't a patch grid."""


class VisionEncoder:
    """The frozen vision encoder; implements the ``Encoder`` protocol."""

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
        hidden_states: dict[int, torch.Tensor] = {}
        hooks = [self._capture(layer, hidden_states) for layer in set(self._layers)]
        try:
            self.model(pixels.to(first.device, first.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([hidden_states[layer] for layer in self._layers], dim=-1)[:, self._skip :]

    def _capture(self, layer: int, hidden_states: dict[int, torch.Tensor]) -> Any:
        """Register a hook that stores hidden state ``layer``: the input of the first block (0), or the output of block
        ``layer - 1``.

        ``output_hidden_states`` isn't used because some models apply their final norm to the last hidden state, which
        in a truncated model is the one that is needed.
        """

        def store_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states[0] = args[0] if args else kwargs["hidden_states"]

        def store_output(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            hidden_states[layer] = output[0] if isinstance(output, tuple) else output

        if layer == 0:
            return self._blocks[0].register_forward_pre_hook(store_input, with_kwargs=True)
        return self._blocks[layer - 1].register_forward_hook(store_output)


def load_vision_encoder(vision: TransformersVision, device: str, dtype: str) -> VisionEncoder:
    """The encoder of ``vision`` on ``device`` in ``dtype``, truncated after the last block that is needed.

    Raises:
        ModelError: a layer doesn't exist, weights are missing or not finite, or pixels have another size.
    """
    model = load_full_model(vision)
    model = model.to(device=torch.device(device), dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise ModelError(f"vision model {vision.options.model} has weights that are not finite in {dtype}")
    return _truncated_encoder(vision, model)


def measure(vision: TransformersVision) -> FeatureShape:
    """The shape of the features of ``vision``, from its configuration; runs on PyTorch's meta device.

    Raises:
        ModelError: see ``load_vision_encoder``.
    """
    from transformers import AutoConfig, AutoModel

    model_class = _model_class(vision)
    with loading(LABEL, vision.options.model, HINT):
        config = AutoConfig.from_pretrained(vision.options.model, trust_remote_code=False)
        vision_config = getattr(config, "vision_config", config)
        with torch.device("meta"):
            if model_class is AutoModel:
                model = model_class.from_config(vision_config, trust_remote_code=False)
            else:
                model = model_class(vision_config)
    return _truncated_encoder(vision, model.eval()).shape


def _truncated_encoder(vision: TransformersVision, model: nn.Module) -> VisionEncoder:
    vision.number("num_hidden_layers")
    depth = len(_blocks(model))
    layers = tuple(layer if layer >= 0 else depth + 1 + layer for layer in vision.layers)
    if not all(0 <= layer <= depth for layer in layers) or not layers:
        raise ModelError(f"vision.layer {vision.options.layer}: the model has hidden states 0 to {depth}")
    _truncate(model, max(max(layers), 1))
    side, patch = vision.number("image_size"), vision.number("patch_size")
    grid = (side // patch, side // patch)
    preprocess = Preprocess(vision.processor, vision.options.image)
    encoder = VisionEncoder(model, preprocess, FeatureShape(grid, 1), layers, 0)
    return _with_measured_shape(encoder, vision, side)


def _with_measured_shape(encoder: VisionEncoder, vision: TransformersVision, side: int) -> VisionEncoder:
    """``encoder`` with its shape measured on two blank images: tokens in excess of the grid are CLS and registers.

    Two images, because some models process a batch as one sequence.
    """
    from PIL import Image

    label = f"{LABEL} {vision.options.model}"
    pixels = torch.from_numpy(encoder.preprocess(Image.new("RGB", (side, side))))[None].expand(2, -1, -1, -1)
    if pixels.shape[-2:] != (side, side):
        got = "x".join(map(str, pixels.shape[-2:]))
        raise ModelError(
            f"{label}: its processor returns {got} pixels, the model expects {side}x{side}",
            hint="correct preprocessor_config.json beside the weights",
        )
    try:
        features = encoder.encode(pixels)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModelError(
            f"{label}: it can't be run with pixels as the only input: {reason(error)}", hint=_SUPPORTED
        ) from error
    grid = encoder.shape.grid
    prefix = features.shape[1] - grid[0] * grid[1]
    if features.ndim != 3 or len(features) != 2 or not 0 <= prefix <= MAX_PREFIX:
        raise ModelError(
            f"{label}: its blocks return {tuple(features.shape)} for two images, expected one token for each of "
            f"{grid[0]}x{grid[1]} patches",
            hint=_SUPPORTED,
        )
    kept_prefix = prefix if vision.options.select == "cls-patch" else 0
    shape = FeatureShape(grid, features.shape[2], kept_prefix)
    return VisionEncoder(encoder.model, encoder.preprocess, shape, encoder._layers, prefix - kept_prefix)


def _model_class(vision: TransformersVision) -> Any:
    """The transformers class that loads the vision model."""
    import transformers

    classes = {"clip": transformers.CLIPVisionModel, "clip_vision_model": transformers.CLIPVisionModel}
    classes |= {"siglip": transformers.SiglipVisionModel, "siglip_vision_model": transformers.SiglipVisionModel}
    return classes.get(str(vision.config["model_type"]), transformers.AutoModel)


def load_full_model(vision: TransformersVision) -> nn.Module:
    """The complete vision model, which may be part of a LLaVA checkpoint of transformers.

    Raises:
        ModelError: files or weights are missing.
    """
    from transformers import AutoConfig

    nested_options: dict[str, Any] = {}
    vision.check()
    with loading(LABEL, vision.options.model, HINT, weights=True):
        if vision.nested:
            config = AutoConfig.from_pretrained(vision.options.model, trust_remote_code=False)
            nested_options = {"config": config.vision_config, "key_mapping": {CHECKPOINT_PREFIX.pattern: ""}}
        model, info = _model_class(vision).from_pretrained(
            vision.options.model, output_loading_info=True, trust_remote_code=False, **nested_options
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"vision model {vision.options.model}: {len(missing)} weights are missing, such as {missing[0]}"
        )
    full_model: nn.Module = model
    return full_model


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of transformer blocks", hint=_SUPPORTED)
    return max(lists, key=len)


def _truncate(model: nn.Module, keep: int) -> None:
    """Remove the blocks after the first ``keep``; their output is not used."""
    blocks = _blocks(model)
    del blocks[keep:]
