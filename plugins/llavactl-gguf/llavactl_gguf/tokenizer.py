"""The tokenizer as metadata of the language model's file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llavactl import ModelError, SavedModel, Turn, sentencepiece_vocabulary
from llavactl_gguf.file import HINT, Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user-defined": 4, "unused": 5, "byte": 6}
"""``tokenizer.ggml.token_type``."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Splitter(NamedTuple):
    """How a byte-level BPE tokenizer splits text; ``merges_words``: it merges also words that are in the vocabulary."""

    steps: tuple[tuple[str, Any], ...]
    merges_words: bool


SPLITTERS: Mapping[_Splitter, str] = {
    _Splitter((("bytes", True),), True): "gpt-2",
    _Splitter((("digits", True), ("bytes", True)), True): "smollm",
    _Splitter((("split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"), ("bytes", False)), False): "llama-bpe",
    _Splitter((("split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}"), ("bytes", False)), True): "qwen2",
}
"""``tokenizer.ggml.pre`` of the tokenizers that llama.cpp has regular expressions for."""


class _Token(NamedTuple):
    text: str
    type: str
    score: float = 0.0


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, size: int, stop_ids: Sequence[int]) -> Iterator[Key]:
    """The metadata of ``tokenizer`` with ``size`` tokens, as many as embeddings; ``stop_ids`` end an answer.

    Raises:
        ModelError: llama.cpp would encode text differently.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_added_tokens(backend)
    sentencepiece = sentencepiece_vocabulary(tokenizer)
    if sentencepiece is not None:
        tokens = {
            token: _Token(piece.text, piece.kind, piece.score) for token, piece in enumerate(sentencepiece.pieces)
        }
        yield "tokenizer.ggml.model", "llama"
        yield "tokenizer.ggml.add_space_prefix", sentencepiece.prepend_scheme != "never"
    else:
        tokens = {index: _Token(text, "normal") for text, index in backend["model"].get("vocab", {}).items()}
        yield "tokenizer.ggml.model", "gpt2"
        yield "tokenizer.ggml.pre", _splitter_name(backend)
        merges = backend["model"]["merges"]
        yield "tokenizer.ggml.merges", [each if isinstance(each, str) else " ".join(each) for each in merges]
    for token in backend["added_tokens"]:
        if token["id"] not in tokens or sentencepiece is None:
            tokens[token["id"]] = _Token(token["content"], "control" if token["special"] else "user-defined")
    listed = [tokens.get(index, _Token(f"[PAD{index}]", "unused")) for index in range(size)]
    yield "tokenizer.ggml.tokens", [token.text for token in listed]
    yield "tokenizer.ggml.token_type", [TOKEN_TYPES[token.type] for token in listed]
    if sentencepiece is not None:
        yield "tokenizer.ggml.scores", [token.score for token in listed]
    yield from _special_tokens(tokenizer, stop_ids)


def refuse_template(saved: SavedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if text follows an added token, where llama.cpp prepends a space and the tokenizer doesn't."""
    vocabulary = sentencepiece_vocabulary(tokenizer)
    if vocabulary is None or vocabulary.prepend_scheme != "first":
        return
    text = saved.prompt([Turn("user", ("a",)), Turn("assistant", ("a",)), Turn("user", ("a",))])
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for name in added:
        following = text.split(name)[1:]
        if any(rest and not rest.startswith((" ", *added)) for rest in following):
            raise ModelError(
                f"format gguf can't represent the tokenizer (legacy: false) with this conversation template: llama.cpp "
                f"encodes the text after {name} with a space before it",
                hint=HINT,
            )


def _special_tokens(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Iterator[Key]:
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    yield "tokenizer.ggml.add_bos_token", adds_bos
    yield "tokenizer.ggml.add_eos_token", False
    named = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    # A file names three tokens that end an answer.
    eos = tokenizer.eos_token_id
    ends = [*([eos] if eos in stop_ids else []), *(token for token in stop_ids if token != eos)]
    if len(ends) > len(_ENDS):
        raise ModelError(f"format gguf supports {len(_ENDS)} end tokens, but the model has {len(ends)}", hint=HINT)
    named |= dict(zip(_ENDS, ends, strict=False))
    for name, token in named.items():
        if token is not None:
            yield f"tokenizer.ggml.{name}_token_id", int(token)


_ENDS = ("eos", "eot", "eom")


def _splitter_name(backend: Mapping[str, Any]) -> str:
    """``tokenizer.ggml.pre`` of a byte-level BPE tokenizer.

    Raises:
        ModelError: llama.cpp has none that splits text in the same way.
    """
    model, normalizer = backend["model"], backend["normalizer"]
    name = None
    if model["type"] == "BPE" and (normalizer is None or normalizer["type"] == "NFC"):
        name = SPLITTERS.get(_Splitter(tuple(_steps(backend["pre_tokenizer"])), not model.get("ignore_merges")))
    if name is None:
        supported = ", ".join(["SentencePiece", *SPLITTERS.values()])
        raise ModelError(f"format gguf can't represent this tokenizer (supported: {supported})", hint=HINT)
    return name


def _steps(pre_tokenizer: Any) -> Iterator[tuple[str, Any]]:
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": parts}:
            for part in parts:
                yield from _steps(part)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield "split", pattern
        case {"type": "Digits", "individual_digits": individual}:
            yield "digits", individual
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
            yield "bytes", splits
        case _:
            yield "other", None


def _refuse_added_tokens(backend: Mapping[str, Any]) -> None:
    """Raises ModelError for added tokens that remove text around them, or match only whole words."""
    for token in backend["added_tokens"]:
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]:
            message = f"format gguf can't represent the token {token['content']} ({', '.join(flags)})"
            raise ModelError(message, hint=HINT)
