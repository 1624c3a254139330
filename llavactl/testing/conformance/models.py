"""Checks of vision backbones, connectors and language models."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llavactl.core.protocols import Encoder, ExportableVision, ShapedVision, SkeletonLanguage
from llavactl.core.schema import FeatureShape
from llavactl.core.tokenizer_check import tokenizer_fault
from llavactl.testing.conformance.boundary import conformance_check, protocol_problems, returned_problem, wrong_type

if TYPE_CHECKING:
    import torch

    from llavactl.core.protocols import Connector, Language, Vision

TOLERANCE = 1e-4


@conformance_check("vision")
def check_vision(vision: Vision) -> list[str]:
    """Checks that features are finite and have the declared shape.

    The features of an image must not depend on the batch, nor differ between calls.
    """
    problems: list[str] = []
    encoder: Any = vision.load("cpu", "float32")
    if problem := returned_problem("vision", "load", encoder, "cpu", "float32"):
        return [problem]
    problems += protocol_problems(encoder, Encoder)
    if not isinstance(encoder.shape, FeatureShape):
        return [*problems, wrong_type("shape of the encoder", encoder.shape, "a FeatureShape")]
    if isinstance(vision, ShapedVision) and (problem := returned_problem("vision", "shape", vision.shape())):
        return [*problems, problem]
    if isinstance(vision, ShapedVision) and vision.shape() != encoder.shape:
        problems.append(f"shape() returns {vision.shape()}, the encoder has {encoder.shape}")
    if isinstance(vision, ExportableVision):
        problems += _export_problems(vision)
    return [*problems, *_feature_problems(encoder)]


def _feature_problems(encoder: Encoder) -> Iterator[str]:
    import numpy as np
    import torch
    from PIL import Image

    images = [Image.new("RGB", size, color) for size, color in (((40, 30), "red"), ((30, 50), "blue"))]
    arrays: list[Any] = [encoder.preprocess(image) for image in images]
    for array in arrays:
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 3 or len(array) != 3:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            yield f"preprocess() returns {got}, expected float32 [3, H, W]"
            return
    again = pickle.loads(pickle.dumps(encoder.preprocess))(images[0])  # noqa: S301 - own data
    if not np.array_equal(again, arrays[0]):
        yield "preprocess() returns other pixels after it is pickled"
    if arrays[0].shape != arrays[1].shape:
        yield f"preprocess() returns pixels of different shapes, {arrays[0].shape} and {arrays[1].shape}"
        return
    pixels = torch.stack([torch.from_numpy(array) for array in arrays])
    features: Any = encoder.encode(pixels)
    expected = (2, encoder.shape.patches, encoder.shape.width)
    if not isinstance(features, torch.Tensor):
        yield wrong_type("encode()", features, "a tensor")
    elif tuple(features.shape) != expected:
        yield f"encode() returns shape {tuple(features.shape)}, expected {expected}"
    elif not torch.isfinite(features).all():
        yield "encode() returns non-finite values"
    elif not _close(encoder.encode(pixels[1:]), features[1:]):
        yield "the features of an image depend on the other images of the batch, or differ between calls"


def _export_problems(vision: ExportableVision) -> Iterator[str]:
    config: Any = vision.config
    if not isinstance(config, Mapping):
        yield wrong_type("config", config, "a mapping")
        return
    if missing := [key for key in ("model_type", "patch_size") if key not in config]:
        yield f"config has no {' and no '.join(missing)}"
    if not callable(getattr(vision.processor, "save_pretrained", None)):
        yield wrong_type("processor", vision.processor, "an image processor of transformers")
    if not isinstance(vision.inside, bool):
        yield wrong_type("inside", vision.inside, "a bool")
    if problem := returned_problem("vision", "whole", vision.whole()):
        yield problem


@conformance_check("connectors")
def check_connector(connector: Connector, *, grid: tuple[int, int] = (4, 4), width: int = 16) -> list[str]:
    """Checks the rules of ``Connector``, and that every trainable parameter has a gradient.

    The features have the ``grid`` (h, w) and ``width``, and no prefix; one prefix token if the connector refuses such a
    shape with a RecipeError.
    """
    import torch

    from llavactl.core.errors import RecipeError
    from llavactl.model.connector_check import connector_fault

    shape, language_width = FeatureShape(grid, width), 24
    try:
        problem = connector_fault(connector, shape, language_width, ("bfloat16",))
    except RecipeError:
        shape = FeatureShape(grid, width, prefix=1)
        problem = connector_fault(connector, shape, language_width, ("bfloat16",))
    if problem:
        return [problem]
    module = connector.build(shape, language_width)
    module(torch.randn(2, shape.patches, width)).sum().backward()
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [f"parameter {name} has no gradient" for name, parameter in trainable if parameter.grad is None]


@conformance_check("languages")
def check_language(language: Language) -> list[str]:
    """Checks for a fast tokenizer with an end-of-sequence token and a causal model that accepts embeddings."""
    import torch

    from llavactl.model.exactness import is_causal

    tokenizer: Any = language.tokenizer()
    if problem := returned_problem("languages", "tokenizer", tokenizer):
        return [problem]
    problems: list[str] = []
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        problems.append("tokenizer(): expected a fast tokenizer with an end-of-sequence token")
    model: Any = language.load("float32")
    if problem := returned_problem("languages", "load", model, "float32"):
        return [*problems, problem]
    weight = model.get_input_embeddings().weight
    if weight.dtype != torch.float32:
        problems.append(f"load('float32') returns weights in {weight.dtype}")
    if fault := tokenizer_fault(tokenizer, len(weight)):
        return [*problems, f"tokenizer(): {fault}"]
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        by_ids = model(input_ids=ids).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    if not _close(by_ids, by_embeddings):
        problems.append("the logits for input_ids and for their inputs_embeds differ")
    if not is_causal(model):
        problems.append("the model isn't causal: its logits depend on later tokens")
    if isinstance(language, SkeletonLanguage):
        problems += _skeleton_problems(language.skeleton(), model)
    return problems


def _skeleton_problems(skeleton: Any, model: Any) -> Iterator[str]:
    """Differences between the model without weights and the loaded one."""
    shapes = [{name: tuple(weight.shape) for name, weight in each.named_parameters()} for each in (skeleton, model)]
    if any(weight.device.type != "meta" for weight in skeleton.parameters()):
        yield "skeleton() has parameters on another device than meta"
    if different := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        yield f"skeleton() and load() differ in {len(set(different))} parameters, such as {different[0]}"


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.shape == other.shape and torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)
