"""From a model folder to an assistant that sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavactl.chat.assistant import Assistant
from llavactl.core.errors import ModelError
from llavactl.core.registry import registry
from llavactl.data.encode import Encoding
from llavactl.features import Fingerprint, LiveFeatures, fingerprint
from llavactl.features.checked import load_encoder
from llavactl.features.prepare import default_device
from llavactl.model import folder as model_folder
from llavactl.recipe.frame import Features


def open_assistant(folder: Path, device: str | None = None, *, template: str | None = None) -> Assistant:
    """The model in ``folder`` with its vision backbone, on ``device`` (default: the best there is).

    ``template`` takes the place of the model's own.

    Raises:
        ModelError: the model can't be read, or the backbone is not the one it was trained with.
    """
    device = device or default_device()
    description = model_folder.describe(folder)
    features = Features(**description["features"])
    vision = registry().create("vision", description["vision"])
    now = fingerprint(description["vision"], features)
    # A checkpoint that another program wrote names its backbone and has no fingerprint of it.
    then = Fingerprint(description["fingerprint"] or now.fields)
    # Models trained before a fingerprint field existed don't have it: compare only the fields that they have.
    if different := then.differences(Fingerprint({key: now.fields[key] for key in now.fields if key in then.fields})):
        raise ModelError(
            f"{folder}: the vision backbone is not the one this model was trained with: {'; '.join(different)}",
            hint="`vision` in llavactl.json names it",
        )
    loaded = model_folder.load(folder)
    loaded.bundle.model.to(device)
    writes: Any = registry().create("templates", template or description["template"])
    return Assistant(
        loaded.bundle.model,
        Encoding(writes, loaded.bundle.tokenizer, loaded.bundle.image_tokens),
        LiveFeatures(load_encoder(vision, device, features.compute), now, device),
        description["image_order"],
        str(folder),
    )
