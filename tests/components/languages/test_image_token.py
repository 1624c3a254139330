"""Checkpoints saved by transformers use their processor's ids, those of llavactl the ids of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.languages.image_token import image_token
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Turn
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.images.image_file import ImageFile

from ..conftest import MODEL, language, llama_folder, llama_tokenizer, with_prepend_normalizer

Q = 4
IMAGE, OTHER_IMAGE = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ["What is it? A dog, and a cat.", "USER: Which colour?\nASSISTANT: Red and  blue.", "naïve café 一只狗"] * 3


def sentencepiece(legacy: bool) -> Callable[[Path], Any]:
    return lambda folder: llama_tokenizer(folder / "llama", legacy=legacy)


def _fast(backend: Any, **more: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**SPECIALS, **more})


def _with_bos(backend: Any) -> Any:
    """``backend`` with BOS before every text."""
    from tokenizers import processors

    number = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return backend


def byte_level_bpe(regex: bool, bos: bool, prefix: bool = False) -> Callable[[Path], Any]:
    """Byte-level BPE like Llama 3 (its regex, BOS), Qwen (NFC, no BOS) and GPT-2 (a space before every text)."""

    def made(_folder: Path) -> Any:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE(unk_token=None))
        if regex:
            pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(pattern, "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            backend.normalizer = normalizers.NFC()
        else:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet
        )
        backend.train_from_iterator(WORDS, trainer)
        return _fast(_with_bos(backend) if bos else backend)

    return made


def gemma(_folder: Path) -> Any:
    """Like Gemma: spaces become ``▁``, nothing is prepended to a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    names = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, special_tokens=names))
    return _fast(_with_bos(backend))


def metaspace(scheme: str) -> Callable[[Path], Any]:
    """Unigram like T5 (``always``), and with a space only before the first word."""

    def made(_folder: Path) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        names = ["<s>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=names, unk_token="<unk>")
        backend.train_from_iterator(WORDS, trainer)
        return _fast(backend)

    return made


def prepended(folder: Path) -> Any:
    return with_prepend_normalizer(sentencepiece(True)(folder))


NEEDS_MODEL = pytest.mark.skipif(
    not MODEL.is_file(), reason="no SentencePiece model installed: see tests/vocabularies.txt"
)
TOKENIZERS = {
    "llama-legacy": sentencepiece(True),
    "llama": sentencepiece(False),
    "llama-prepended": prepended,
    "llama-3": byte_level_bpe(regex=True, bos=True),
    "qwen": byte_level_bpe(regex=True, bos=False),
    "gpt-2": byte_level_bpe(regex=False, bos=False),
    "gpt-2-prefix": byte_level_bpe(regex=False, bos=False, prefix=True),
    "gemma": gemma,
    "t5": metaspace("always"),
    "first": metaspace("first"),
    "never": metaspace("never"),
}
ALL = [pytest.param(name, marks=NEEDS_MODEL if name.startswith("llama-p") or name in ("llama", "llama-legacy") else ())
       for name in TOKENIZERS]  # fmt: skip

TEMPLATES = {
    "vicuna": (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '%I\\n' }}{% endif %}{% endfor %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{{ ' ' if m['role'] == 'user' else eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "bos and no newline": (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '%I' }}{% endif %}{% endfor %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    ),
}

CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "one": (Turn("user", (IMAGE, "\nWhat is it?")),),
    "two images": (Turn("user", (IMAGE, "\n", OTHER_IMAGE, "\nWhich  is\n  a dog? ")),),
    "turns": (
        Turn("user", (IMAGE, "\nWhat is it?")),
        Turn("assistant", ("A dog.",)),
        Turn("user", (OTHER_IMAGE, "\n 一只狗 🐕?")),
        Turn("assistant", ("Yes, naïve.\n\n  Really",)),
        Turn("user", ("And  here?",)),
    ),
    "no image": (Turn("user", ("What is it?",)),),
    "only an image": (Turn("user", (IMAGE,)),),
}


def checkpoint(folder: Path, tokenizer: Any, template: str, *, token: Any = "<image>") -> tuple[Path, Any]:
    """A LLaVA checkpoint saved by transformers, without weights, and its processor."""
    from transformers import (
        AutoProcessor,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    name = str(token)
    tokenizer.add_tokens([token], special_tokens=not hasattr(token, "special") or token.special)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=8, num_hidden_layers=1)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, hidden_size=12, num_hidden_layers=3)
    number = tokenizer.convert_tokens_to_ids(name)
    LlavaConfig(vision_config=vision, text_config=text, image_token_index=number).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=name,
        chat_template=TEMPLATES[template].replace("%I", name),
    ).save_pretrained(folder)
    return folder, AutoProcessor.from_pretrained(folder)


def processors_ids(processor: Any, turns: tuple[Turn, ...], number: int) -> list[int]:
    """The ids of the processor, with IMAGE_TOKEN at image positions."""
    import numpy as np
    from PIL import Image

    photo = Image.fromarray(np.zeros((28, 28, 3), np.uint8))
    messages = [
        {
            "role": turn.role,
            "content": [
                *({"type": "image", "image": photo} for _ in turn.images),
                {"type": "text", "text": turn.text.strip() if turn.images else turn.text},
            ],
        }
        for turn in turns
    ]
    made = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    (ids,) = made["input_ids"]
    return [IMAGE_TOKEN if token == number else token for token in ids]


def encoding_of(folder: Path, template: str = "tokenizer") -> Encoding:
    return Encoding(registry().create("templates", {"name": template}), language(folder), Q)


