"""Spaces at the beginning of a text and after added tokens are encoded as by SentencePiece."""

from __future__ import annotations

import copy
import re

import pytest
from tokenizers import AddedToken

from llavactl.core.registry import registry
from llavactl.core.schema import Turn
from llavactl.data.encode import Encoding

from ..conftest import Vocabulary

ADDED = ("<box>", "blorp", "blor")
TEXTS = (
    "blorp x", "blorp  x<box> y", "<box> <box>z", " blor blorpy", "x <box>", "  x", "▁x blorp▁y", "no\n blorp \n",
)  # fmt: skip


@pytest.fixture(scope="module")
def extended(llama: Vocabulary) -> Vocabulary:
    """``llama`` with added tokens."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in ADDED])
    return Vocabulary(tokenizer, llama.reference)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("split", [False, True])
def test_spaces_around_added_tokens(extended: Vocabulary, text: str, split: bool) -> None:
    """LLaVA's slow tokenizer splits text at added tokens and encodes each part with SentencePiece."""
    tokenizer, reference = extended.tokenizer, extended.reference
    assert reference is not None
    wanted = []
    for at, part in enumerate(re.split(f"({'|'.join(ADDED)})", f"{text}\n")):
        if part in ADDED:
            wanted.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            wanted += reference.encode_piece(part, reference.legacy or at == 0)
    content = (text[:3], text[3:]) if split else (text,)
    encoding = Encoding(registry().create("templates", {"name": "plain"}), tokenizer, 1)
    found = encoding.encode((Turn("user", ()), Turn("assistant", content)))
    ids = [token for token in found.ids if token >= 0]
    assert ids == [1, *wanted]
    assert list(found.labels)[-len(wanted) :] == wanted
