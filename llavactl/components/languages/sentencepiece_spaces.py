"""Where transformers 5 differs from SentencePiece (``tokenizer.model``, as Vicuna's on the hub)."""

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
    """Whether ``tokenizer`` prepends a space to texts, except to those that begin with one.

    SentencePiece, which LLaVA's training uses, prepends it to all texts; transformers 5 doesn't.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    # The second condition excludes tokenizers that collapse every run of spaces.
    return ids("a") == ids(" a") and ids("a a") != ids("a  a")


def omitted_space_prefixes(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches the places where ``tokenizer`` omits SentencePiece's space before a space; None if it omits none.

    These are the beginning of a text and, if it also prepends a space after added tokens (``legacy``), their ends.
    """
    if not omits_space_prefix(tokenizer):
        return None
    added = sorted(
        (each.content for each in tokenizer.added_tokens_decoder.values() if not each.rstrip), key=len, reverse=True
    )
    one, other = (
        tokenizer(f"{''.join(added[:1])}{rest}", add_special_tokens=False)["input_ids"] for rest in ("a", " a")
    )
    before = ["\\A", *(map(re.escape, added) if one == other else ())]
    return re.compile(f"(?:{'|'.join(before)})(?=[{''.join(SPACES)}])")


def repair_merges(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Merges pieces in the order of the model's scores, as SentencePiece does, not of their ids.

    Llama's runs of spaces have low ids and the lowest score: by ids ``a  b`` becomes other tokens than those
    that the language model was trained on. Also keeps ``legacy`` in what ``save_pretrained`` writes.
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

    written = json.loads(tokenizer.backend_tokenizer.to_str())
    if written["model"]["type"] != "BPE":
        return
    model = SentencePieceProcessor(model_file=str(file))
    scores = {model.id_to_piece(token): model.get_score(token) for token in range(model.get_piece_size())}

    def rank(merge: list[str]) -> tuple[float, int, int]:
        left, right = merge
        return scores.get(left + right, float("-inf")), len(left), len(right)

    written["model"]["merges"].sort(key=rank, reverse=True)
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(written)).model