def assert_ids_are_the_processors(folder: Path, processor: Any) -> None:
    encoding = encoding_of(folder)
    for conversation in CONVERSATIONS.values():
        turns = arrange(conversation, "first", "")
        made = encoding.encode(turns, generate=True)
        assert list(made.ids) == processors_ids(processor, turns, processor.image_token_id), conversation
        assert made.ids.count(IMAGE_TOKEN) == Q * len(made.images)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ALL)
def test_ids_are_the_processors(tmp_path: Path, name: str, template: str) -> None:
    assert_ids_are_the_processors(*checkpoint(tmp_path / "theirs", TOKENIZERS[name](tmp_path), template))


KINDS: dict[str, dict[str, Any]] = {
    "strips": {"lstrip": True, "rstrip": True, "normalized": False, "special": True},
    "normalized": {"normalized": True, "special": False},
    "another name": {"content": "[IMG]", "normalized": False, "special": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen"])
def test_any_image_token(tmp_path: Path, name: str, kind: str) -> None:
    """The image token may strip spaces around it, be found only in normalized text, or have another name."""
    from transformers import AddedToken

    if not MODEL.is_file() and name.startswith("llama"):
        pytest.skip("no SentencePiece model installed: see tests/vocabularies.txt")
    token = AddedToken(**{"content": "<image>", **KINDS[kind]})
    assert_ids_are_the_processors(*checkpoint(tmp_path / "theirs", TOKENIZERS[name](tmp_path), "vicuna", token=token))


@pytest.mark.parametrize("name", ALL)
def test_labels_lengths_and_texts_match_the_ids(tmp_path: Path, name: str) -> None:
    """The targets are the answers with their ends, and the texts of the tokens add up to the rendered text."""
    folder, _ = checkpoint(tmp_path / "theirs", TOKENIZERS[name](tmp_path), "vicuna")
    encoding = encoding_of(folder)
    for conversation in CONVERSATIONS.values():
        turns = (*conversation, Turn("assistant", ("Both, a dog.",)))
        made, texts = encoding.encode(turns), encoding.texts(turns)
        assert encoding.lengths([turns]) == [len(made.ids)] == [len(texts)]
        assert not encoding.rendered_text(turns).isascii() or not encoding.may_exceed(turns, 4 * len(made.ids) + 400)
        assert encoding.may_exceed(turns, len(made.ids) - 1)
        said = "".join(text for text, label in zip(texts, made.labels, strict=True) if label != IGNORE)
        # A token may begin before an answer; its last character decides.
        wanted = [turn.text for turn in turns if turn.role == "assistant"]
        found = said.split("</s>")
        assert found.pop() == ""
        assert all(
            each.endswith(answer) and len(each) <= len(answer) + 3 for each, answer in zip(found, wanted, strict=True)
        )
        assert all(label in (IGNORE, token) for label, token in zip(made.labels, made.ids, strict=True))
        begins = texts[0] == "<s>"
        assert "".join(texts[begins:]) == encoding.rendered_text(turns)
        assert all(not text for text, token in zip(texts, made.ids, strict=True) if token == IMAGE_TOKEN)
        short = Encoding(encoding.template, encoding.tokenizer, Q, len(made.ids) - 1).encode(turns)
        assert short.ids == made.ids[: len(short.ids)]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["gemma", "qwen"])
def test_the_image_token_in_messages_is_text(tmp_path: Path, name: str, special: bool) -> None:
    from transformers import AddedToken

    token = AddedToken("<image>", normalized=False, special=special)
    folder, _ = checkpoint(tmp_path / "theirs", TOKENIZERS[name](tmp_path), "vicuna", token=token)
    encoding = encoding_of(folder)
    turns = (Turn("user", (IMAGE, "\nIs <image> a tag?")), Turn("assistant", ("<image> is.",)))
    made = encoding.encode(turns)
    assert made.ids.count(IMAGE_TOKEN) == Q
    assert encoding.tokenizer.convert_tokens_to_ids("<image>") not in made.ids
    assert encoding.lengths([turns]) == [len(made.ids)]


@NEEDS_MODEL
def test_llavactls_exports_and_language_models_use_llavas_ids(tmp_path: Path) -> None:
    folder, processor = checkpoint(tmp_path / "theirs", TOKENIZERS["llama"](tmp_path), "vicuna")
    plain = llama_folder(tmp_path / "plain", legacy=False)
    assert image_token(language(plain)) is None
    assert image_token(language(folder)) == "<image>"
    (folder / "llavactl_export.json").write_text("{}")
    assert image_token(language(folder)) is None
    ids = encoding_of(folder).encode(CONVERSATIONS["one"], generate=True).ids
    assert (
        len(ids) == len(processors_ids(processor, CONVERSATIONS["one"], processor.image_token_id)) + 1
    )  # SentencePiece's space


@NEEDS_MODEL
def test_a_saved_tokenizer_keeps_its_image_token(tmp_path: Path) -> None:
    """As saved by full fine-tuning, without the LLaVA checkpoint."""
    folder, processor = checkpoint(tmp_path / "theirs", TOKENIZERS["llama"](tmp_path), "vicuna")
    language(folder).save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "config.json").write_text('{"model_type": "llama", "vocab_size": 32064}')
    assert_ids_are_the_processors(tmp_path / "trained", processor)


def test_only_added_tokens_are_image_tokens(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "theirs", TOKENIZERS["qwen"](tmp_path), "vicuna")
    config = json.loads((folder / "config.json").read_text())
    for number in (30, 10**6):
        (folder / "config.json").write_text(
            json.dumps({**config, "image_token_index": number, "image_token_id": number})
        )
        assert image_token(language(folder)) is None
