"""Tiny models of real classes and data for them; each function writes to a path and returns it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from llavactl.core.progress import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ToyMethod = Literal["full", "lora", "connector"]
TOY_METHODS: tuple[ToyMethod, ...] = get_args(ToyMethod)
"""What is trained in a toy model: everything but the backbone, an adapter and the connector, or the connector."""

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 70), "blue": (50, 80, 220), "yellow": (240, 210, 50)}

_TEXT = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What colour is the picture? ASSISTANT: The picture is red, green, blue or yellow.",
    "Describe the image in detail. What is in the photo? How many are there? Yes, no.",
]

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_clip(folder: Path, *, size: int = 28, patch: int = 14, width: int = 32, layers: int = 3, seed: int = 0) -> Path:
    """A CLIPVisionModel with random weights and its image processor."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    quiet_transformers()

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=size,
        patch_size=patch,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    square = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square).save_pretrained(folder)
    return folder


def toy_tokenizer(folder: Path, *, vocabulary: int = 400) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a chat template, saved in ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials[2:]})
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def toy_language(folder: Path, *, width: int = 48, layers: int = 2, vocabulary: int = 400, seed: int = 0) -> Path:
    """A LlamaForCausalLM with random weights, and the tokenizer of ``toy_tokenizer``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet_transformers()

    tokenizer = toy_tokenizer(folder, vocabulary=vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def toy_model(folder: Path, *, method: ToyMethod = "full", width: int = 48, layers: int = 2) -> Path:
    """llavactl's model folder ``folder/model`` of toys, trained by ``method``; the models are beside it.

    ``width`` and ``layers`` are those of the language model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from llavactl.core.model_description import shape_entry
    from llavactl.core.schema import FeatureShape
    from llavactl.model import folder as model_folder
    from llavactl.model.build import build

    vision = {"name": "clip", "model": str(toy_clip(folder / "clip").absolute()), "layer": -2, "select": "patch"}
    language = {"name": "hf", "model": str(toy_language(folder / "language", width=width, layers=layers).absolute())}
    shape, connector = FeatureShape((2, 2), 32), {"name": "mlp2x-gelu"}
    bundle = build(connector, language, shape, dtype="float32", seed=1)
    if method == "lora":
        torch.manual_seed(2)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(bundle.model.language, config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # zeros would have no effect
                torch.nn.init.normal_(weight, std=0.1)
        bundle.model.language = adapted
    description = {
        "stage": 1 if method == "connector" else 2,
        "method": method,
        "vision": {**vision, "image": "pad"},
        "shape": shape_entry(shape),
        "connector": connector,
        "language": language,
        "template": "vicuna-v1",
        "image_order": "first",
        "precision": "float32",
        "features": {"dtype": "float16", "compute": "float32"},
        "fingerprint": None,
        "digest": f"toy-{method}",
        "versions": {},
    }
    model_folder.save(folder / "model", bundle, bundle.model.connector.state_dict(), description)
    return folder / "model"


def toy_photos(folder: Path, count: int = 12, *, seed: int = 0) -> list[Path]:
    """``count`` JPEGs of various sizes, each of one color with noise."""
    from PIL import Image

    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        color = list(COLOURS.values())[index % len(COLOURS)]
        image = Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60)), color)
        for _ in range(20):
            position = rng.randrange(image.width), rng.randrange(image.height)
            image.putpixel(position, (rng.randrange(256), rng.randrange(256), rng.randrange(256)))
        paths.append(folder / f"photo-{index:03d}.jpg")
        image.save(paths[-1], quality=95)
    return paths


def toy_records(path: Path, photos: Sequence[Path], *, turns: int = 2) -> Path:
    """One LLaVA record per photo: ``turns`` questions that can be answered from the image only."""
    names = list(COLOURS)
    records = []
    for index, photo in enumerate(photos):
        conversation = []
        for turn in range(turns):
            tag = "<image>\n" if turn == 0 else ""
            conversation.append({"from": "human", "value": f"{tag}What colour is the picture?"})
            conversation.append({"from": "gpt", "value": f"The picture is {names[index % len(names)]}."})
        records.append({"id": f"r{index}", "image": photo.name, "conversations": conversation})
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def toy_recipe(folder: Path, *, photos: int = 12) -> Path:
    """A complete recipe with models and data in ``folder``; trains in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    toy_clip(folder / "clip")
    toy_language(folder / "language")
    records = toy_records(folder / "records.json", toy_photos(folder / "images", photos))
    path = folder / "recipe.yaml"
    path.write_text(
        f"""\
# llavactl run -r recipe.yaml
name: toy
vision: {{name: clip, model: clip, layer: -2, select: patch, image: pad}}
connector: {{name: mlp2x-gelu}}
language: {{name: hf, model: language, template: vicuna-v1}}
features: {{shard_images: 5, batch_size: 4}}
data:
  stage1: [{{name: llava-json, path: {records.name}, images: images/}}]
  stage2: [{{name: llava-json, path: {records.name}, images: images/}}]
stage1: {{epochs: 2, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-3, checkpoint_every: 2, precision: float32}}
stage2: {{epochs: 2, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-3, checkpoint_every: 2, precision: float32}}
""",
        encoding="utf-8",
    )
    return path
