"""Loads an export as any other program would, and writes its outputs for some prompts. A script, never imported.

    python hf_outputs.py FOLDER PROMPTS.json OUT.safetensors

``llavactl`` can't be imported here: an export must not depend on it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and its processor; with an adapter, the base behind it."""
    adapter = (folder / "adapter_config.json").is_file()
    base = folder / "base" if adapter else folder
    model: Any = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval(), AutoProcessor.from_pretrained(base, backend="pil")  # torchvision makes other pixels


def stated(folder: Path, model: Any, processor: Any) -> dict[str, Any]:
    """What the export states: end tokens, padding side, dtype to load in, and dtype of the saved language model."""
    base = folder / "base" if (folder / "adapter_config.json").is_file() else folder
    config, saved = json.loads((base / "config.json").read_text(encoding="utf-8")), set()
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if "language_model" in name or "lm_head" in name]  # noqa: SIM118
            saved |= {DTYPES.get(opened.get_slice(name).get_dtype(), "integers") for name in names}
    ends = model.generation_config.eos_token_id
    return {
        "eos": ends if isinstance(ends, list) else [ends],
        "padding": processor.tokenizer.padding_side,
        "dtype": [config.get("dtype")],
        "saved": sorted(saved),
    }


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Writes ids, logits [T, V] and greedy ids of every prompt, and of two in a padded batch, to ``out``."""
    model, processor = load(folder)
    asked = json.loads(prompts.read_text(encoding="utf-8"))
    new = {"max_new_tokens": asked["max_new_tokens"], "do_sample": False}
    found: dict[str, torch.Tensor] = {}
    texts, photos = [], []
    for index, prompt in enumerate(asked["prompts"]):
        text = prompt["processor_text"]  # of a stage 1 model, which holds no conversation
        if processor.chat_template:
            text = processor.apply_chat_template(prompt["messages"], add_generation_prompt=True)
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
            said = model.generate(**inputs, **new)
        found[f"{index}.ids"] = inputs["input_ids"][0]
        found[f"{index}.logits"] = logits.contiguous()
        found[f"{index}.said"] = said[0, inputs["input_ids"].shape[1] :].contiguous()
        if images:
            found[f"{index}.pixels"] = inputs["pixel_values"].contiguous()
        texts.append(text)
        photos.append(images)
    lengths = [len(found[f"{index}.ids"]) for index in range(len(texts))]
    both = lengths.index(max(lengths)), lengths.index(min(lengths))
    images = [image for index in both for image in photos[index]]
    inputs = processor(text=[texts[i] for i in both], images=images or None, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**inputs, **new)[:, inputs["input_ids"].shape[1] :]
    found |= {f"{index}.together": row.clone() for index, row in zip(both, said, strict=True)}
    save_file(found, out, metadata={"stated": json.dumps(stated(folder, model, processor))})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
