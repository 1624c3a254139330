"""A Llama tokenizer read from ``tokenizer.model``, such as Vicuna's on the hub, encodes like SentencePiece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("text", ["a  b.  And   c", "def f():\n    return  1\n        # deep", "\t\t  x  \n  "])
def test_runs_of_spaces_are_merged_last(llama: Any, text: str) -> None:
    """Their pieces have low ids and the lowest scores; transformers 5 merges by ids."""
    assert llama.tokenizer("x" + text, add_special_tokens=False)["input_ids"] == llama.reference("x" + text)[1:]


def test_a_saved_tokenizer_encodes_the_same(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    llama.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a  b</s>USER: c  d </s><s>[INST] e"
    assert again(text)["input_ids"] == llama.tokenizer(text)["input_ids"] == llama.reference(text)
