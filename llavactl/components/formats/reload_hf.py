"""Loads an export as any other program would, and says what it makes of some prompts. Run alone, never imported.

    python -I reload_hf.py FOLDER PROMPTS.json OUT.safetensors

It can't import llavactl: an export that needs us would be none.
"""

# ruff: noqa: E402 - the first line of code shuts the door
import sys

sys.modules["llavactl"] = None  # type: ignore[assignment]

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and its processor; with an adapter, the base behind it."""
    adapter = (folder / "adapter_config.json").is_file()
    base = folder / "base" if adapter else folder
    model: Any = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval(), AutoProcessor.from_pretrained(base)


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Ids, logits [T, V] and greedy ids of every prompt, to ``out``."""
    from PIL import Image

    model, processor = load(folder)
    asked = json.loads(prompts.read_text(encoding="utf-8"))
    found: dict[str, torch.Tensor] = {}
    for index, prompt in enumerate(asked["prompts"]):
        text = prompt["text"]  # of a stage 1 model, which holds no conversation
        if processor.chat_template:
            text = processor.apply_chat_template(prompt["messages"], add_generation_prompt=True)
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
            said = model.generate(**inputs, max_new_tokens=asked["max_new_tokens"], do_sample=False)
        found[f"{index}.ids"] = inputs["input_ids"][0]
        found[f"{index}.logits"] = logits.contiguous()
        found[f"{index}.said"] = said[0, inputs["input_ids"].shape[1] :].contiguous()
        if images:
            found[f"{index}.pixels"] = inputs["pixel_values"].contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
