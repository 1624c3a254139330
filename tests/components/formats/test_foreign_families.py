"""Checkpoints saved by transformers, with language models of many families, give its logits or are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.loading import load_assistant
from llavactl.core.errors import ModelError
from llavactl.core.schema import Turn
from llavactl.data.batches import collate
from llavactl.images.decode import decode
from llavactl.images.image_file import ImageFile
from llavactl.model.imported import resolve

from .families import EAGER, FAMILIES, families, language_of
from .test_import import transformers_outputs

OTHER_TENSOR_NAMES = {
    "gpt2", "gpt2-untied", "gpt-neo", "gpt-neox", "gpt-neox-tied", "gptj", "opt", "opt-projected", "bloom", "mpt",
    "falcon",
}  # fmt: skip
"""Families that the fixture, which uses Llama's tensor names, can't build a checkpoint of."""

REFUSED = {"phi": "lm_head.bias", "minicpm-like": "scales"}
"""Families with computations that ``LlavaForConditionalGeneration`` omits and that can't be disabled."""


class UnroundedFeatures:
    """Features in float32, not rounded as in a feature store."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def arrays(self, image: Any) -> Any:
        import torch

        pixels = torch.from_numpy(self.encoder.preprocess(decode(image.read())))[None]
        return (self.encoder.encode(pixels)[0].numpy(),)


@pytest.mark.parametrize("family", families(FAMILIES.keys() - OTHER_TENSOR_NAMES))
def test_logits_equal_those_of_transformers(
    foreign: Callable[..., tuple[Any, Path]], toys: Path, tmp_path: Path, family: str, caplog: Any
) -> None:
    import torch

    caplog.set_level(logging.INFO)
    model, folder = foreign(language_of(family, toys / "language", tmp_path / "language"))
    photo = sorted((toys / "images").iterdir())[0]
    expected, _ = transformers_outputs(model, folder, photo, "What is it?")
    if family in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family]):
            load_assistant(resolve(folder), "cpu")
        return
    assistant = load_assistant(resolve(folder), "cpu")
    turn = Turn("user", (ImageFile(str(photo.parent), photo.name), "\n", "What is it?"))
    features: Any = assistant.features
    unrounded: Any = UnroundedFeatures(features.encoder)
    with torch.no_grad():
        logits = assistant.model.logits(collate([assistant.encode((turn,))], unrounded))[0]
    difference = (logits - expected[:, : logits.shape[-1]]).abs().max().item()
    assert difference < 1e-4 * expected.abs().max()
    assert (assistant.model.language.config._attn_implementation == "eager") == (family in EAGER)
    assert any("eager" in record.message for record in caplog.records) == (family in EAGER)
