"""Exports in LLaVA's own code: `make test-original LLAVA=/path/to/LLaVA`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llavactl.evaluation.verification.verify import verify
from llavactl.images.image_file import ImageFile

from ..conftest import MODEL, llama_folder
from .conftest import Make
from .test_export import written

PYTHON, LLAVA = os.environ.get("LLAVA_PYTHON"), os.environ.get("LLAVA")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs LLaVA's own code: make test-original LLAVA=/path/to/LLaVA")

ROPE = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    "scaled": ("Llama", {"rope_parameters": ROPE}, {"template": "llama-2"}),
    "tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}, {"connector": "linear"}),
    "biased": ("Llama", {"attention_bias": True, "rms_norm_eps": 1e-3}, {"image": "square"}),
    "lora": ("Llama", {}, {"method": "lora"}),
    "class-token": ("Llama", {}, {"select": "cls-patch"}),
    "projector": ("Llama", {"rope_parameters": ROPE}, {"method": "connector", "template": "plain"}),
    "mistral": ("Mistral", {"num_key_value_heads": 2}, {}),
}


@pytest.mark.skipif(not MODEL.is_file(), reason="no SentencePiece model installed: see tests/vocabularies.txt")
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_sentencepiece_vocabularies(native: Make, toys: Path, tmp_path: Path, case: str, legacy: bool) -> None:
    kind, config, settings = CASES[case]
    language = llama_folder(tmp_path / "language", legacy=legacy)
    _save_language(kind, language, vocab_size=32000, **config)
    _assert_same_outputs(
        native("ours", language=language, **settings), toys, tmp_path / f"llava-{kind.lower()}-out", language
    )


def test_byte_level_vocabularies(native: Make, toys: Path, tmp_path: Path) -> None:
    _assert_same_outputs(native("ours"), toys, tmp_path / "llava-out", toys / "language")


def _save_language(kind: str, folder: Path, **config: Any) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = getattr(transformers, f"{kind}Config")(**small, initializer_range=0.3, **config)
    getattr(transformers, f"{kind}ForCausalLM")(made).save_pretrained(folder)


def _assert_same_outputs(model: Path, toys: Path, to: Path, language: Path) -> None:
    """Token ids, pixels, image embeddings, logits and greedy answers of LLaVA's code equal those of the model."""
    written(model, "llava", to)
    base = [language] if (to / "mm_projector.bin").is_file() else []

    def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
        command = [str(PYTHON), *map(str, (*arguments, *base))]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(LLAVA)}, capture_output=True, text=True)

    images = [ImageFile(str(file.parent), file.name) for file in sorted((toys / "images").iterdir())[:3]]
    verified = verify(model, to, Path(__file__).with_name("original_llava_outputs.py"), images, run=run)
    assert (verified.verdict, verified.faults) == ("exact", ())
    assert "embedding_cosine" in verified.compared
