"""Text of tokens, whole or cut anywhere, with every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.chat.assistant import Stops, Writer, text_of

from ..components.languages.test_image_token import ALL, TOKENIZERS

TEXTS = ("ab 🐕🦺🐈 ok 𝔸𝔹", "一只狗 naïve\n\n  é ", "🐕‍🦺🐕‍🦺", "plain, text. Don't ", "")


@pytest.mark.parametrize("name", ALL)
def test_streamed_and_truncated_text_is_a_prefix_of_the_decoded_text(tmp_path: Path, name: str) -> None:
    """Nothing is repeated or retracted; incomplete characters are omitted, complete ones kept."""
    tokenizer = TOKENIZERS[name](tmp_path)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = tokenizer.decode(ids, skip_special_tokens=True)
        writer = Writer(tokenizer, Stops(frozenset(), ()))
        pieces = [writer.take(token) for token in (*ids, None)]
        assert "".join(pieces) == writer.text == wanted
        cuts = [text_of(tokenizer, ids[:count]) for count in range(len(ids) + 1)]
        assert all(wanted.startswith(cut) and "\ufffd" not in cut for cut in cuts)
        assert [len(cut) for cut in cuts] == sorted(len(cut) for cut in cuts)
        assert cuts[-1] == wanted
