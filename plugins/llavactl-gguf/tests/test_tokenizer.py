"""llama.cpp encodes text as the tokenizer does."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from llavactl_gguf import tokenizer as written
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llavactl import ModelError, open_model
from llavactl.testing import toy_tokenizer

from .conftest import Toys, causal_lm, ids, llama

MODEL = Path(sys.prefix, "vocabularies/mistral_common/data/tokenizer.model.v1")
NEEDS_MODEL = pytest.mark.skipif(
    not MODEL.is_file(), reason="no SentencePiece model installed: see tests/vocabularies.txt"
)
TEXTS = (
    *("Hello world", "  two  spaces   three", "a\nb\n\nc\r\n d \t tab", "12345 67 8,9.0", "It's I'LL don't we're"),
    *("Ünïcödé Straße 日本語 한국어 العربية", "emoji 😀👍🏽", "x=1;y+=2 //c++ #$%^&*()", "CamelCaseAND123mix", "\n"),
    *("   ", " lead", "\u00a0nbsp\u3000wide", "USER: <image-like> [INST]", "<|im_end|>after"),
)
CORPUS = [*TEXTS, "The quick brown fox jumps over 13 lazy dogs, doesn't it? " * 3, "def f(x):\n    return x + 1\n"] * 5


def byte_level(folder: Path, steps: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Path:
    """A language model with a byte-level BPE vocabulary that splits text by ``steps``."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer, bpe.decoder = steps, decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(causal_lm(folder))
    return folder


def split(name: str) -> Any:
    """The steps of llama.cpp's ``name``, which begins with a regular expression."""
    (pattern,) = (splitter.steps[0][1] for splitter, known in written.SPLITTERS.items() if known == name)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only(False)]
    return pre_tokenizers.Sequence(steps)


def bytes_only(splits: bool, *, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=splits)


BYTE_LEVEL: dict[str, Callable[[Path], Path]] = {
    "gpt-2": lambda folder: byte_level(folder, bytes_only(True)),
    "smollm": lambda folder: byte_level(
        folder, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_only(True)])
    ),
    "llama-bpe": lambda folder: byte_level(folder, split("llama-bpe"), ignore_merges=True),
    "qwen2": lambda folder: byte_level(folder, split("qwen2"), normalizer=normalizers.NFC()),
}


def metadata(export: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(export / "model-f32.gguf").fields.items()}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_vocabularies(toys: Toys, tmp_path: Path, name: str) -> None:
    model = toys.model(language=BYTE_LEVEL[name](tmp_path / "language"))
    export = toys.export(model)
    assert metadata(export)["tokenizer.ggml.pre"] == name
    program, tokenizer = llama(export), open_model(model).tokenizer()
    assert [ids(program, text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_table_of_splitters_is_tested() -> None:
    assert {*written.SPLITTERS.values()} == BYTE_LEVEL.keys()


def llama_folder(folder: Path, *, legacy: bool = True) -> Path:
    """A language model with a SentencePiece vocabulary, as on the hub."""
    causal_lm(folder, vocab_size=32000)
    shutil.copy(MODEL, folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def as_older_versions(folder: Path) -> Path:
    """``folder`` with the tokenizer.json of older versions of transformers: the normalizer prepends the space."""
    tokenizer = open_tokenizer(folder)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for file in folder.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def open_tokenizer(folder: Path) -> Any:
    from llavactl import registry

    return registry().create("languages", {"name": "hf", "model": str(folder)}).tokenizer()


@NEEDS_MODEL
@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(lambda folder: folder, id="current"),
        pytest.param(as_older_versions, id="older", marks=pytest.mark.slow),
    ],
)
def test_a_sentencepiece_vocabulary(toys: Toys, tmp_path: Path, prepare: Callable[[Path], Path]) -> None:
    language = prepare(llama_folder(tmp_path / "language"))
    export = toys.export(toys.model(language=language))
    program, reference = llama(export), SentencePieceProcessor(model_file=str(MODEL))
    for text in TEXTS:
        assert ids(program, text) == [1, *reference.encode(text)], text
    again = reference.encode("USER: hi")
    assert ids(program, "a</s>USER: hi") == [1, *reference.encode("a"), 2, *again]


@NEEDS_MODEL
@pytest.mark.slow
def test_a_space_that_llama_cpp_would_add_is_refused(toys: Toys, tmp_path: Path) -> None:
    """With legacy: false, if the template has text directly after an end token."""
    language = llama_folder(tmp_path / "language", legacy=False)
    tokenizer = open_tokenizer(language)
    with pytest.raises(ModelError, match="legacy"):
        written.refuse_template(open_model(toys.model(language=language)), tokenizer)
    written.refuse_template(open_model(toys.model(language=language, template="plain")), tokenizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: byte_level(folder, bytes_only(True, add_prefix_space=True)),
        lambda folder: byte_level(folder, split("llama-bpe")),
        lambda folder: byte_level(folder, pre_tokenizers.Whitespace()),
        lambda folder: byte_level(folder, bytes_only(True), normalizer=normalizers.Lowercase()),
    ],
)
def test_other_tokenizers_are_refused(toys: Toys, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        toys.export(toys.model(language=make(tmp_path / "language")))
    assert not list(tmp_path.glob("model-*-export-*/*"))


def test_added_tokens(toys: Toys, tmp_path: Path) -> None:
    """Special ones are control tokens; tokens that remove spaces around them are refused."""
    tokenizer = toy_tokenizer(causal_lm(tmp_path / "language"))
    tokenizer.add_tokens(["<box>", AddedToken("<point>", special=True)])
    tokenizer.save_pretrained(tmp_path / "language")
    model = toys.model(language=tmp_path / "language")
    export = toys.export(model)
    text = "a<box> b<point>c </s>"
    assert ids(llama(export), text) == open_model(model).tokenizer()(text)["input_ids"]
    types = dict(zip(*(metadata(export)[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type")), strict=True))
    assert (types["<box>"], types["<point>"], types["</s>"]) == (4, 3, 3)
    tokenizer.add_tokens([AddedToken("<line>", rstrip=True)])
    tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(ModelError, match="<line>"):
        toys.export(model)


def test_end_tokens(toys: Toys) -> None:
    """Those of the tokenizer and of the template end an answer."""
    model = toys.model(template="chatml")
    program, saved = llama(toys.export(model)), open_model(model)
    tokenizer = saved.tokenizer()
    expected, _ = saved.stop_criteria(tokenizer)
    assert expected == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    ends = {token for token in range(program.tokens) if program.lib.llama_vocab_is_eog(program.vocabulary, token)}
    assert ends == expected
