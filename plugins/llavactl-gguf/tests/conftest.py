"""Models of toys in llavactl's folder, their exports, and the same computations without llama.cpp."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llavactl_gguf.format import Gguf, GgufOptions
from llavactl_gguf.outputs import LlamaCpp
from PIL import Image

from llavactl import open_model, registry, save_model
from llavactl.testing import toy_clip, toy_tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

WIDTH = 64
TOKENS = 420
"""Rows of embeddings, more than the toy tokenizer has tokens."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def causal_lm(folder: Path, model_type: str = "llama", **settings: Any) -> Path:
    """A causal language model of transformers with random weights; its norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    values = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": TOKENS,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values | settings))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
        elif "q_proj" in name or "k_proj" in name:  # otherwise attention is the same at all positions
            torch.nn.init.normal_(weight, std=0.12)
    model.save_pretrained(folder)
    return folder


def siglip(folder: Path, *, size: int = 28, **settings: Any) -> Path:
    """A SiglipVisionModel with random weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = SiglipVisionConfig(**values | {"image_size": size, "patch_size": 14} | settings)
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model and vision encoders that tests share."""
    folder = tmp_path_factory.mktemp("parts")
    toy_tokenizer(causal_lm(folder / "language"))
    return {
        "language": folder / "language",
        "clip": toy_clip(folder / "clip", size=56),
        "siglip": siglip(folder / "siglip", size=56),
    }


class Toys:
    """Writes models to llavactl's folder and exports them."""

    def __init__(self, folder: Path, parts: Mapping[str, Path]) -> None:
        self.folder, self.parts = folder, parts

    def model(
        self,
        *,
        vision: str | Path = "siglip",
        language: Path | None = None,
        connector: Mapping[str, Any] | None = None,
        template: str = "vicuna-v1",
        adapter: Path | None = None,
        precision: str = "float32",
        **options: Any,
    ) -> Path:
        """A model with random weights; ``options`` are those of the vision encoder."""
        model = self.folder / f"model-{len(list(self.folder.glob('model-*')))}"
        backbone = {"name": "clip", "model": str(self.parts.get(str(vision), vision))}
        backbone |= {"layer": -2, "select": "patch", "image": "pad", **options}
        language_model = {"name": "hf", "model": str(language or self.parts["language"])}
        connector = connector or {"name": "mlp2x-gelu"}
        torch.manual_seed(2)
        shape = registry().create("vision", backbone).shape()
        width = registry().create("languages", language_model).skeleton().config.hidden_size
        weights = registry().create("connectors", connector).build(shape, width).state_dict()
        save_model(
            model,
            weights,
            connector=connector,
            language=language_model,
            vision=backbone,
            template=template,
            precision=precision,
            adapter=adapter,
        )
        return model

    def export(self, model: Path, **options: Any) -> Path:
        """The export of ``model`` in float32, or with other ``options``."""
        to = model.with_name(f"{model.name}-export-{len(list(model.parent.glob(f'{model.name}-export-*')))}")
        to.mkdir()
        Gguf(GgufOptions(**{"type": "f32", **options})).write(model, to)
        return to


@pytest.fixture
def toys(tmp_path: Path, parts: dict[str, Path]) -> Toys:
    return Toys(tmp_path, parts)


def llama(export: Path) -> LlamaCpp:
    """``export`` in llama.cpp."""
    (model,), (mmproj,) = (list(export.glob(f"{name}-*.gguf")) for name in ("model", "mmproj"))
    return LlamaCpp(model, mmproj)


def ids(program: LlamaCpp, text: str) -> list[int]:
    """The token ids of ``text`` without images in llama.cpp."""
    return [token for chunk in program.chunks(text, []) for token in chunk]


def embeddings(model: Path, image: Image.Image) -> torch.Tensor:
    """The image embeddings [Q, D] of llavactl, in float32."""
    saved = open_model(model)
    encoder = registry().create("vision", saved.description["vision"]).load("cpu", "float32")
    width = saved.language_config().hidden_size
    connector = registry().create("connectors", saved.description["connector"]).build(saved.shape, width)
    connector.load_state_dict(saved.connector_weights())
    with torch.no_grad():
        embedded: torch.Tensor = connector(encoder.encode(torch.from_numpy(encoder.preprocess(image))[None]))[0]
    return embedded


def logits(model: Path, ids: list[int], image_embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """The logits [T, V] of the language model in transformers, with these embeddings at ids below 0."""
    language = open_model(model).language().float()
    tokens = torch.tensor(ids)
    with torch.no_grad():
        inputs = language.get_input_embeddings()(tokens.clamp(min=0))
        if image_embeddings is not None:
            inputs[tokens < 0] = image_embeddings
        computed: torch.Tensor = language(inputs_embeds=inputs[None]).logits[0]
    return computed


def difference(actual: Any, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert torch.as_tensor(actual).shape == expected.shape
    return ((torch.as_tensor(actual) - expected).abs().max() / expected.abs().max()).item()


def square(size: int = 56, seed: int = 0) -> Image.Image:
    """An image of the encoder's size, which no program resamples."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))
