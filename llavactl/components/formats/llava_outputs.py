"""Verification script of format ``llava``: loads an export by LLaVA's rules, reimplemented with transformers.

    python llava_outputs.py FOLDER PROMPTS.json OUT.safetensors

It runs without llavactl; ``llavactl.evaluation.verification.script`` documents its input and output. It uses the
rendered text of prompts, because LLaVA's conversation templates are code and not part of a checkpoint. As in LLaVA, the
text is split at ``<image>`` and each piece is tokenized separately.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def language(folder: Path, config: dict[str, Any]) -> Any:
    """The language model; for a bare projector, the base that config.json names."""
    if (folder / "mm_projector.bin").is_file():
        return AutoModelForCausalLM.from_pretrained(config["_name_or_path"], dtype=torch.float32)
    # LLaVA's version of transformers reads rope_theta and rope_scaling, not the newer rope_parameters.
    ignored = ("model_type", *(["rope_parameters"] if "rope_theta" in config else []))
    settings = {key: value for key, value in config.items() if not key.startswith("mm_") and key not in ignored}
    language_config = AutoConfig.for_model(config["model_type"].removeprefix("llava_"), **settings)
    return AutoModelForCausalLM.from_pretrained(folder, config=language_config, dtype=torch.float32)


def encoder(folder: Path) -> Callable[[str, bool], list[int]]:
    """A function from text to ids, with BOS if the text is the first piece.

    With a tokenizer.model it encodes like LLaVA's slow Llama tokenizer: SentencePiece between added tokens.
    """
    if not (folder / "tokenizer.model").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return lambda text, first: tokenizer(text, add_special_tokens=first)["input_ids"] if text or first else []
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    added = {entry["content"]: int(token) for token, entry in config["added_tokens_decoder"].items()}
    added_pattern = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")")
    newline_length = len(model.encode("\n"))

    def encode(text: str, first: bool) -> list[int]:
        ids = [added[config["bos_token"]]] if first and config["add_bos_token"] else []
        for at, part in enumerate(added_pattern.split(text)):
            if part in added:
                ids.append(added[part])
            elif part:
                # SentencePiece prepends a space to every text; a newline before it prevents this and is never merged.
                spaced = at == 0 or config["legacy"]
                ids += model.encode(part) if spaced else model.encode("\n" + part)[newline_length:]
        return ids

    return encode


def projector(folder: Path, config: dict[str, Any], width: int) -> nn.Module:
    """LLaVA's build_vision_projector: ``linear`` or ``mlp2x_gelu``."""
    if (folder / "mm_projector.bin").is_file():
        weights = torch.load(folder / "mm_projector.bin", weights_only=True)
    else:
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {name: weight for name, weight in load_file(file).items() if "mm_projector" in name}
    module: nn.Module = nn.Linear(config["mm_hidden_size"], width)
    if config["mm_projector_type"] != "linear":
        module = nn.Sequential(module, nn.GELU(), nn.Linear(width, width))
    module.load_state_dict({name.removeprefix("model.mm_projector."): weight for name, weight in weights.items()})
    return module.float().eval()


def stated(folder: Path, config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Settings in the export's files: end tokens, dtype to load in, dtypes of the saved language weights.

    Empty for a bare projector, whose language model is another checkpoint.
    """
    if (folder / "mm_projector.bin").is_file():
        return {}
    saved = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if "mm_projector" not in name]  # noqa: SIM118
            saved |= {DTYPES.get(opened.get_slice(name).get_dtype(), "integers") for name in names}
    eos = model.generation_config.eos_token_id
    return {"eos": eos if isinstance(eos, list) else [eos], "dtype": [config.get("dtype")], "saved": sorted(saved)}


def pixels(image: Image.Image, processor: Any, aspect: str) -> torch.Tensor:
    """Pixels [1, 3, H, W]: with ``pad``, LLaVA's expand2square with the processor's mean; then the processor."""
    if aspect == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    values: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    return values


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Writes ids (-200 at image positions), pixels, image embeddings, logits and greedy answers of all prompts."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    language_model, encode = language(folder, config).eval(), encoder(folder)
    embed = language_model.get_input_embeddings()
    connector = projector(folder, config, embed.weight.shape[1])
    vision_encoder = CLIPVisionModel.from_pretrained(config["mm_vision_tower"], dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil.from_pretrained(config["mm_vision_tower"])
    document = json.loads(prompts.read_text(encoding="utf-8"))
    outputs: dict[str, torch.Tensor] = {}
    for index, prompt in enumerate(document["prompts"]):
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        stack = [pixels(image, processor, config["image_aspect_ratio"]) for image in images]
        with torch.no_grad():
            ids, embeddings, image_embeddings = [], [], []
            for at, piece in enumerate(prompt["text"].split("<image>")):
                if at:
                    states = vision_encoder(stack[at - 1], output_hidden_states=True).hidden_states
                    features = states[config["mm_vision_select_layer"]]
                    features = features[:, 1:] if config["mm_vision_select_feature"] == "patch" else features
                    embeddings.append(connector(features)[0])
                    image_embeddings.append(embeddings[-1])
                    ids.append(torch.full((len(embeddings[-1]),), -200))
                ids.append(torch.tensor(encode(piece, at == 0), dtype=torch.long))
                embeddings.append(embed(ids[-1]))
            inputs = torch.cat(embeddings)[None]
            logits = language_model(inputs_embeds=inputs).logits[0]
            generated = language_model.generate(
                inputs_embeds=inputs,
                attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
                max_new_tokens=document["max_new_tokens"],
                do_sample=False,
            )
        outputs[f"{index}.ids"] = torch.cat(ids)
        outputs[f"{index}.logits"] = logits.contiguous()
        outputs[f"{index}.said"] = generated[0].contiguous()
        if stack:
            outputs[f"{index}.pixels"] = torch.cat(stack).contiguous()
            outputs[f"{index}.embeddings"] = torch.stack(image_embeddings)
    program = f"transformers {transformers.__version__} by LLaVA's rules"
    statement = {**stated(folder, config, language_model), "program": program}
    save_file(outputs, out, metadata={"stated": json.dumps(statement)})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
