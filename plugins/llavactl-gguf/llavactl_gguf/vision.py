"""The vision encoder and the connector as llama.cpp's multimodal projector (``mmproj``).

llama.cpp's graph for the projector type ``mlp`` computes mm.2 · gelu(mm.0 · features).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llavactl import ExportableVision, ModelError, SavedModel, registry
from llavactl_gguf.file import FILE_TYPES, HINT, Key, StoredTensor, TensorType

if TYPE_CHECKING:
    import torch

Builds = Literal["cls-last", "cls-first"]
"""Where a build of llama.cpp puts the class token of CLIP; see the README."""

CONNECTORS = ("linear", "mlp2x-gelu")

ENCODERS = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS: Mapping[str, str | None] = {
    "quick_gelu": None,
    "gelu": "clip.use_gelu",
    "gelu_pytorch_tanh": "clip.use_gelu",
    "silu": "clip.use_silu",
}
"""The flag for each activation of transformers. llama.cpp's GELU is the approximation by tanh."""

BICUBIC = 3
"""Pillow's number of the filter that llama.cpp resizes images with."""

LINEAR_SCALE = 2.0**12
"""Scale of a linear connector before the GELU, whose values llama.cpp rounds to float16 between -10 and 10."""

_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_FLOAT32 = ("v.patch_embd.weight", "v.position_embd.weight")
"""Small matrices that are added to or multiplied with values which should not be rounded."""


def refuse_connector(connector: Mapping[str, Any]) -> None:
    """Raises ModelError for a connector that llama.cpp's projector can't represent."""
    extra = [f"{key}: {connector[key]}" for key, off in _OFF.items() if connector.get(key, off) != off]
    if connector["name"] not in CONNECTORS or extra:
        options = f" with {' and '.join(extra)}" if extra else ""
        raise ModelError(
            f"format gguf can't represent connector {connector['name']}{options}",
            hint=f"train with connector {' or '.join(CONNECTORS)}, without {' and '.join(_OFF)}",
        )


_OFF: Mapping[str, Any] = {"pixel_shuffle": 1, "norm": False}


def refuse_vision(vision: Mapping[str, Any]) -> None:
    """Raises ModelError for a vision backbone that llama.cpp's projector can't represent. Weights aren't read."""
    backbone = registry().create("vision", vision)
    if not isinstance(backbone, ExportableVision):
        raise ModelError(f"format gguf can't represent vision backbone {vision['name']}", hint="use CLIP or SigLIP")
    config = backbone.config
    kind = config["model_type"]
    if kind not in ENCODERS:
        raise ModelError(f"format gguf can't represent a vision backbone of type {kind}", hint="use CLIP or SigLIP")
    if vision["select"] == "cls-patch" and has_class_token(config):
        raise ModelError("format gguf can't represent vision.select: cls-patch", hint="train with vision.select: patch")
    if config["hidden_act"] not in ACTIVATIONS:
        message = f"format gguf can't represent a vision backbone with hidden_act {config['hidden_act']}"
        raise ModelError(message, hint=HINT)
    if 0 in _layers(vision, config):
        raise ModelError("format gguf can't represent vision.layer 0", hint="use a later layer")
    size, processor_size = config["image_size"], _processor_size(backbone.processor)
    if processor_size != size:
        raise ModelError(
            f"format gguf can't represent an image processor that resizes to {processor_size} instead of {size} pixels",
            hint="change the sizes in preprocessor_config.json",
        )


def vision_keys(saved: SavedModel, kind: TensorType, builds: Builds) -> Iterator[Key]:
    """The metadata of the projector's file."""
    from gguf import LlamaFileType

    vision, backbone = saved.description["vision"], saved.vision()
    config = backbone.config
    layers = _layers(vision, config)
    yield "general.type", "mmproj"
    yield "general.file_type", int(LlamaFileType[FILE_TYPES[kind]])
    yield "general.quantization_version", 2
    yield "clip.has_vision_encoder", True
    yield "clip.has_llava_projector", True
    yield "clip.projector_type", "mlp"
    yield "clip.vision.image_size", config["image_size"]
    yield "clip.vision.patch_size", config["patch_size"]
    yield "clip.vision.embedding_length", config["hidden_size"]
    yield "clip.vision.feed_forward_length", config["intermediate_size"]
    yield "clip.vision.projection_dim", int(saved.language_config().hidden_size)
    yield "clip.vision.attention.head_count", config["num_attention_heads"]
    yield "clip.vision.attention.layer_norm_epsilon", float(config["layer_norm_eps"])
    # Without feature_layer, builds run all blocks but the last.
    yield "clip.vision.block_count", max(layers)
    yield "clip.vision.feature_layer", sorted(layers)
    mean, std = _normalization(backbone.processor)
    yield "clip.vision.image_mean", mean
    yield "clip.vision.image_std", std
    if flag := ACTIVATIONS[config["hidden_act"]]:
        yield flag, True
    # How images become squares in training, for the verification script.
    yield "llavactl.vision.image", squares(saved)
    yield "llavactl.vision.resample", int(backbone.processor.to_dict()["resample"])
    if has_class_token(config):
        yield "llavactl.vision.class_token", builds.removeprefix("cls-")


