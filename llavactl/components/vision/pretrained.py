"""Vision encoders from transformers: CLIP, SigLIP, DINOv2 and other vision transformers with hidden states.

Only ``load`` and ``whole`` (in ``encoder.py``) read weights into memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pydantic import Field

from llavactl.core import hub
from llavactl.core.errors import ModelError
from llavactl.core.hashes import hash_file, hash_json
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_check import check_model
from llavactl.core.model_description import DESCRIPTION
from llavactl.core.model_files import PROCESSOR, WEIGHTS, check_files, shards_of, weight_files
from llavactl.core.options import ModelId
from llavactl.core.paths import read_json
from llavactl.core.registry import Options

if TYPE_CHECKING:
    from torch import nn

    from llavactl.components.vision.encoder import VisionEncoder
    from llavactl.core.schema import FeatureShape

CHECKPOINT_PREFIX = re.compile(r"^(model\.)?vision_tower\.(?!vision_tower\.)")
"""Prefix of the backbone's weights in a LLaVA checkpoint of transformers, before 4.52 and since."""

LABEL = "vision model"
HINT = "set `vision.model` to a model id or a folder"


class TransformersVisionOptions(Options):
    """``layer`` indexes transformers' ``hidden_states`` (0: embeddings); several layers are concatenated in width."""

    model: ModelId = Field(description="model id or folder")
    layer: int | tuple[int, ...] = Field(
        -2, description="index of the hidden state (0: embeddings); several layers are concatenated in width"
    )
    select: Literal["patch", "cls-patch"] = Field("patch", description="cls-patch keeps the CLS token")
    image: Literal["square", "pad"] = Field(
        "pad", description="square: resize and center-crop; pad: pad to a square with the mean color, then resize"
    )


