"""Tokenizers that turn text into nothing, or into ids without embeddings, are refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import ModelError
from llavactl.core.registry import registry
from llavactl.core.tokenizer_check import tokenizer_fault

SPECIALS = {"eos_token": "</s>", "unk_token": "<unk>"}


def language(folder: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(folder)})


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gpt2", "opt", "llama", "phi3"])
def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 400}))
    with pytest.raises(ModelError, match="no tokenizer files in") as raised:
        language(tmp_path).tokenizer()
    assert "save_pretrained" in raised.value.hint


def test_ids_without_embeddings_are_refused(toys: Path, tmp_path: Path) -> None:
    shutil.copytree(toys / "language", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ModelError, match=r"embeddings for 300 tokens"):
        language(tmp_path / "model").tokenizer()


def fast(model: Any, **parts: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def test_odd_but_working_tokenizers_are_accepted() -> None:
    from tokenizers import Regex, decoders, models, pre_tokenizers

    tokens = {"<unk>": 0, "</s>": 1}
    words = models.WordLevel({**tokens, "ROUGE": 2, "一": 3}, unk_token="<unk>")
    assert not tokenizer_fault(fast(words, pre_tokenizer=pre_tokenizers.Whitespace()), 4)
    letters = models.WordLevel({**tokens, "a": 2, "b": 3}, unk_token="<unk>")
    assert not tokenizer_fault(fast(letters, pre_tokenizer=pre_tokenizers.Split(Regex("."), "isolated")), 4)
    pieces = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁quelle", -1.0)], unk_id=0)
    metaspace = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    assert not tokenizer_fault(fast(pieces, **metaspace), None)
    known = fast(models.WordLevel({"ROUGE": 0}), pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(Exception, match="UNK"):
        known("another word")
    assert not tokenizer_fault(known, None)


def test_a_special_token_without_an_embedding_is_accepted_if_it_is_never_written() -> None:
    """As ``<image_soft_token>`` of Gemma 3 1B."""
    from tokenizers import models

    tokenizer = fast(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert not tokenizer_fault(tokenizer, 3)
    tokenizer.chat_template = "<image>{{ messages[0].content }}"
    assert "ids up to 3" in tokenizer_fault(tokenizer, 3)
    tokenizer.chat_template = None
    tokenizer.add_tokens(["word"])
    assert "ids up to 4" in tokenizer_fault(tokenizer, 4)


def test_a_vocabulary_of_special_tokens_is_refused() -> None:
    from tokenizers import decoders, models

    empty = fast(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    assert "empty vocabulary" in tokenizer_fault(empty, 2)
    assert "empty vocabulary" in tokenizer_fault(fast(models.BPE()), None)
    spaces = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -1.0)], unk_id=0)
    assert "empty vocabulary" in tokenizer_fault(fast(spaces, decoder=decoders.Metaspace()), None)
