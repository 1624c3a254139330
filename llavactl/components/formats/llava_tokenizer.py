"""A tokenizer's files for LLaVA's programs, which use transformers 4.37.2 and tokenizers 0.15.

These have neither the classes nor the ``tokenizer.json`` of transformers 5. A SentencePiece vocabulary (Llama, Vicuna,
Mistral) is written as ``tokenizer.model`` for their slow ``LlamaTokenizer``, any other as an older ``tokenizer.json``.
Both are read by transformers 5 with the same result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.llava_support import HINT
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_OLD_TYPES: Mapping[str, frozenset[str]] = {
    "model": frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"}),
    "normalizer": frozenset({
        "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
        "Sequence", "Strip", "StripAccents",
    }),
    "pre_tokenizer": frozenset({
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence",
        "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    }),
    "post_processor": frozenset({
        "BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing",
    }),
    "decoder": frozenset({
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip",
        "WordPiece",
    }),
}  # fmt: skip
"""The types of the parts of a ``tokenizer.json`` that tokenizers 0.15 has."""

_NEW_KEYS = ("backend", "is_local", "local_files_only", "extra_special_tokens", "add_prefix_space", "tokenizer_object")
"""Keys of ``tokenizer_config.json`` that only transformers 5 has."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, to: Path, *, fast: bool) -> None:
    """Writes ``tokenizer`` to the folder ``to``; ``fast``: see ``uses_fast_tokenizer``.

    Raises:
        ModelError: transformers 4.37 would encode text differently.
    """
    files = older_files(tokenizer, fast=fast)
    tokenizer.save_pretrained(to)
    written = read_json(to / "tokenizer_config.json")
    named = [str(token) for token in written.get("extra_special_tokens") or ()]
    config = {key: value for key, value in written.items() if key not in _NEW_KEYS}
    added = {str(token): _added_token(each) for token, each in sorted(tokenizer.added_tokens_decoder.items())}
    config |= {"added_tokens_decoder": added, "additional_special_tokens": named, **files.config}
    write_json(to / "tokenizer_config.json", config)
    for name, content in files.contents.items():
        write_atomic(to / name, content)


def loads_tokenizer(folder: Path) -> bool:
    """Whether LLaVA's programs load the tokenizer in ``folder``, as far as its files show; True for what is no folder.

    They load that of a bare projector from its language model, which may have been saved by transformers 5.
    """
    kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class"))
    slow = kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
    return not folder.is_dir() or (kind != "TokenizersBackend" and (not slow or (folder / "tokenizer.model").is_file()))


@dataclass(frozen=True)
class OlderFiles:
    """What differs from the files of transformers 5: files by name, and keys of ``tokenizer_config.json``."""

    contents: Mapping[str, bytes]
    config: Mapping[str, Any]


