"""The SentencePiece model that a tokenizer of transformers 5 was converted from, for other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x[0-9A-F]{2}>")


PieceKind = Literal["normal", "unknown", "control", "user-defined", "byte"]
PrependScheme = Literal["always", "first", "never"]


class SentencePiece(NamedTuple):
    """A piece of a vocabulary; adjacent pieces are merged in the order of the ``score`` of the result."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece vocabulary: the ``pieces`` by token id, without tokens that were added to it.

    ``prepend_scheme``: a space is prepended to texts and to the text after each added token (``always``), to texts
    only (``first``), or to neither.
    """

    pieces: tuple[SentencePiece, ...]
    prepend_scheme: PrependScheme


def sentencepiece_vocabulary(tokenizer: PreTrainedTokenizerBase) -> SentencePieceVocabulary | None:
    """The SentencePiece vocabulary of ``tokenizer``; None if it has another kind of vocabulary.

    Raises:
        ModelError: SentencePiece can't represent the vocabulary.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if is_sentencepiece(backend):
        return SentencePieceVocabulary(tuple(pieces(backend)), backend["pre_tokenizer"]["prepend_scheme"])
    if _prepends_in_normalizer(backend):
        return SentencePieceVocabulary(tuple(pieces(backend)), "always")
    return None


def is_sentencepiece(backend: Mapping[str, Any]) -> bool:
    """Whether ``backend``, a ``tokenizer.json``, encodes like Llama's SentencePiece model.

    That is BPE without splitting into words, with ``▁`` for spaces.
    """
    pre_tokenizer = backend["pre_tokenizer"] or {}
    metaspace = pre_tokenizer.get("type") == "Metaspace" and not pre_tokenizer.get("split", True)
    return metaspace and backend["model"]["type"] == "BPE" and backend["model"]["byte_fallback"]


def _prepends_in_normalizer(backend: Mapping[str, Any]) -> bool:
    """Whether ``backend`` is such a model as older versions of transformers save it."""
    match backend:
        case {
            "model": {"type": "BPE", "byte_fallback": True},
            "pre_tokenizer": None,
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
        }:
            return True
    return False


def pieces(backend: Mapping[str, Any]) -> list[SentencePiece]:
    """The pieces of ``backend``, the ``tokenizer.json`` of a SentencePiece vocabulary.

    SentencePiece merges the adjacent pieces whose result has the highest score, so the score of a piece is the negative
    rank of its first merge.

    Raises:
        ModelError: SentencePiece can't represent the vocabulary.
    """
    model = backend["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][text] for text in texts] != list(range(len(texts))):
        raise ModelError("its token ids have gaps")
    if sum(map(bool, map(_BYTE.fullmatch, texts))) != 256:
        raise ModelError("it lacks tokens for single bytes")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merge_pairs(model["merges"])):
        ranks.setdefault(left + right, rank)
    special = {token["content"]: token["special"] for token in backend["added_tokens"]}

    def kind(token: int, text: str) -> PieceKind:
        if text == model["unk_token"] or (model["unk_token"] is None and token == 0):
            return "unknown"
        if _BYTE.fullmatch(text):
            return "byte"
        if text in special and text not in ranks:
            # A piece that results from a merge stays a normal piece: it also occurs inside words.
            return "control" if special[text] else "user-defined"
        return "normal"

    kinds = [kind(token, text) for token, text in enumerate(texts)]
    scores = [
        -float(ranks.get(text, len(ranks))) if kind == "normal" else 0.0
        for text, kind in zip(texts, kinds, strict=True)
    ]
    return [*map(SentencePiece, texts, scores, kinds)]


def merge_pairs(merges: Any) -> Iterator[tuple[str, str]]:
    """The pairs of ``merges`` in a ``tokenizer.json``, which older versions write as one string."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right
