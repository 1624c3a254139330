"""The model of a stage without its weights: configurations determine the names, shapes and number of its parameters."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import ShapedVision, SkeletonLanguage
from llavactl.core.registry import registry
from llavactl.features import stage_vision
from llavactl.model.build import build_connector
from llavactl.model.imported import resolve
from llavactl.model.llava import LlavaModel
from llavactl.training.initial_model import initial_language, starts_from_recipe_language
from llavactl.training.trainable import configure_trainable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llavactl.core.schema import FeatureShape
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage, StageNumber


def feature_shape(recipe: Recipe, stage: StageNumber) -> FeatureShape:
    """The shape of the vision features of ``stage``, from the configuration of the vision encoder.

    Raises:
        RecipeError: the vision encoder is a plugin's whose shape is unknown without its weights.
        ModelError: its configuration can't be read.
    """
    vision = stage_vision(recipe, stage)
    if not isinstance(vision, ShapedVision):
        raise RecipeError(
            f"vision encoder {recipe.vision.name!r} has no `shape`: without its weights, nothing can be predicted",
            hint="`llavactl train` without --dry-run works; the plugin's author can add `shape`",
        )
    return vision.shape()


def language_component(recipe: Recipe, stage: StageNumber) -> Any:
    """The language model that ``stage`` starts from; the one of an untrained stage is the recipe's."""
    init = recipe.stage(stage).settings.init
    folder = None if starts_from_recipe_language(recipe, stage) else resolve(init, recipe)
    return registry().create("languages", initial_language(recipe, stage, folder))


def stage_model(recipe: Recipe, stage: StageNumber, settings: AnyStage, shape: FeatureShape) -> LlavaModel:
    """Connector and language model of ``stage`` on the meta device, with the parameters that it trains.

    Raises:
        RecipeError: the language model is a plugin's that can't be inspected without weights, or the settings are
            invalid for it.
        ModelError: its configuration can't be read.
    """
    language = language_component(recipe, stage)
    if not isinstance(language, SkeletonLanguage):
        raise RecipeError(
            f"language model {recipe.language.name!r} has no `skeleton`: without its weights, nothing can be predicted",
            hint="`llavactl train` without --dry-run works; the plugin's author can add `skeleton`",
        )
    skeleton = language.skeleton()
    skeleton.config.use_cache = False
    with torch.random.fork_rng():
        connector, _ = build_connector(recipe.connector.spec(), shape, skeleton.get_input_embeddings().weight.shape[1])
        model = LlavaModel(connector.to("meta"), skeleton)
        with torch.device("meta"):
            # Adapters are the same for both methods; ``weights`` and ``dequantized`` know about 4 bits.
            adapted = settings.model_copy(update={"method": "lora"}) if settings.method == "qlora" else settings
            configure_trainable(model, adapted, recipe.seed)
    return model


@contextmanager
def dequantized(model: LlavaModel) -> Iterator[None]:
    """In this context the frozen linear layers of ``model`` are computed as with weights in 4 bits.

    A layer's weight is restored for each product and released after it (bitsandbytes' ``MatMul4Bit``).
    """
    head = model.language.get_output_embeddings()
    layers = [
        part
        for part in model.language.modules()
        if isinstance(part, nn.Linear) and part is not head and not part.weight.requires_grad
    ]
    for layer in layers:
        layer.forward = partial(_restored_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _restored_linear(layer: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _RestoredLinear.apply(features, layer.weight)
    return output if layer.bias is None else output + layer.bias


class _RestoredLinear(torch.autograd.Function):
    """x [..., K], weight [N, K] to x weightᵀ [..., N]; both passes need a copy of the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.clone(), None
