"""A Llama tokenizer read from ``tokenizer.model``, as Vicuna's on the hub: SentencePiece's own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("text", ["a  b.  And   c", "def f():\n    return  1\n        # deep", "\t\t  x  \n  "])
def test_runs_of_spaces_are_joined_last(llama: Any, text: str) -> None:
    """Their pieces have low ids and the lowest score; transformers 5 alone goes by ids."""
    assert llama.tokenizer("x" + text, add_special_tokens=False)["input_ids"] == llama.speaker("x" + text)[1:]


def test_saved_and_read_again_it_is_the_same(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    llama.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a  b</s>USER: c  d </s><s>[INST] e"
    assert again(text)["input_ids"] == llama.tokenizer(text)["input_ids"] == llama.speaker(text)
