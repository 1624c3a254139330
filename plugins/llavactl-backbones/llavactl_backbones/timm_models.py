"""Models of timm: vision transformers, and other networks with a grid of features.

timm is an optional dependency, imported on first use. A layer is the output of a block, or of a stage of a
hierarchical network: 1 is the first, -1 the last; before the model's final norm unless ``norm`` is true.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llavactl import (
    FeatureShape,
    ModelError,
    ModelId,
    Options,
    TransformersVision,
    TransformersVisionOptions,
    pad_to_square,
)
from llavactl_backbones.layers import checked_layers, load_frozen

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from PIL import Image

WEIGHTS = "model.safetensors"


class TimmOptions(Options):
    """Model ids on the hub begin with ``timm/``; a folder has the same files: config.json and model.safetensors."""

    model: ModelId = Field(description="model id or folder, in timm's format")
    layer: int | tuple[int, ...] = Field(
        -2, description="index of the block or stage (1: the first, -1: the last); several are concatenated in width"
    )
    select: Literal["patch", "cls-patch"] = Field("patch", description="cls-patch keeps class token and registers")
    image: Literal["square", "pad"] = Field(
        "pad", description="square: the model's own preprocessing; pad: pad to a square with the mean color first"
    )
    image_size: int | None = Field(
        None, gt=0, description="side of the square input in pixels; default: the model's. Positions are interpolated"
    )
    crop_pct: float | None = Field(
        1.0, gt=0, le=1, description="part of the resized image's side that the crop keeps; null: the model's"
    )
    norm: bool = Field(False, description="apply the model's final norm to the features")


class PerceptionEncoderOptions(TimmOptions):
    """PE-Lang is tuned for language models: its last layer is the one to use, and it has no final norm."""

    model: ModelId = Field(
        description="model id or folder, in timm's format, such as timm/vit_pe_lang_large_patch14_448.fb"
    )
    layer: int | tuple[int, ...] = Field(
        -1, description="index of the block (1: the first, -1: the last); several are concatenated in width"
    )


class Timm:
    """A model of timm, a ``Vision``, truncated after the last block that is needed."""

    prefix: ClassVar[str] = ""
    """The beginning of the names of its architectures."""

    def __init__(self, options: TimmOptions) -> None:
        self.options = options
        self._files = TransformersVision(TransformersVisionOptions(model=options.model))

    def check(self) -> None:
        self._folder()
        self.shape()

    def identity(self) -> Mapping[str, Any]:
        self._folder()
        data = self._data_config
        return {
            "backbone": self._config["architecture"],
            "weights": self._files.weights_hash(),
            "layers": list(self._layers(self._skeleton())),
            "norm": self.options.norm,
            "select": self.options.select,
            "image": self.options.image,
            "image_size": data["input_size"][-1],
            "processor": "timm.data.create_transform",
            "preprocessing": {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
            "config": self._config.get("model_args") or {},
        }

    def shape(self) -> FeatureShape:
        return self._encoder(self._skeleton()).shape

    def load(self, device: str, dtype: str) -> TimmEncoder:
        model = load_frozen(self._create(weights=True), self.options.model, device, dtype)
        return self._encoder(model)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        """The content of config.json.

        Raises:
            ModelError: the model is missing or not in timm's format.
        """
        path = self._files.file("config.json")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "architecture" not in config:
            raise ModelError(
                f"vision model {self.options.model}: config.json has no architecture, so it is not a model of timm",
                hint="ids of timm models begin with timm/; `vision.name: clip` loads models of transformers",
            )
        architecture = str(config["architecture"])
        if not architecture.startswith(self.prefix):
            raise ModelError(
                f"vision model {self.options.model}: its architecture is {architecture}, expected {self.prefix}…",
                hint="`vision.name: timm` accepts any architecture",
            )
        return config

    def _folder(self) -> Path:
        """The folder with config.json and weights, downloaded if necessary.

        Raises:
            ModelError: a file is missing or broken, or timm doesn't have the architecture.
        """
        architecture = self._config["architecture"]
        folder = self._files.file(WEIGHTS).parent
        self._files.weights_hash()  # checks the file
        timm = timm_module()
        if not timm.is_model(architecture):
            raise ModelError(
                f"vision model {self.options.model}: timm {timm.__version__} has no architecture {architecture!r}",
                hint="update timm",
            )
        return folder

    def _create(self, *, weights: bool) -> Any:
        """The complete model, with random weights unless ``weights``.

        Raises:
            ModelError: timm can't create the model or load its weights.
        """
        timm = timm_module()
        fixed_size = self.options.image_size is not None and timm.get_pretrained_cfg(self._config["architecture"])
        size = {"img_size": self.options.image_size} if fixed_size and fixed_size.fixed_input_size else {}
        try:
            return timm.create_model(f"local-dir:{self._folder()}", pretrained=weights, **size)
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
            raise ModelError(f"vision model {self.options.model}: timm can't load it: {_reason(error)}") from error

    def _skeleton(self) -> Any:
        """The model without weights, on PyTorch's meta device."""
        import torch

        with torch.device("meta"):
            return self._create(weights=False).eval()

    @cached_property
    def _data_config(self) -> dict[str, Any]:
        """The settings of the model's preprocessing: input_size, interpolation, mean, std, crop_pct, crop_mode."""
        timm_module()
        from timm.data import resolve_model_data_config

        changes: dict[str, Any] = {"crop_pct": self.options.crop_pct}
        if self.options.image_size is not None:
            changes["input_size"] = (3, self.options.image_size, self.options.image_size)
        data: dict[str, Any] = resolve_model_data_config(self._skeleton(), args=changes)
        return data

    def _layers(self, model: Any) -> tuple[int, ...]:
        layer = self.options.layer
        layers = (layer,) if isinstance(layer, int) else layer
        return checked_layers(layers, len(model.feature_info), first=1)

    def _encoder(self, model: Any) -> TimmEncoder:
        """The encoder of ``model``, which is truncated; its shape is measured on two blank images.

        Raises:
            ModelError: the layers don't exist or have different grids, or the model has no grid of features.
        """
        import torch
        from timm.data import create_transform

        if not hasattr(model, "forward_intermediates"):
            raise ModelError(
                f"vision model {self.options.model}: {type(model).__name__} of timm has no intermediate features",
                hint="use a vision transformer",
            )
        layers = self._layers(model)
        model.prune_intermediate_layers([max(layers) - 1], prune_norm=not self.options.norm, prune_head=True)
        data = self._data_config
        preprocess = TimmPreprocess(
            create_transform(**data, is_training=False), tuple(data["mean"]), self.options.image
        )
        keep_prefix = self.options.select == "cls-patch"
        try:
            return TimmEncoder(model, preprocess, layers, self.options.norm, keep_prefix, data["input_size"])
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"vision model {self.options.model}: it can't encode {data['input_size'][-1]} pixels: {_reason(error)}",
                hint="change `image_size`, or use a vision transformer",
            ) from error