class TransformersVision:
    """A vision transformer from a hub id or a folder, truncated after the last layer that is needed."""

    def __init__(self, options: TransformersVisionOptions) -> None:
        self.options = options

    @property
    def layers(self) -> tuple[int, ...]:
        layer = self.options.layer
        return (layer,) if isinstance(layer, int) else tuple(layer)

    @overload
    def file(self, name: str, *, required: Literal[True] = True) -> Path: ...
    @overload
    def file(self, name: str, *, required: bool) -> Path | None: ...
    def file(self, name: str, *, required: bool = True) -> Path | None:
        """The path of ``name`` in the model's folder, or in the hub's cache (downloaded if necessary).

        Raises:
            ModelError: a ``required`` file is missing.
        """
        model = self.options.model
        if Path(model).is_absolute():
            path = Path(model, name)
            if path.is_file():
                return path
            if not required:
                return None
            reason = f"{name} is missing" if Path(model).is_dir() else "folder not found"
            raise ModelError(f"{LABEL} {model}: {reason}", hint=HINT)
        return hub.download_file(name, LABEL, model, "set `vision.model` to a local folder", required=required)

    def check(self) -> None:
        """Check, without reading weights, that the backbone can be loaded.

        Raises:
            ModelError: a file is missing or invalid.
        """
        check_model(self.options.model, LABEL, PROCESSOR, weights=True, hint=HINT)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The vision part of config.json."""
        return {"model_type": self._full_config.get("model_type", "")} | self._full_config.get(
            "vision_config", self._full_config
        )

    @cached_property
    def _full_config(self) -> dict[str, Any]:
        """The content of config.json."""
        check_model(self.options.model, LABEL, PROCESSOR, hint=HINT)
        return read_json(self.file("config.json"))

    def number(self, key: str) -> int:
        """The integer ``key`` of its configuration.

        Raises:
            ModelError: the key is missing or not an integer, so this isn't a supported vision transformer.
        """
        if not isinstance(value := self.config.get(key), int):
            raise ModelError(
                f"{LABEL} {self.options.model}: config.json: {key}: expected an integer, got {value!r}",
                hint="use a vision transformer such as CLIP, SigLIP or DINOv2",
            )
        return value

    @cached_property
    def processor(self) -> Any:
        """The model's image processor with the Pillow backend.

        Torchvision is optional and computes different pixels. CLIP and SigLIP folders without a processor, such as
        vision encoders saved separately, get the default processor of their family at the model's image size.

        Raises:
            ModelError: another model has no processor, or the processor can't be loaded.
        """
        from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

        if self.file("preprocessor_config.json", required=False) or self.file("processor_config.json", required=False):
            with loading(LABEL, self.options.model, HINT):
                return AutoImageProcessor.from_pretrained(self.options.model, backend="pil", trust_remote_code=False)
        side = self.number("image_size")
        square = {"height": side, "width": side}
        match _model_type(self.config):
            case "clip_vision_model":
                return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
            case "siglip_vision_model":
                return SiglipImageProcessorPil(size=square)
        raise ModelError(
            f"{LABEL} {self.options.model}: preprocessor_config.json is missing",
            hint="add it to the folder of the weights: preprocessing can't be determined without it",
        )

    def identity(self) -> Mapping[str, Any]:
        depth = self.number("num_hidden_layers")
        processor = self.processor
        return {
            "backbone": _model_type(self.config),
            "weights": self.weights_hash(),
            "layers": [layer % (depth + 1) for layer in self.layers],
            "select": self.options.select,
            "image": self.options.image,
            "image_size": self.number("image_size"),
            "patch_size": self.number("patch_size"),
            "processor": type(processor).__name__,
            "preprocessing": hashlib.sha256(_canonical(processor).encode()).hexdigest()[:16],
            "config": hash_json(self._architecture())[:16],
        }

    def _architecture(self) -> dict[str, Any]:
        """The vision config without values equal to transformers' defaults, which checkpoints may include or omit."""
        from transformers import CONFIG_MAPPING

        config, model_type = dict(self.config), _model_type(self.config)
        if model_type in CONFIG_MAPPING:
            with loading(LABEL, self.options.model, HINT):
                config = CONFIG_MAPPING[model_type].from_dict(config).to_diff_dict()
        return {key: value for key, value in config.items() if key not in _IGNORED_KEYS and not key.startswith("_")}

    @property
    def nested(self) -> bool:
        """Whether the backbone is part of a LLaVA checkpoint."""
        return "vision_config" in self._full_config and bool(
            {"image_token_index", "image_token_id"} & self._full_config.keys()
        )

    @property
    def inside(self) -> bool:
        """Whether the backbone is stored inside a larger model and has no separate id or folder."""
        folder = Path(self.options.model)
        return self.nested or (folder.is_absolute() and folder.with_name(DESCRIPTION).is_file())

    def weights_hash(self) -> str:
        """sha256 of the weight files. In the hub's cache, large files are named by their sha256 and are not read.

        For a checkpoint that contains more than the backbone, sha256 of the backbone's tensors.
        """
        first = next((path for name in WEIGHTS if (path := self.file(name, required=False))), None)
        if first is None:
            raise ModelError(
                f"{LABEL} {self.options.model}: weights not found", hint=f"expected one of {', '.join(WEIGHTS)}"
            )
        files = [first]
        if first.suffix == ".json":
            if not Path(self.options.model).is_absolute():
                for shard in shards_of(first):
                    self.file(shard)
            files = weight_files(first.parent)
        check_files(files)
        if self.nested and first.name.startswith("model.safetensors"):
            return _tensors_hash(files)
        digests = [hash_file(file) for file in files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def whole(self) -> nn.Module:
        """The complete model on the CPU in its stored precision, for exports that include it."""
        from llavactl.components.vision.encoder import load_full_model

        return load_full_model(self)

    def shape(self) -> FeatureShape:
        """The shape of the features that ``load`` will return, measured on a model without weights.

        A process measures equal configurations once.
        """
        from llavactl.components.vision.encoder import measure

        options = self.options.model_dump(mode="json", exclude={"model"})
        key = hash_json([self._full_config, _canonical(self.processor), options])
        if key not in _SHAPES:
            _SHAPES[key] = measure(self)
        return _SHAPES[key]

    def load(self, device: str, dtype: str) -> VisionEncoder:
        from llavactl.components.vision.encoder import load_vision_encoder

        return load_vision_encoder(self, device, dtype)


_SHAPES: dict[str, FeatureShape] = {}
"""The measured shapes by a digest of the configuration."""


class ClipOptions(TransformersVisionOptions):
    """Defaults as in LLaVA: the second-to-last layer, patches without CLS."""


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = str(config.get("model_type", ""))
    return f"{model_type}_vision_model" if model_type in ("clip", "siglip") else model_type


_IGNORED_KEYS = frozenset("architectures dtype torch_dtype transformers_version model_type projection_dim".split())  # noqa: SIM905
"""Keys of a vision config that don't affect hidden states; the stored precision follows from the weights."""


def _canonical(processor: Any) -> str:
    """The settings of ``processor`` as JSON, without private keys and the class name."""
    settings = {k: v for k, v in processor.to_dict().items() if not k.startswith("_") and k != "image_processor_type"}
    return json.dumps(settings, sort_keys=True, default=str)


def _tensors_hash(files: Sequence[Path]) -> str:
    """sha256 of the backbone's tensors in ``files``, sorted by name."""
    import torch
    from safetensors import safe_open

    files_by_name: dict[str, Path] = {}
    for file in files:
        with reading(file), safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if CHECKPOINT_PREFIX.match(name)]  # noqa: SIM118 - not a dict
        files_by_name |= dict.fromkeys(names, file)
    digest = hashlib.sha256()
    for name in sorted(files_by_name, key=lambda name: CHECKPOINT_PREFIX.sub("", name)):
        file = files_by_name[name]
        with reading(file), safe_open(file, "pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        digest.update(CHECKPOINT_PREFIX.sub("", name).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
