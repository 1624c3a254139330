"""Verification script of formats ``hf`` and ``peft``: loads an export with transformers and writes its outputs.

    python hf_outputs.py FOLDER PROMPTS.json OUT.safetensors

It runs without llavactl, on which an export must not depend; ``llavactl.evaluation.verification.script`` documents its
input and output.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load(folder: Path, base: Path) -> tuple[Any, Any, str]:
    """The model in float32, its processor, and the program; an adapter is loaded on its ``base``."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    program = f"transformers {transformers.__version__}"
    if base != folder:
        import peft

        model = peft.PeftModel.from_pretrained(model, folder)
        program = f"peft {peft.__version__} with {program}"
    return model.eval(), AutoProcessor.from_pretrained(base, backend="pil"), program  # torchvision gives other pixels


def stated(base: Path, model: Any, processor: Any) -> dict[str, Any]:
    """Settings in the export's files: end tokens, padding side, dtype to load in, dtypes of saved language weights."""
    config, saved = json.loads((base / "config.json").read_text(encoding="utf-8")), set()
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if "language_model" in name or "lm_head" in name]  # noqa: SIM118
            saved |= {DTYPES.get(opened.get_slice(name).get_dtype(), "integers") for name in names}
    eos = model.generation_config.eos_token_id
    return {
        "eos": eos if isinstance(eos, list) else [eos],
        "padding": processor.tokenizer.padding_side,
        "dtype": [config.get("dtype")],
        "saved": sorted(saved),
    }


@contextmanager
def language_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """In this context, the embeddings [B, T, D] that the language model receives are added to the list."""
    received: list[torch.Tensor] = []
    (language,) = (module for name, module in model.named_modules() if name.endswith("model.language_model"))
    hook = language.register_forward_pre_hook(
        lambda _module, _args, kwargs: received.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        yield received
    finally:
        hook.remove()


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Writes the outputs of all prompts, and the answers of the longest and the shortest one in a padded batch."""
    base = folder / "base" if (folder / "adapter_config.json").is_file() else folder
    model, processor, program = load(folder, base)
    document = json.loads(prompts.read_text(encoding="utf-8"))
    generation = {"max_new_tokens": document["max_new_tokens"], "do_sample": False}
    outputs: dict[str, torch.Tensor] = {}
    texts, images_by_prompt = [], []
    for index, prompt in enumerate(document["prompts"]):
        text = prompt["processor_text"]  # stage 1 models have no chat template
        if processor.chat_template:
            text = processor.apply_chat_template(prompt["messages"], add_generation_prompt=True)
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        with torch.no_grad(), language_inputs(model) as embeddings:
            logits = model(**inputs).logits[0]
        with torch.no_grad():
            generated = model.generate(**inputs, **generation)
        outputs[f"{index}.ids"] = inputs["input_ids"][0]
        outputs[f"{index}.logits"] = logits.contiguous()
        outputs[f"{index}.said"] = generated[0, inputs["input_ids"].shape[1] :].contiguous()
        if images:
            at_images = embeddings[0][inputs["input_ids"] == model.config.image_token_id]
            outputs[f"{index}.embeddings"] = at_images.unflatten(0, (len(images), -1))
            outputs[f"{index}.pixels"] = inputs["pixel_values"].contiguous()
        texts.append(text)
        images_by_prompt.append(images)
    lengths = [len(outputs[f"{index}.ids"]) for index in range(len(texts))]
    pair = lengths.index(max(lengths)), lengths.index(min(lengths))
    images = [image for index in pair for image in images_by_prompt[index]]
    inputs = processor(text=[texts[i] for i in pair], images=images or None, padding=True, return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :]
    outputs |= {f"{index}.batched_answer": row.clone() for index, row in zip(pair, generated, strict=True)}
    save_file(outputs, out, metadata={"stated": json.dumps({**stated(base, model, processor), "program": program})})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