class PerceptionEncoder(Timm):
    """A Perception Encoder, checked to be one."""

    prefix = "vit_pe_"


@dataclass(frozen=True)
class TimmPreprocess:
    """RGB image to pixels [3, H, W] float32: padded to a square if ``image`` is ``pad``, then timm's transform."""

    transform: Any
    mean: tuple[float, ...]
    image: Literal["square", "pad"]

    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.image == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in self.mean))
        pixels: np.ndarray = self.transform(image).numpy()
        return pixels


class TimmEncoder:
    """The frozen model; ``layers`` count from 1.

    Raises:
        ModelError: the model can't encode a blank image of ``input_size``, or its layers have different grids.
    """

    def __init__(
        self,
        model: Any,
        preprocess: TimmPreprocess,
        layers: tuple[int, ...],
        norm: bool,
        keep_prefix: bool,
        input_size: Any,
    ) -> None:
        import torch

        self.model = model
        self.preprocess = preprocess
        self._layers = layers
        self._blocks = sorted({layer - 1 for layer in layers})
        self._settings: dict[str, Any] = {"norm": norm}
        if "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:
            self._settings["return_prefix_tokens"] = True
        self._keep_prefix = keep_prefix
        states = self._states(torch.zeros(2, *input_size))
        grids = [(patches.shape[2], patches.shape[3]) for patches, _ in states]
        if len(set(grids)) > 1:
            listed = ", ".join(f"{layer}: {h}×{w}" for layer, (h, w) in zip(layers, grids, strict=True))
            raise ModelError(f"vision.layer: these layers have different grids and can't be concatenated ({listed})")
        prefix = states[0][1].shape[1] if keep_prefix else 0
        self.shape = FeatureShape(grids[0], sum(patches.shape[1] for patches, _ in states), prefix)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, H, W] to features [I, P, Dv]."""
        import torch

        with torch.inference_mode():
            return torch.cat([self._tokens(*state) for state in self._states(pixels)], dim=-1)

    def _tokens(self, patches: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Patches [I, Dv, h, w], after their prefix [I, N, Dv] if that is kept, as [I, P, Dv]."""
        import torch

        tokens = patches.flatten(2).transpose(1, 2)
        return torch.cat([prefix, tokens], dim=1) if self._keep_prefix else tokens

    def _states(self, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Patches [I, Dv, h, w] and prefix tokens [I, N, Dv] of every layer."""
        import torch

        first = next(self.model.parameters())
        with torch.inference_mode():
            outputs = self.model.forward_intermediates(
                pixels.to(first.device, first.dtype),
                indices=self._blocks,
                stop_early=True,
                intermediates_only=True,
                output_fmt="NCHW",
                **self._settings,
            )
        pairs = [_with_prefix(output) for output in outputs]
        return [pairs[self._blocks.index(layer - 1)] for layer in self._layers]


def _with_prefix(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and prefix tokens; timm returns patches alone if the model has no prefix tokens."""
    if isinstance(output, tuple | list):
        patches, prefix = output
        return patches, prefix
    return output, output.new_empty(len(output), 0, output.shape[1])


def _reason(error: Exception) -> str:
    """The beginning of the message of ``error``, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")


def timm_module() -> Any:
    """The package timm.

    Raises:
        ModelError: it is not installed, or it can't be imported.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm can't be imported: {error}", hint="pip install 'llavactl-backbones[timm]'") from error
    except RuntimeError as error:
        raise ModelError(
            f"timm can't be imported: {error}", hint="install the builds of torch and torchvision for the same device"
        ) from error
    return timm
