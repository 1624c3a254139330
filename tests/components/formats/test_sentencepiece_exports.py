"""With a SentencePiece vocabulary, an export has the token ids of training, also after an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.schema import IMAGE_TOKEN
from llavactl.testing import run_cli

from ..conftest import MODEL, llama_folder
from .conftest import Make
from .test_export import exported
from .test_import import llavactl_outputs, transformers_outputs

NEEDS_MODEL = pytest.mark.skipif(
    not MODEL.is_file(), reason="no SentencePiece model installed: see tests/vocabularies.txt"
)


@NEEDS_MODEL
@pytest.mark.parametrize(
    ("template", "legacy"),
    [
        ("vicuna-v1", True),
        pytest.param("llama-2", False, marks=pytest.mark.slow),
        pytest.param("plain", False, marks=pytest.mark.slow),
        pytest.param("vicuna-v1", False, marks=pytest.mark.slow),
        pytest.param("llama-2", True, marks=pytest.mark.slow),
        pytest.param("plain", True, marks=pytest.mark.slow),
    ],
)
def test_ids_equal_those_of_training(native: Make, tmp_path: Path, legacy: bool, template: str) -> None:
    """Tokenized as a continuation, text after ``<image>`` would lose its leading space."""
    folder = tiny(llama_folder(tmp_path / "llama", legacy=legacy))
    stage1 = template == "plain"  # it has no chat template
    model = native("ours", language=folder, template=template, method="connector" if stage1 else "full")
    verified = exported(model, "hf", tmp_path / "out")["verified"]
    assert (verified["verdict"], verified["prompts"]) == ("exact", 8)


def tiny(folder: Path) -> Path:
    """A language model with random weights for the vocabulary in ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=32000
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@NEEDS_MODEL
@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False])
def test_a_model_tuned_in_transformers_keeps_its_processors_ids(
    foreign: Callable[..., tuple[Any, Path]], toys: Path, tmp_path: Path, legacy: bool
) -> None:
    """In format hf; format llava, for code that splits the text at images, refuses it."""
    model, folder = foreign(tiny(llama_folder(tmp_path / "llama", legacy=legacy)))
    photo = sorted((toys / "images").iterdir())[0]
    expected, ids = transformers_outputs(model, folder, photo, "What is it?")
    image_token_id = model.config.image_token_id
    expected_ids = [IMAGE_TOKEN if token == image_token_id else token for token in ids]
    verified = exported(folder, "hf", tmp_path / "hf")["verified"]
    assert (verified["verdict"], verified["prompts"]) == ("exact", 8)
    for checkpoint in (folder, tmp_path / "hf"):
        logits, actual_ids = llavactl_outputs(checkpoint, photo, "What is it?")
        assert actual_ids == expected_ids
        assert (logits - expected[:, : logits.shape[-1]]).abs().max() < 1e-4
    result = run_cli("export", "--model", str(folder), "--format", "llava", "--to", str(tmp_path / "llava"))
    assert result.exit_code == (0 if legacy else 1), result.stderr
    assert (tmp_path / "llava").exists() == legacy
    assert legacy or "processor" in result.stderr


@NEEDS_MODEL
@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_trained_from_a_model_tuned_in_transformers(
    foreign: Callable[..., tuple[Any, Path]], toy: Path, toys: Path, tmp_path: Path, method: str
) -> None:
    """Models trained from it and their exports keep the processor's ids."""
    model, folder = foreign(tiny(llama_folder(tmp_path / "llama", legacy=False)))
    photo = sorted((toys / "images").iterdir())[0]
    _, ids = transformers_outputs(model, folder, photo, "What is it?")
    expected = [IMAGE_TOKEN if token == model.config.image_token_id else token for token in ids]
    keys = {"language.model": folder, "language.template": "tokenizer", "stage2.init": folder, "stage2.method": method}
    keys |= {"features.mode": "live", "stage2.max_steps": 1}
    how = [part for key, value in keys.items() for part in ("-o", f"{key}={value}")]
    done = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *how)
    assert done.exit_code == 0, done.stderr
    trained = toy / "runs/toy/stage2/model"
    assert llavactl_outputs(trained, photo, "What is it?")[1] == expected
    verified = exported(trained, "peft" if method == "lora" else "hf", tmp_path / "out")["verified"]
    assert (verified["verdict"], verified["prompts"]) == ("exact", 8)
    assert llavactl_outputs(tmp_path / "out", photo, "What is it?")[1] == expected
