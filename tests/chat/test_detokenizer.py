"""Detokenization of complete and truncated token sequences with every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.chat.detokenizer import Detokenizer, Stops, decode_tokens

from ..components.languages.test_image_token import ALL, TOKENIZERS

TEXTS = ("ab 🐕🦺🐈 ok 𝔸𝔹", "一只狗 naïve\n\n  é ", "🐕‍🦺🐕‍🦺", "plain, text. Don't ", "")


@pytest.mark.parametrize("name", ALL)
def test_streamed_and_truncated_text_is_a_prefix_of_the_decoded_text(tmp_path: Path, name: str) -> None:
    """No text is repeated or retracted; incomplete characters are omitted, complete ones kept."""
    tokenizer = TOKENIZERS[name](tmp_path)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        output = Detokenizer(tokenizer, Stops(frozenset(), ()))
        pieces = [output.add(token) for token in (*ids, None)]
        assert "".join(pieces) == output.text == expected
        cuts = [decode_tokens(tokenizer, ids[:count]) for count in range(len(ids) + 1)]
        assert all(expected.startswith(cut) and "\ufffd" not in cut for cut in cuts)
        assert [len(cut) for cut in cuts] == sorted(len(cut) for cut in cuts)
        assert cuts[-1] == expected
