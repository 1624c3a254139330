"""Verification script for LLaVA's environment: loads an export with its ``load_pretrained_model``, runs prompts.

    python original_llava_outputs.py FOLDER PROMPTS.json OUT.safetensors [BASE]

``BASE`` is the language model of a bare projector. LLaVA chooses the class by the folder's name.
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
    """torch with float16 replaced by float32, so LLaVA's builder loads weights in float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float32 if name == "float16" else getattr(torch, name)


def main(folder: str, prompts: str, out: str, base: str | None = None) -> None:
    """Writes ids (-200 at image positions), pixels, image embeddings, logits and greedy answers of all prompts."""
    warnings.simplefilter("ignore")
    builder.torch = Float32()
    name = get_model_name_from_path(folder)
    tokenizer, model, processor, _ = builder.load_pretrained_model(folder, base, name, device="cpu")
    document = json.loads(Path(prompts).read_text(encoding="utf-8"))
    outputs: dict[str, torch.Tensor] = {}
    for index, prompt in enumerate(document["prompts"]):
        ids = tokenizer_image_token(prompt["text"], tokenizer, return_tensors="pt")[None]
        images = [Image.open(image).convert("RGB") for image in prompt["images"]]
        sizes = [image.size for image in images]
        pixels = process_images(images, processor, model.config).float() if images else None
        with torch.inference_mode():
            if pixels is None:
                logits = model(input_ids=ids).logits
            else:
                inputs = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels, sizes)
                logits = model(position_ids=inputs[1], attention_mask=inputs[2], inputs_embeds=inputs[4]).logits
                outputs[f"{index}.pixels"] = pixels.contiguous()
            generated = model.generate(
                ids, images=pixels, image_sizes=sizes, do_sample=False, max_new_tokens=document["max_new_tokens"]
            )
        text_tokens = int((ids >= 0).sum())
        image_tokens = (logits.shape[1] - text_tokens) // max(len(images), 1)
        expanded = torch.cat([token.repeat(image_tokens) if token < 0 else token for token in ids[0][:, None]])
        if images:
            embeddings = inputs[4][0][expanded < 0]
            outputs[f"{index}.embeddings"] = embeddings.unflatten(0, (len(images), -1)).float().contiguous()
        outputs |= {f"{index}.ids": expanded, f"{index}.logits": logits[0].contiguous()}
        outputs[f"{index}.said"] = generated[0].contiguous()
    save_file(outputs, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
