"""Detokenization of complete and truncated token sequences with every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.detokenizer import MAX_PENDING, Detokenizer, Stops, decode_tokens

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


class CountingTokenizer:
    """Records how many tokens each call decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.longest = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.longest = max(self.longest, len(ids))
        return str(self.tokenizer.decode(ids, **options))


@pytest.mark.parametrize("name", ALL)
def test_the_time_per_token_is_constant(tmp_path: Path, name: str) -> None:
    """Also for endless bytes that are no character."""
    tokenizer = TOKENIZERS[name](tmp_path)
    words = tokenizer("a brown dog and 一只狗 🐕, ", add_special_tokens=False)["input_ids"] * 100
    fox = tokenizer("🦊", add_special_tokens=False)["input_ids"]
    for ids in (words, fox[:-1] * 500 if len(fox) > 1 else fox * 500):
        counting = CountingTokenizer(tokenizer)
        output = Detokenizer(counting, Stops(frozenset(), ("###", "\nUSER")))
        for token in ids:
            output.add(token)
            assert len(output._held) < 6
        assert counting.longest <= 2 * MAX_PENDING
