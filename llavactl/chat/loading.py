"""Loads a model folder with its vision backbone as an assistant."""

from __future__ import annotations

import logging
from pathlib import Path

from llavactl.chat.assistant import Assistant
from llavactl.core.errors import ModelError
from llavactl.core.model_description import read_description
from llavactl.core.registry import registry
from llavactl.data.encode import Encoding
from llavactl.features import Fingerprint, LiveFeatures, fingerprint
from llavactl.features.checked_encoder import load_encoder
from llavactl.features.device import default_device
from llavactl.model import folder as model_folder
from llavactl.recipe.sections import Features

log = logging.getLogger(__name__)


def load_assistant(folder: Path, device: str | None = None, *, template: str | None = None) -> Assistant:
    """Loads the model in ``folder`` and its vision backbone on ``device`` (default: the best available).

    ``template`` replaces the model's conversation template.

    Raises:
        ModelError: the model can't be read, or the backbone is not the one it was trained with.
    """
    device = device or default_device()
    description = read_description(folder)
    features = Features(**description["features"])
    vision = registry().create("vision", description["vision"])
    current = fingerprint(description["vision"], features)
    # A checkpoint written by another program names its backbone, but has no fingerprint of it.
    trained = Fingerprint(description["fingerprint"] or current.fields)
    # Models trained before a fingerprint field existed lack it: compare only the fields that they have.
    comparable = Fingerprint({key: current.fields[key] for key in current.fields if key in trained.fields})
    if different := trained.differences(comparable):
        raise ModelError(
            f"{folder}: the vision backbone is not the one this model was trained with: {'; '.join(different)}",
            hint="check the backbone that `vision` in llavactl.json names",
        )
    log.debug("loading model %s on %s", folder, device)
    loaded = model_folder.load(folder)
    loaded.bundle.model.to(device)
    template_component = registry().create("templates", template or description["template"])
    return Assistant(
        loaded.bundle.model,
        Encoding(template_component, loaded.bundle.tokenizer, loaded.bundle.image_tokens),
        LiveFeatures(load_encoder(vision, device, features.compute), current, device),
        description["image_order"],
        str(folder),
    )
