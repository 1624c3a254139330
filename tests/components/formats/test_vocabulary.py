"""With a real SentencePiece vocabulary an export has the very ids of training, after an image, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import MODEL, llama_folder
from .conftest import Make
from .test_out import exported


@pytest.mark.skipif(not MODEL.is_file(), reason="there is no real SentencePiece model: tests/vocabularies.txt")
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["vicuna-v1", "llama-2"])
def test_ids_of_a_sentencepiece_vocabulary(native: Make, tmp_path: Path, legacy: bool, template: str) -> None:
    """Tokenised as the middle of a text, what follows ``<image>`` would lose its leading space."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = llama_folder(tmp_path / "llama", legacy=legacy)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=32000
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    model = native("ours", language=folder, template=template)
    verified = exported(model, "hf", tmp_path / "out")["verified"]
    assert verified["ids_equal"] == verified["text_equal"] == verified["prompts"] == 7
    assert verified["logits"] < 1e-4
