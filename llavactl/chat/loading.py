"""Loads a model folder with its vision backbone as an assistant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from llavactl.chat.assistant import Assistant
from llavactl.core.errors import ModelError, RecipeError
from llavactl.core.model_description import feature_shape, read_description, require_component
from llavactl.core.protocols import GridConnector
from llavactl.core.registry import registry
from llavactl.data.encode import Encoding
from llavactl.features import Fingerprint, LiveFeatures, fingerprint
from llavactl.features.checked_encoder import load_encoder
from llavactl.features.device import default_device
from llavactl.model import folder as model_folder
from llavactl.model.compiled import CompiledDecoder, compile_blocker
from llavactl.model.quantized import Bits
from llavactl.recipe.sections import Features

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)

log = logging.getLogger(__name__)


def load_assistant(
    folder: Path,
    device: str | None = None,
    *,
    template: str | None = None,
    dtype: Dtype | None = None,
    quantize: Bits | None = None,
    compiled: bool = False,
) -> Assistant:
    """Loads the model in ``folder`` and its vision backbone on ``device`` (default: the best available).

    ``template`` replaces the model's conversation template. ``dtype`` is the dtype of the weights (default: as
    trained), ``quantize`` the number of bits of the language model's linear layers. With ``compiled``, conversations
    are decoded with a compiled step, and only one thread may use the assistant.

    Raises:
        ModelError: the model can't be read, or the backbone is not the one it was trained with.
        RecipeError: the language model can't be quantized, or its decoding can't be compiled.
    """
    device = device or default_device()
    description = read_description(folder)
    features = Features(**description["features"])
    vision = registry().create("vision", description["vision"])
    current = fingerprint(description["vision"], features)
    # A checkpoint of another program names its backbone, but has no fingerprint.
    trained = Fingerprint(description["fingerprint"] or current.fields)
    # Models trained before a fingerprint field existed lack it: compare only the fields that they have.
    comparable = Fingerprint({key: current.fields[key] for key in current.fields if key in trained.fields})
    if different := trained.differences(comparable):
        raise ModelError(
            f"{folder}: the vision backbone is not the one this model was trained with: {'; '.join(different)}",
            hint="check the backbone that `vision` in llavactl.json names",
        )
    log.debug("loading model %s on %s", folder, device)
    quantize_on = None if quantize is None else device
    loaded = model_folder.load(folder, dtype=dtype, quantize_on=quantize_on, bits=quantize or 4)
    bundle = loaded.bundle
    (bundle.model if quantize is None else bundle.model.connector).to(device)
    decoder = _compiled_decoder(bundle.model.language) if compiled else None
    shape, connector = feature_shape(description), registry().create("connectors", description["connector"])
    if template is None:
        require_component(folder, description, "template")
    template_component = registry().create("templates", template or description["template"])
    return Assistant(
        bundle.model,
        Encoding(template_component, bundle.tokenizer, bundle.image_tokens),
        LiveFeatures(load_encoder(vision, device, features.compute), current, device),
        description["image_order"],
        str(folder),
        shape,
        connector.grid(shape) if isinstance(connector, GridConnector) else None,
        decoder,
    )


def _compiled_decoder(language: PreTrainedModel) -> CompiledDecoder:
    if reason := compile_blocker(language):
        raise RecipeError(f"--compile: {reason}", hint="chat without it")
    return CompiledDecoder(language)
