"""Loads an export with LLaVA's own ``load_pretrained_model`` and runs prompts. A script for LLaVA's environment.

    python original_llava_outputs.py FOLDER PROMPTS.json OUT.safetensors [BASE]

``BASE`` is the language model of a bare projector. The folder's name chooses the class, as in LLaVA.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model import builder
from PIL import Image
from safetensors.torch import save_file


class Float32(SimpleNamespace):
    """torch, but that LLaVA's builder loads weights in float32 in place of float16."""

    def __getattr__(self, name: str) -> Any:
        return torch.float32 if name == "float16" else getattr(torch, name)


def main(folder: str, prompts: str, out: str, base: str | None = None) -> None:
    """Ids (image positions -200), logits [T, V] and greedy ids of every prompt, to ``out``."""
    warnings.simplefilter("ignore")
    builder.torch = Float32()
    name = get_model_name_from_path(folder)
    tokenizer, model, processor, _ = builder.load_pretrained_model(folder, base, name, device="cpu")
    asked = json.loads(Path(prompts).read_text(encoding="utf-8"))
    found: dict[str, torch.Tensor] = {}
    for index, prompt in enumerate(asked["prompts"]):
        ids = tokenizer_image_token(prompt["text"], tokenizer, return_tensors="pt")[None]
        images = [Image.open(image).convert("RGB") for image in prompt["images"]]
        sizes = [image.size for image in images]
        pixels = process_images(images, processor, model.config).float() if images else None
        with torch.inference_mode():
            if pixels is None:
                logits = model(input_ids=ids).logits
            else:
                made = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels, sizes)
                logits = model(position_ids=made[1], attention_mask=made[2], inputs_embeds=made[4]).logits
                found[f"{index}.pixels"] = pixels.contiguous()
            said = model.generate(
                ids, images=pixels, image_sizes=sizes, do_sample=False, max_new_tokens=asked["max_new_tokens"]
            )
        texts = int((ids >= 0).sum())
        tokens = (logits.shape[1] - texts) // max(len(images), 1)
        placed = [each.repeat(tokens) if each < 0 else each for each in ids[0][:, None]]
        found |= {f"{index}.ids": torch.cat(placed), f"{index}.logits": logits[0].contiguous()}
        found[f"{index}.said"] = said[0].contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
