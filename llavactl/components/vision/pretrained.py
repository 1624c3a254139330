"""Vision transformers from transformers: CLIP, SigLIP, DINOv2 and whatever else gives hidden states.

Nothing here reads weights into memory; ``load`` does, in ``tower.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core import hub
from llavactl.core.errors import ModelError
from llavactl.core.hashes import hash_file, hash_json
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_check import check_model
from llavactl.core.model_files import PROCESSOR, WEIGHTS, check_files, shards_of, weight_files
from llavactl.core.options import ModelId
from llavactl.core.paths import read_json
from llavactl.core.registry import Options

if TYPE_CHECKING:
    from torch import nn

    from llavactl.components.vision.encoder import VisionEncoder
    from llavactl.core.schema import FeatureShape

INSIDE = re.compile(r"^(model\.)?vision_tower\.(?!vision_tower\.)")
"""What the backbone's weights are called inside a LLaVA checkpoint of transformers, before 4.52 and since."""

WHAT = "vision model"
HINT = "`vision.model` takes an id or a folder"


class TransformersVisionOptions(Options):
    """``layer`` indexes transformers' ``hidden_states`` (0: embeddings); several are concatenated in width."""

    model: ModelId
    layer: int | tuple[int, ...] = -2
    select: Literal["patch", "cls-patch"] = "patch"
    image: Literal["square", "pad"] = "pad"


class TransformersVision:
    """A vision transformer, an id or a folder, cut after the last layer that is needed."""

    def __init__(self, options: TransformersVisionOptions) -> None:
        self.options = options

    @property
    def layers(self) -> tuple[int, ...]:
        layer = self.options.layer
        return (layer,) if isinstance(layer, int) else tuple(layer)

    def file(self, name: str, *, required: bool = True) -> Path | None:
        """The path of ``name`` in the model's folder, or in the hub's cache (downloaded if need be)."""
        model = self.options.model
        if Path(model).is_absolute():
            path = Path(model, name)
            if path.is_file():
                return path
            if not required:
                return None
            why = f"no {name}" if Path(model).is_dir() else "no such folder"
            raise ModelError(f"{WHAT} {model}: {why}", hint=HINT)
        return hub.download_file(name, WHAT, model, "give a local folder as `vision.model`", required=required)

    def check(self) -> None:
        """Raises ModelError if the backbone can't be loaded, as far as its files show without reading weights."""
        check_model(self.options.model, WHAT, PROCESSOR, weights=True, hint=HINT)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The vision part of config.json."""
        return {"model_type": self._whole.get("model_type", "")} | self._whole.get("vision_config", self._whole)

    @cached_property
    def _whole(self) -> dict[str, Any]:
        """config.json."""
        check_model(self.options.model, WHAT, PROCESSOR, hint=HINT)
        path = self.file("config.json")
        assert path is not None
        return read_json(path)

    def number(self, key: str) -> int:
        """The number ``key`` of its configuration.

        Raises:
            ModelError: it has no such number, so it isn't a supported vision transformer.
        """
        if not isinstance(found := self.config.get(key), int):
            raise ModelError(
                f"{WHAT} {self.options.model}: no number {key} in its config.json",
                hint="expected a vision transformer such as CLIP, SigLIP or DINOv2",
            )
        return found

    @cached_property
    def processor(self) -> Any:
        """The model's image processor, computing with Pillow: torchvision makes other pixels, and may be there or not.

        A CLIP or SigLIP folder without one gets that of its family at the model's own size: bare towers are saved so.

        Raises:
            ModelError: another model without one, or a processor that can't be loaded.
        """
        from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

        if self.file("preprocessor_config.json", required=False) or self.file("processor_config.json", required=False):
            with loading(WHAT, self.options.model, HINT):
                return AutoImageProcessor.from_pretrained(self.options.model, backend="pil", trust_remote_code=False)
        side = self.number("image_size")
        square = {"height": side, "width": side}
        match _model_type(self.config):
            case "clip_vision_model":
                return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
            case "siglip_vision_model":
                return SiglipImageProcessorPil(size=square)
        raise ModelError(
            f"{WHAT} {self.options.model}: there is no preprocessor_config.json: how pixels are made is not known",
            hint="it belongs beside the weights",
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
        """What the vision config says beyond transformers' defaults, which a checkpoint may write out or omit."""
        from transformers import CONFIG_MAPPING

        config, kind = dict(self.config), _model_type(self.config)
        if kind in CONFIG_MAPPING:
            with loading(WHAT, self.options.model, HINT):
                config = CONFIG_MAPPING[kind].from_dict(config).to_diff_dict()
        return {key: value for key, value in config.items() if key not in _NOTES and not key.startswith("_")}

    @property
    def nested(self) -> bool:
        """Whether the backbone is part of a LLaVA checkpoint."""
        return "vision_config" in self._whole and bool({"image_token_index", "image_token_id"} & self._whole.keys())

    @property
    def inside(self) -> bool:
        """Whether the backbone is stored inside a larger model, so that no id or folder names it alone."""
        folder = Path(self.options.model)
        return self.nested or (folder.is_absolute() and folder.with_name("llavactl.json").is_file())

    def weights_hash(self) -> str:
        """sha256 over the weight files. The hub's cache names large files by theirs, so those are not read.

        Of a checkpoint that has more than the backbone, over the backbone's own tensors.
        """
        first = next((path for name in WEIGHTS if (path := self.file(name, required=False))), None)
        if first is None:
            raise ModelError(f"{WHAT} {self.options.model}: no weights", hint=f"expected one of {', '.join(WEIGHTS)}")
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
        """The backbone uncut, on the CPU as it is stored, for an export that holds it."""
        from llavactl.components.vision.encoder import read_whole

        return read_whole(self)

    def shape(self) -> FeatureShape:
        """What ``load`` will give, read off a tower without weights."""
        from llavactl.components.vision.encoder import measure

        return measure(self)

    def load(self, device: str, dtype: str) -> VisionEncoder:
        from llavactl.components.vision.encoder import load_tower

        return load_tower(self, device, dtype)


class ClipOptions(TransformersVisionOptions):
    """LLaVA's choice: the last layer but one, patches without CLS."""


def _model_type(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type", ""))
    return kind if kind.endswith("_vision_model") or kind not in ("clip", "siglip") else f"{kind}_vision_model"


_NOTES = frozenset("architectures dtype torch_dtype transformers_version model_type projection_dim".split())  # noqa: SIM905
"""Keys of a vision config that don't change hidden states; the weights decide the stored precision."""


def _canonical(processor: Any) -> str:
    settings = {k: v for k, v in processor.to_dict().items() if not k.startswith("_") and k != "image_processor_type"}
    return json.dumps(settings, sort_keys=True, default=str)


def _tensors_hash(files: Sequence[Path]) -> str:
    """sha256 over the backbone's tensors in ``files``, by name."""
    import torch
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in files:
        with reading(file), safe_open(file, "pt") as opened:
            found |= {name: file for name in opened.keys() if INSIDE.match(name)}  # noqa: SIM118 - it is no dict
    total = hashlib.sha256()
    for name in sorted(found, key=lambda name: INSIDE.sub("", name)):
        with reading(found[name]), safe_open(found[name], "pt") as opened:
            tensor = opened.get_tensor(name).contiguous()
        total.update(INSIDE.sub("", name).encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
