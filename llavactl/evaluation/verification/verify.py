"""Verifies an export: a process without llavactl and the model run the same prompts, and their outputs are compared.

Both compute in float32 on the CPU, one after the other, with unrounded features: rounding them to float16, as a
feature store does, would exceed the bounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import Assistant
from llavactl.components.formats.native import open_model
from llavactl.components.formats.processor_text import add_image_token
from llavactl.core.model_description import feature_shape, read_description
from llavactl.core.registry import registry
from llavactl.core.schema import Turn
from llavactl.data.encode import Encoding
from llavactl.evaluation.verification.compare import figures, prompt_logits
from llavactl.evaluation.verification.prompts import save_images, script_prompt, verification_conversations
from llavactl.evaluation.verification.result import Figure, VerificationResult, judge
from llavactl.evaluation.verification.script import ScriptRunner, run_isolated, run_script
from llavactl.features.checked_encoder import load_encoder
from llavactl.images.decode import decode
from llavactl.model import folder as model_folder
from llavactl.model.build import connector_tokens

if TYPE_CHECKING:
    import numpy as np

    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef
    from llavactl.images.image_file import ImageFile


def verify(
    model: Path, export: Path, script: Path, images: Sequence[ImageFile], *, run: ScriptRunner = run_isolated
) -> VerificationResult:
    """Compares the model folder ``model`` with its ``export``, which ``script`` loads, on prompts about ``images``.

    ``run`` runs the script with the export, the prompts file and the output file. The two models are never in memory
    at the same time.

    Raises:
        ProgramMissingError: the program that loads the export isn't installed.
        ModelError: the script can't load the export, or its outputs are not those of a verification script.
    """
    description = read_description(model)
    encoding = _encoding(model, description)
    conversations = verification_conversations(images, encoding)
    processor_tokenizer = open_model(model).tokenizer()
    add_image_token(processor_tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image_paths = save_images(conversations, folder)
        prompts = [script_prompt(turns, encoding, processor_tokenizer, image_paths) for turns in conversations]
        outputs = run_script(run, script, export, prompts, folder)
    assistant = _float32_assistant(model, description, encoding)
    merging: dict[str, Figure] = {}
    if description["method"] == "lora" and not (export / "adapter_config.json").is_file():
        merging["merging"] = Figure(_merge_adapter(assistant, conversations, description["precision"]))
    compared = figures(assistant, conversations, outputs, description["precision"])
    return judge(compared | merging, outputs.stated, prompts=len(conversations), images=len(images))


@dataclass(frozen=True)
class _UnroundedFeatures:
    """Features in float32, not rounded as in a store; and the preprocessed pixels."""

    encoder: Encoder

    def pixels(self, image: ImageRef) -> np.ndarray:
        return self.encoder.preprocess(decode(image.read()))

    def arrays(self, image: ImageRef) -> tuple[np.ndarray]:
        import torch

        return (self.encoder.encode(torch.from_numpy(self.pixels(image))[None])[0].numpy(),)


def _encoding(model: Path, description: Mapping[str, Any]) -> Encoding:
    """How the model's conversations become tokens; no weights are read."""
    template = registry().create("templates", description["template"])
    image_tokens = connector_tokens(description["connector"], feature_shape(description))
    return Encoding(template, open_model(model).tokenizer(), image_tokens)


def _float32_assistant(model: Path, description: Mapping[str, Any], encoding: Encoding) -> Assistant:
    """The model in float32; the connector is loaded again because it is stored in float32."""
    loaded = model_folder.load(model)
    loaded.bundle.model.float()
    model_folder.load_connector(loaded.bundle.model.connector, model)
    vision = registry().create("vision", description["vision"])
    features = _UnroundedFeatures(load_encoder(vision, "cpu", "float32"))
    return Assistant(loaded.bundle.model, encoding, features, "first", str(model))


def _merge_adapter(assistant: Assistant, conversations: Sequence[tuple[Turn, ...]], precision: str) -> float:
    """Merges the adapter and rounds all weights to ``precision``, as the export did.

    Returns the largest difference of logits before and after, relative to the largest one before.
    """
    import torch

    before = [prompt_logits(assistant, turns) for turns in conversations]
    language: Any = assistant.model.language
    assistant.model.language = language.merge_and_unload()
    with torch.no_grad():
        for weight in assistant.model.language.parameters():
            weight.copy_(weight.to(getattr(torch, precision)).float())
    after = [prompt_logits(assistant, turns) for turns in conversations]
    difference = max((one - other).abs().max().item() for one, other in zip(before, after, strict=True))
    return difference / max(logits.abs().max().item() for logits in before)
