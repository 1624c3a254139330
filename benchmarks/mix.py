"""Synthetic data of the size and shape of LLaVA's v1.5 mix: records, tiny image files, features and a toy model.

Texts are slices of the real records and captions in ``../shared/data/llava``, so that no two records are equal and
words have their real frequencies. The numbers of records, rounds and distinct images follow the parts of
``llava_v1_5_mix665k.json`` (Liu et al. 2023, arXiv:2310.03744, table 7).
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llavactl.features import StoreWriter
from llavactl.features.reader import stage_fingerprint, stage_vision

if TYPE_CHECKING:
    from llavactl.recipe.frame import VisionRecipe

LLAVA_DATA = Path(__file__).parents[2] / "shared" / "data" / "llava"


class MixPart(NamedTuple):
    """A part of the mix: thousands of records, mean rounds per record, and words per question and answer.

    ``folder`` is the pool of ``images`` (in thousands) that its records draw from; "" for records without an image.
    """

    records: float
    rounds: float
    question: int
    answer: int
    folder: str
    images: float


MIX = (
    MixPart(57, 4.5, 9, 25, "coco", 118),  # LLaVA conversations
    MixPart(23, 1, 9, 95, "coco", 118),  # LLaVA descriptions
    MixPart(77, 1, 18, 110, "coco", 118),  # LLaVA reasoning
    MixPart(40.7, 3.2, 60, 220, "", 0),  # ShareGPT
    MixPart(82.8, 5.4, 7, 1, "coco", 118),  # VQAv2
    MixPart(72.1, 13, 8, 1, "gqa", 72),
    MixPart(9, 1, 18, 1, "coco", 118),  # OKVQA
    MixPart(80, 10, 6, 3, "ocr_vqa", 80),
    MixPart(66.2, 1, 40, 1, "coco", 118),  # A-OKVQA
    MixPart(22, 1, 40, 12, "textvqa", 22),  # TextCaps
    MixPart(48.4, 6, 10, 8, "coco", 118),  # RefCOCO
    MixPart(86.4, 10, 10, 8, "vg", 86),  # Visual Genome
)
TOTAL = sum(part.records for part in MIX)
_STRIDE = 7_919


def write_records(file: Path, count: int, images: Path, *, seed: int = 0) -> dict[str, str]:
    """Writes ``count`` records as a JSON list, as the mix is published, and a tiny PNG for each image they name.

    Returns the sha256 of each image by its path, in the order of first use.
    """
    keys: dict[str, str] = {}
    with file.open("w", encoding="utf-8") as stream:
        for index, record in enumerate(_records(count, random.Random(seed))):
            stream.write(("[\n" if index == 0 else ",\n") + json.dumps(record, indent=2))
            if (name := record.get("image")) is not None and name not in keys:
                keys[name] = _write_image(images / name, len(keys))
        stream.write("\n]\n")
    return keys


def _records(count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    real = json.loads((LLAVA_DATA / "llava_instruct_100.json").read_text(encoding="utf-8"))
    blip = json.loads((LLAVA_DATA / "blip_laion_cc_sbu_2k.json").read_text(encoding="utf-8"))
    questions, answers = _words(real, "human"), _words([*real, *blip], "gpt")

    def text(words: list[str], mean: int) -> str:
        size = max(1, round(rng.gammavariate(2, mean / 2)))
        start = rng.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    used = dict.fromkeys(MIX, 0)
    for index, part in enumerate(rng.choices(MIX, [part.records for part in MIX], k=count)):
        rounds = max(1, round(rng.gauss(part.rounds, part.rounds / 4))) if part.rounds > 1 else 1
        conversation = []
        for number in range(rounds):
            tag = "<image>\n" if part.folder and number == 0 else ""
            conversation.append({"from": "human", "value": tag + text(questions, part.question)})
            conversation.append({"from": "gpt", "value": text(answers, part.answer)})
        record: dict[str, Any] = {"id": f"{index:09d}"}
        if part.folder:
            pool = max(1, round(part.images / TOTAL * count))
            number = used[part] * _STRIDE % pool  # a part names each image at most once, as in the mix
            used[part] += 1
            record["image"] = f"{part.folder}/{number // 10_000:03d}/{number:012d}.png"
        yield {**record, "conversations": conversation}


def _words(records: list[dict[str, Any]], role: str) -> list[str]:
    turns = (turn["value"] for record in records for turn in record["conversations"] if turn["from"] == role)
    words = " ".join(text.replace("<image>", "").strip() for text in turns).split(" ")
    return [word for word in words if word.strip()]


def _write_image(file: Path, number: int) -> str:
    """Writes a PNG of one pixel, different for each ``number``, and returns its sha256."""
    pixel = zlib.compress(b"\0" + number.to_bytes(6, "big"))
    header = struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixel), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    try:
        file.write_bytes(data)
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def write_language(folder: Path, *, vocabulary: int = 32_000, width: int = 32) -> Path:
    """Saves a Llama of one small layer and a byte-level BPE tokenizer trained on the real texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = (LLAVA_DATA / "llava_instruct_100.json", LLAVA_DATA / "blip_laion_cc_sbu_2k.json")
    bpe.train_from_iterator([file.read_text(encoding="utf-8") for file in files], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_features(recipe: VisionRecipe, keys: Sequence[str], seed: int = 0) -> None:
    """Stores random features of the images with the content ``keys``, as ``llavactl extract`` would store real ones."""
    fingerprint, shape = stage_fingerprint(recipe, 2), stage_vision(recipe, 2).shape()
    rng = np.random.default_rng(seed)
    with StoreWriter(fingerprint, shape, recipe.features.shard_images) as writer:
        for start in range(0, len(keys), 4096):
            chunk = keys[start : start + 4096]
            writer.append(chunk, rng.standard_normal((len(chunk), shape.patches, shape.width), np.float32).astype("f2"))
