"""Saves tokenizers for LLaVA's code, which uses transformers 4.37.2 and tokenizers 0.15.

These read neither the classes nor the ``tokenizer.json`` of transformers 5. A SentencePiece vocabulary (Llama, Vicuna,
Mistral) is saved as ``tokenizer.model`` for their slow ``LlamaTokenizer``, any other as an older ``tokenizer.json``.
transformers 5 reads both with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.llava_support import HINT
from llavactl.components.languages.sentencepiece_model import is_sentencepiece, merge_pairs, pieces
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"
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
"""The types of ``tokenizer.json`` parts in tokenizers 0.15."""

_NEW_KEYS = ("backend", "is_local", "local_files_only", "extra_special_tokens", "add_prefix_space", "tokenizer_object")
"""Keys of ``tokenizer_config.json`` that only transformers 5 has."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, to: Path, *, fast: bool) -> None:
    """Saves ``tokenizer`` to the folder ``to``; ``fast``: see ``uses_fast_tokenizer``.

    Raises:
        ModelError: transformers 4.37 would encode text differently.
    """
    files = older_files(tokenizer, fast=fast)
    tokenizer.save_pretrained(to)
    written = read_json(to / "tokenizer_config.json")
    special = [str(token) for token in written.get("extra_special_tokens") or ()]
    config = {key: value for key, value in written.items() if key not in _NEW_KEYS}
    added = {str(token_id): _added_token(token) for token_id, token in sorted(tokenizer.added_tokens_decoder.items())}
    config |= {"added_tokens_decoder": added, "additional_special_tokens": special, **files.config}
    write_json(to / "tokenizer_config.json", config)
    for name, content in files.contents.items():
        write_atomic(to / name, content)


def loads_tokenizer(folder: Path) -> bool:
    """Whether LLaVA's code loads the tokenizer in ``folder``, as far as its files show; True if it is not a folder.

    For a bare projector it loads the language model's tokenizer, which may have been saved by transformers 5.
    """
    name = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class"))
    slow = name in ("LlamaTokenizer", "CodeLlamaTokenizer")
    return not folder.is_dir() or (name != "TokenizersBackend" and (not slow or (folder / "tokenizer.model").is_file()))


@dataclass(frozen=True)
class OlderFiles:
    """Files by name, and keys of ``tokenizer_config.json``, that differ from those of transformers 5."""

    contents: Mapping[str, bytes]
    config: Mapping[str, Any]


def older_files(tokenizer: PreTrainedTokenizerBase, *, fast: bool) -> OlderFiles:
    """The files of ``tokenizer`` that transformers 4.37 reads; see ``save_tokenizer``."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = _post_processor_without_eos(tokenizer, backend["post_processor"])
    # transformers 4.37 enables this by default, which removes spaces before punctuation in answers.
    common = {"clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces)}
    if is_sentencepiece(backend):
        scheme = backend["pre_tokenizer"]["prepend_scheme"]
        if scheme == "never":
            raise _unsupported("it doesn't prepend a space to text")
        if scheme == "first" and fast:
            raise _unsupported(
                "with legacy: false, the fast Llama tokenizer of transformers 4.37 differs after special tokens"
            )
        if single := [token["content"] for token in backend["added_tokens"] if token["single_word"]]:
            raise _unsupported(f"its slow Llama tokenizer doesn't support single_word tokens such as {single[0]}")
        config = {
            **common,
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
        {"tokenizer.json": _older_tokenizer_json(backend)}, {**common, "tokenizer_class": "PreTrainedTokenizerFast"}
    )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` adds BOS to every text."""
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _post_processor_without_eos(tokenizer: PreTrainedTokenizerBase, current: Any) -> Any:
    """The ``post_processor`` ``current``, or one that only adds BOS if ``current`` adds other tokens.

    LLaVA's code tokenizes each piece of a prompt with all special tokens that the tokenizer adds: an end token would
    precede every image, unlike in training.
    """
    adds_bos = _adds_bos(tokenizer)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] == [*([tokenizer.bos_token_id] if adds_bos else []), *bare]:
        return current
    if not adds_bos:
        return None
    bos, bos_id = str(tokenizer.bos_token), int(tokenizer.bos_token_id)
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    text: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first + text[:1], "pair": first + text, "special_tokens": special}


def sentencepiece_model(backend: Mapping[str, Any]) -> bytes:
    """A SentencePiece model with the vocabulary and merges of ``backend``, a ``tokenizer.json``.

    Raises:
        ModelError: SentencePiece can't represent the vocabulary.
    """
    from sentencepiece import sentencepiece_model_pb2

    try:
        vocabulary = pieces(backend)
    except ModelError as error:
        raise _unsupported(error.message) from error
    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - generated, unknown to mypy
    for text, score, kind in vocabulary:
        proto.pieces.add(piece=text, score=score, type=getattr(proto.SentencePiece, kind.replace("-", "_").upper()))
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(vocabulary)
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    serialized: bytes = proto.SerializeToString()
    return serialized


def _older_tokenizer_json(backend: Mapping[str, Any]) -> bytes:
    """``backend`` as a ``tokenizer.json`` of tokenizers 0.15.

    Raises:
        ModelError: ``backend`` has parts that tokenizers 0.15 doesn't support.
    """
    if newer := sorted(
        {name for part, old in _OLD_TYPES.items() for name in _part_types(backend[part]) if name not in old}
    ):
        raise _unsupported(f"{', '.join(newer)} in tokenizer.json is newer than tokenizers 0.15")
    model = {key: value for key, value in backend["model"].items() if key != "ignore_merges"}
    if backend["model"].get("ignore_merges"):
        raise _unsupported("ignore_merges in tokenizer.json is newer than tokenizers 0.15")
    if "merges" in model:
        if any(" " in part for pair in merge_pairs(model["merges"]) for part in pair):
            raise _unsupported("its tokens contain spaces")
        model["merges"] = [" ".join(pair) for pair in merge_pairs(model["merges"])]
    return json.dumps({**_older_metaspace(backend), "model": model}, ensure_ascii=False).encode()


def _part_types(value: Any) -> Iterator[str]:
    """The ``type`` of a part of ``tokenizer.json``, and of the parts of a sequence."""
    if isinstance(value, Mapping):
        yield value["type"]
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            for part in value.get(key, ()):
                yield from _part_types(part)


def _older_metaspace(value: Any) -> Any:
    """``value`` with every ``Metaspace`` as in tokenizers 0.15."""
    if isinstance(value, list):
        return [_older_metaspace(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.get("type") != "Metaspace":
        return {key: item if key == "model" else _older_metaspace(item) for key, item in value.items()}
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
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {field: getattr(token, field) for field in fields}


def _unsupported(reason: str) -> ModelError:
    return ModelError(f"LLaVA's code can't load the tokenizer: {reason}", hint=HINT)
