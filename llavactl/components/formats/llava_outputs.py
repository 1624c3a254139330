"""Loads an original-layout export by LLaVA's rules, reimplemented with transformers. A script, never imported.

    python llava_outputs.py FOLDER PROMPTS.json OUT.safetensors

``llavactl`` can't be imported here. Prompts are text with ``<image>`` (LLaVA's conversation templates are code, not
part of a checkpoint), which is split there and tokenised piece by piece, as LLaVA does.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def language(folder: Path, config: dict[str, Any]) -> Any:
    """The language model; behind a bare projector, the base that config.json names."""
    if (folder / "mm_projector.bin").is_file():
        return AutoModelForCausalLM.from_pretrained(config["_name_or_path"], dtype=torch.float32)
    # Of rotary positions LLaVA's own transformers reads rope_theta and rope_scaling, not the newer rope_parameters.
    unread = ("model_type", *(["rope_parameters"] if "rope_theta" in config else []))
    known = {key: value for key, value in config.items() if not key.startswith("mm_") and key not in unread}
    own = AutoConfig.for_model(config["model_type"].removeprefix("llava_"), **known)
    return AutoModelForCausalLM.from_pretrained(folder, config=own, dtype=torch.float32)


def encoder(folder: Path) -> Callable[[str, bool], list[int]]:
    """A function from text to ids, which begin with BOS for the first piece.

    With a tokenizer.model it encodes like LLaVA's slow Llama tokenizer: SentencePiece between added tokens.
    """
    if not (folder / "tokenizer.model").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return lambda text, first: tokenizer(text, add_special_tokens=first)["input_ids"] if text or first else []
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    added = {each["content"]: int(token) for token, each in config["added_tokens_decoder"].items()}
    marks = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")")
    after = len(model.encode("\n"))

    def encode(text: str, first: bool) -> list[int]:
        ids = [added[config["bos_token"]]] if first and config["add_bos_token"] else []
        for at, part in enumerate(marks.split(text)):
            if part in added:
                ids.append(added[part])
            elif part:
                # SentencePiece prepends a space to every text; a newline is a byte token, which is never merged.
                ids += model.encode(part) if at == 0 or config["legacy"] else model.encode("\n" + part)[after:]
        return ids

    return encode


def projector(folder: Path, config: dict[str, Any], width: int) -> nn.Module:
    """LLaVA's build_vision_projector: ``linear`` or ``mlp2x_gelu``."""
    if (folder / "mm_projector.bin").is_file():
        weights = torch.load(folder / "mm_projector.bin", weights_only=True)
    else:
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {k: v for k, v in load_file(file).items() if "mm_projector" in k}
    first = nn.Linear(config["mm_hidden_size"], width)
    made = (
        first if config["mm_projector_type"] == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
    )
    made.load_state_dict({name.removeprefix("model.mm_projector."): weight for name, weight in weights.items()})
    return made.float().eval()


def stated(folder: Path, config: dict[str, Any], model: Any) -> dict[str, Any]:
    """What the export states: end tokens, dtype to load in, and dtype of the language model's saved weights.

    A projector alone states nothing: its language model is another checkpoint.
    """
    if (folder / "mm_projector.bin").is_file():
        return {}
    saved = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if "mm_projector" not in name]  # noqa: SIM118
            saved |= {DTYPES.get(opened.get_slice(name).get_dtype(), "integers") for name in names}
    ends = model.generation_config.eos_token_id
    return {"eos": ends if isinstance(ends, list) else [ends], "dtype": [config.get("dtype")], "saved": sorted(saved)}


def pixels(image: Image.Image, processor: Any, aspect: str) -> torch.Tensor:
    """expand2square with the processor's mean where the checkpoint says ``pad``, then the processor."""
    if aspect == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    found: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    return found


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Ids (image positions -200), logits [T, V] and greedy ids of every prompt, to ``out``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    speaker, encode = language(folder, config).eval(), encoder(folder)
    embed = speaker.get_input_embeddings()
    connector = projector(folder, config, embed.weight.shape[1])
    place = config["mm_vision_tower"]
    tower = CLIPVisionModel.from_pretrained(place, dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil.from_pretrained(place)
    asked = json.loads(prompts.read_text(encoding="utf-8"))
    found: dict[str, torch.Tensor] = {}
    for index, prompt in enumerate(asked["prompts"]):
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        stack = [pixels(image, processor, config["image_aspect_ratio"]) for image in images]
        with torch.no_grad():
            ids, rows = [], []
            for at, piece in enumerate(prompt["text"].split("<image>")):
                if at:
                    seen = tower(stack[at - 1], output_hidden_states=True)
                    state = seen.hidden_states[config["mm_vision_select_layer"]]
                    state = state[:, 1:] if config["mm_vision_select_feature"] == "patch" else state
                    rows.append(connector(state)[0])
                    ids.append(torch.full((len(rows[-1]),), -200))
                ids.append(torch.tensor(encode(piece, at == 0), dtype=torch.long))
                rows.append(embed(ids[-1]))
            inputs = torch.cat(rows)[None]
            logits = speaker(inputs_embeds=inputs).logits[0]
            said = speaker.generate(
                inputs_embeds=inputs,
                attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
                max_new_tokens=asked["max_new_tokens"],
                do_sample=False,
            )
        found[f"{index}.ids"] = torch.cat(ids)
        found[f"{index}.logits"] = logits.contiguous()
        found[f"{index}.said"] = said[0].contiguous()
        if stack:
            found[f"{index}.pixels"] = torch.cat(stack).contiguous()
    save_file(found, out, metadata={"stated": json.dumps(stated(folder, config, speaker))})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
