"""Corrects differences of transformers 5 from SentencePiece (``tokenizer.model``, such as Vicuna's on the hub)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACES = (" ", "\N{LOWER ONE EIGHTH BLOCK}")
"""A space, and SentencePiece's character for it."""


def omits_space_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` prepends a space to texts, but not to texts that begin with one.

    SentencePiece, which LLaVA's training uses, prepends a space to all texts; transformers 5 doesn't.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    # The second condition excludes tokenizers that collapse runs of spaces.
    return ids("a") == ids(" a") and ids("a a") != ids("a  a")


def omitted_space_prefixes(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches the positions where ``tokenizer`` omits the space that SentencePiece prepends; None if it omits none.

    These are the beginning of a text and, if a space is also prepended after added tokens (``legacy``), their ends.
    """
    if not omits_space_prefix(tokenizer):
        return None
    added = sorted(
        (token.content for token in tokenizer.added_tokens_decoder.values() if not token.rstrip), key=len, reverse=True
    )
    without_space, with_space = (
        tokenizer(f"{''.join(added[:1])}{rest}", add_special_tokens=False)["input_ids"] for rest in ("a", " a")
    )
    starts = ["\\A", *(map(re.escape, added) if without_space == with_space else ())]
    return re.compile(f"(?:{'|'.join(starts)})(?=[{''.join(SPACES)}])")


def repair_merges(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Orders merges by the scores of SentencePiece's model, not by token ids as transformers 5 does.

    In Llama's vocabulary, runs of spaces have low ids but the lowest scores: merged by ids, ``a  b`` becomes other
    tokens than in training. Also makes ``save_pretrained`` write ``legacy``.
    """
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs.setdefault("legacy", tokenizer.legacy)
    file = Path(str(tokenizer.init_kwargs.get("vocab_file") or ""))
    if file.suffix == ".model" and file.is_file() and not file.with_name("tokenizer.json").is_file():
        _order_merges(tokenizer, file)
    return tokenizer


def _order_merges(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        return
    model = SentencePieceProcessor(model_file=str(file))
    scores = {model.id_to_piece(token): model.get_score(token) for token in range(model.get_piece_size())}

    def rank(merge: list[str]) -> tuple[float, int, int]:
        left, right = merge
        return scores.get(left + right, float("-inf")), len(left), len(right)

    backend["model"]["merges"].sort(key=rank, reverse=True)
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(backend)).model