def vision_tensors(saved: SavedModel, kind: TensorType, builds: Builds) -> Iterator[StoredTensor]:
    """The weights of the vision encoder, as far as they are needed, and of the connector."""
    vision, backbone = saved.description["vision"], saved.vision()
    layers = _layers(vision, backbone.config)
    for name, weight in backbone.whole().state_dict().items():
        stored = _name(name.removeprefix("vision_model."), max(layers))
        if stored is None:
            continue
        stored_kind: TensorType = "f32" if stored in _FLOAT32 else kind
        if stored == "v.position_embd.weight" and has_class_token(backbone.config) and builds == "cls-last":
            yield StoredTensor.of(stored, weight, stored_kind, lambda positions: positions.roll(-1, 0))
        else:
            yield StoredTensor.of(stored, weight, stored_kind)
    yield from _connector_tensors(saved.connector_weights(), layers, kind)


def _connector_tensors(
    weights: Mapping[str, torch.Tensor], layers: Sequence[int], kind: TensorType
) -> Iterator[StoredTensor]:
    """The connector; the features of several layers are concatenated in llama.cpp in the order of the layers."""
    import torch

    def sorted_columns(weight: torch.Tensor) -> torch.Tensor:
        parts = weight.chunk(len(layers), dim=1)
        return torch.cat([part for _, part in sorted(zip(layers, parts, strict=True), key=lambda each: each[0])], dim=1)

    def with_negative(weight: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([weight, -weight], dim)

    if "weight" not in weights:
        yield StoredTensor.of("mm.0.weight", weights["0.weight"], kind, sorted_columns)
        yield StoredTensor.of("mm.0.bias", weights["0.bias"], kind)
        yield StoredTensor.of("mm.2.weight", weights["2.weight"], kind)
        yield StoredTensor.of("mm.2.bias", weights["2.bias"], kind)
        return
    # gelu(x) - gelu(-x) = x. Rounding the weights would not be that of x, so they are stored in float32.
    width, inputs = weights["weight"].shape
    hidden, identity = 2 * width, partial(torch.eye, width)
    scaled = partial(lambda weight: sorted_columns(weight.float()) * LINEAR_SCALE, weights["weight"])
    yield StoredTensor("mm.0.weight", (hidden, inputs), "f32", lambda: with_negative(scaled(), 0))
    yield StoredTensor("mm.0.bias", (hidden,), "f32", lambda: torch.zeros(hidden))
    yield StoredTensor("mm.2.weight", (width, hidden), "f32", lambda: with_negative(identity() / LINEAR_SCALE, 1))
    yield StoredTensor.of("mm.2.bias", weights["bias"], "f32")


def _name(name: str, blocks: int) -> str | None:
    """The name in llama.cpp of a weight of transformers; None if it isn't needed in the first ``blocks`` blocks."""
    if not name.startswith("encoder.layers."):
        return _NAMES.get(name)
    number, _, part = name.removeprefix("encoder.layers.").partition(".")
    module, _, kind = part.rpartition(".")
    return f"v.blk.{number}.{_BLOCK_NAMES[module]}.{kind}" if int(number) < blocks else None


def _layers(vision: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The hidden states that are the features, counted from 0, the embeddings."""
    layers = [vision["layer"]] if isinstance(vision["layer"], int) else vision["layer"]
    return [layer % (config["num_hidden_layers"] + 1) for layer in layers]


def squares(saved: SavedModel) -> Literal["pad", "crop", "stretch"]:
    """How images become squares in training; llama.cpp pads them, with bicubic resampling and its own color."""
    if saved.description["vision"]["image"] == "pad":
        return "pad"
    return "crop" if saved.vision().processor.to_dict().get("do_center_crop") else "stretch"


def has_class_token(config: Mapping[str, Any]) -> bool:
    """Whether the encoder has a token before its patches."""
    return bool(config["model_type"] == "clip_vision_model")


def _processor_size(processor: Any) -> int | str:
    """The side of the squares that ``processor`` resizes images to, or crops from images with this shortest edge.

    Its settings if these are others.
    """
    settings = processor.to_dict()
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    sides = {size.get("shortest_edge"), crop.get("height"), crop.get("width")}
    if not settings.get("do_center_crop"):
        sides = {size.get("height"), size.get("width")}
    (side, *others) = sides
    return side if settings.get("do_resize") and side and not others else f"{size}, cropped to {crop}"


def _normalization(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels between 0 and 1."""
    settings = processor.to_dict()
    mean, std = ([0.0] * 3, [1.0] * 3)
    if settings.get("do_normalize"):
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
    scale = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
    return [float(each / scale) for each in mean], [float(each / scale) for each in std]