def older_files(tokenizer: PreTrainedTokenizerBase, *, fast: bool) -> OlderFiles:
    """The files of ``tokenizer`` that transformers 4.37 reads; see ``save_tokenizer``."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = _post_processor_without_eos(tokenizer, backend["post_processor"])
    # Its own default is to join punctuation to the word before it, which changes answers.
    shared = {"clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces)}
    if _is_sentencepiece(backend):
        scheme = backend["pre_tokenizer"]["prepend_scheme"]
        if scheme == "never":
            raise _unsupported("it adds no space before a text")
        if scheme == "first" and fast:
            raise _unsupported(
                "with legacy: false, the fast Llama tokenizer of transformers 4.37 differs after special tokens"
            )
        if single := [each["content"] for each in backend["added_tokens"] if each["single_word"]]:
            raise _unsupported(f"their slow Llama tokenizer misses {single[0]}, a single_word token")
        config = {
            **shared,
            "tokenizer_class": "LlamaTokenizer",
            "legacy": scheme == "always",
            "add_bos_token": _adds_bos(tokenizer),
            "add_eos_token": False,
        }
        spaces = [{"type": "Prepend", "prepend": _SPACE}, _replacement(" ", _SPACE)]
        older = {**backend, "normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None}
        return OlderFiles(
            {"tokenizer.model": sentencepiece_model(backend), "tokenizer.json": _older_tokenizer_json(older)}, config
        )
    return OlderFiles(
        {"tokenizer.json": _older_tokenizer_json(backend)}, {**shared, "tokenizer_class": "PreTrainedTokenizerFast"}
    )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` adds BOS to every text."""
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _post_processor_without_eos(tokenizer: PreTrainedTokenizerBase, given: Any) -> Any:
    """The ``post_processor`` ``given``, or one that only adds BOS.

    LLaVA's programs tokenise each piece of a prompt with all that its tokenizer adds, so that an end token would stand
    before every image, where training has none.
    """
    begins = _adds_bos(tokenizer)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] == [*([tokenizer.bos_token_id] if begins else []), *bare]:
        return given
    if not begins:
        return None
    bos, number = str(tokenizer.bos_token), int(tokenizer.bos_token_id)
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    text: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    special = {bos: {"id": bos, "ids": [number], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first + text[:1], "pair": first + text, "special_tokens": special}


def _is_sentencepiece(backend: Mapping[str, Any]) -> bool:
    """Whether it encodes like Llama's SentencePiece model: BPE on whole texts, with ``▁`` for spaces."""
    before = backend["pre_tokenizer"] or {}
    metaspace = before.get("type") == "Metaspace" and not before.get("split", True)
    return metaspace and backend["model"]["type"] == "BPE" and backend["model"]["byte_fallback"]


def sentencepiece_model(backend: Mapping[str, Any]) -> bytes:
    """A SentencePiece model with the vocabulary and merges of ``backend``, a ``tokenizer.json``.

    SentencePiece merges the neighbours whose merged piece has the highest score, so a piece's score is the negative
    rank of its first merge.

    Raises:
        ModelError: SentencePiece can't represent the vocabulary.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = backend["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
        raise _unsupported("its token ids have gaps")
    if sum(map(bool, map(_BYTE.fullmatch, pieces))) != 256:
        raise _unsupported("it lacks tokens for single bytes")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merge_pairs(model["merges"])):
        ranks.setdefault(left + right, rank)
    special = {each["content"]: each["special"] for each in backend["added_tokens"]}
    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - generated, unknown to mypy
    kinds = proto.SentencePiece
    for token, piece in enumerate(pieces):
        kind = kinds.NORMAL
        if piece == model["unk_token"] or (model["unk_token"] is None and token == 0):
            kind = kinds.UNKNOWN
        elif _BYTE.fullmatch(piece):
            kind = kinds.BYTE
        elif piece in special and piece not in ranks:
            # One that is joined of others is found in the middle of words, too, where its name alone isn't.
            kind = kinds.CONTROL if special[piece] else kinds.USER_DEFINED
        score = 0.0 if kind != kinds.NORMAL else -float(ranks.get(piece, len(ranks)))
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    found: bytes = proto.SerializeToString()
    return found


def _older_tokenizer_json(backend: Mapping[str, Any]) -> bytes:
    """``backend`` as a ``tokenizer.json`` of tokenizers 0.15.

    Raises:
        ModelError: it has newer parts.
    """
    if newer := sorted(
        {each for part, old in _OLD_TYPES.items() for each in _part_types(backend[part]) if each not in old}
    ):
        raise _unsupported(f"{', '.join(newer)} in tokenizer.json is newer than tokenizers 0.15")
    model = {key: value for key, value in backend["model"].items() if key != "ignore_merges"}
    if backend["model"].get("ignore_merges"):
        raise _unsupported("ignore_merges in tokenizer.json is newer than tokenizers 0.15")
    if "merges" in model:
        if any(" " in part for pair in _merge_pairs(model["merges"]) for part in pair):
            raise _unsupported("its tokens contain spaces")
        model["merges"] = [" ".join(pair) for pair in _merge_pairs(model["merges"])]
    return json.dumps({**_older_metaspace(backend), "model": model}, ensure_ascii=False).encode()


def _merge_pairs(merges: Any) -> Iterator[tuple[str, str]]:
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _part_types(value: Any) -> Iterator[str]:
    """The ``type`` of a part of ``tokenizer.json`` and of those in a sequence of it."""
    if isinstance(value, Mapping):
        yield value["type"]
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            for each in value.get(key, ()):
                yield from _part_types(each)


def _older_metaspace(value: Any) -> Any:
    """``value`` with every ``Metaspace`` as in tokenizers 0.15."""
    if isinstance(value, list):
        return [_older_metaspace(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if value.get("type") != "Metaspace":
        return {key: each if key == "model" else _older_metaspace(each) for key, each in value.items()}
    scheme = value.get("prepend_scheme", "always")
    return {
        "type": "Metaspace",
        "replacement": value["replacement"],
        "add_prefix_space": scheme != "never",
        "prepend_scheme": scheme,
    }


def _replacement(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _added_token(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _unsupported(why: str) -> ModelError:
    return ModelError(f"LLaVA's programs can't load the tokenizer: {why}", hint=HINT)
