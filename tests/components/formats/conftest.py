"""Fixtures: model folders and checkpoints of other programs, with random weights."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llavactl.evaluation.verification.script import BLOCK_LLAVACTL
from llavactl.evaluation.verification.verify import verify

from ...preloaded import Interpreters

SHAPE = {"grid": [2, 2], "width": 32, "prefix": 0}

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def forked_verification(interpreters: Interpreters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification scripts run in forks of a process that has imported torch and transformers, which takes seconds."""

    def run(script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
        return interpreters.run(BLOCK_LLAVACTL, *map(str, (script, *arguments)), cwd=tmp_path, env=os.environ)

    monkeypatch.setattr("llavactl.verbs.export.verify", partial(verify, run=run))


@pytest.fixture
def native(toys: Path, tmp_path: Path) -> Make:
    """``native(name, connector=…, method=…, …)``: a model folder of llavactl in the test's folder."""
    return partial(native_model, toys, tmp_path)


def native_model(
    toys: Path,
    parent: Path,
    name: str,
    *,
    connector: str = "mlp2x-gelu",
    method: str = "full",
    template: str = "vicuna-v1",
    image: str = "pad",
    precision: str = "float32",
    select: str = "patch",
    language: Path | None = None,
    attention: str = "sdpa",
) -> Path:
    """A model folder ``name`` of llavactl in ``parent``, with the components of ``toys`` and random weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llavactl.core.schema import FeatureShape
    from llavactl.model import folder as model_folder
    from llavactl.model.build import build

    shape = SHAPE if select == "patch" else {**SHAPE, "prefix": 1}
    language_spec = {"name": "hf", "model": str(language or toys / "language"), "attention": attention}
    features = FeatureShape((2, 2), 32, int(shape["prefix"]))
    parts = build({"name": connector}, language_spec, features, dtype=precision, seed=3)
    if method == "lora":
        torch.manual_seed(4)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        parts.model.language = get_peft_model(parts.model.language, config, autocast_adapter_dtype=False)
        for parameter, weight in parts.model.language.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(weight, std=0.1)
    folder = parent / name
    clip = {"name": "clip", "model": str(toys / "clip"), "layer": -2, "select": select, "image": image}
    description = {
        "stage": 1 if method == "connector" else 2,
        "method": method,
        "vision": clip,
        "features": {"dtype": "float16", "compute": "float32"},
        "fingerprint": None,
        "connector": {"name": connector},
        "language": language_spec,
        "image_order": "first",
        "precision": precision,
        "digest": name,
        "versions": {},
        "shape": shape,
        "template": template,
    }
    weights = {key: value.float() for key, value in parts.model.connector.state_dict().items()}
    model_folder.save(folder, parts, weights, description)
    return folder


@pytest.fixture
def foreign(toys: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A LLaVA checkpoint saved by transformers, with a chat template like that of llava-hf: model and folder."""

    def make(language_folder: Path | None = None, **load_options: Any) -> tuple[Any, Path]:
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            CLIPImageProcessor,
            CLIPVisionModel,
            LlavaConfig,
            LlavaForConditionalGeneration,
            LlavaProcessor,
        )

        torch.manual_seed(7)
        vision = CLIPVisionModel.from_pretrained(toys / "clip")
        language = AutoModelForCausalLM.from_pretrained(language_folder or toys / "language", **load_options)
        tokenizer = AutoTokenizer.from_pretrained(language_folder or toys / "language")
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        config = LlavaConfig(
            vision_config=vision.config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
        model = LlavaForConditionalGeneration(config)
        model.model.vision_tower.load_state_dict(vision.state_dict())
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.lm_head.load_state_dict(language.lm_head.state_dict(), strict=False)  # Llava's has no bias
        folder = tmp_path / "theirs"
        model.save_pretrained(folder)
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessor.from_pretrained(toys / "clip"),
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=PUBLISHED,
        )
        processor.save_pretrained(folder)
        return model.eval(), folder

    return make


PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def original(toys: Path, folder: Path, *, linear: bool = False, **more: Any) -> Any:
    """Saves a full checkpoint in LLaVA's format, its weights in one pickle as in LLaVA v1; returns its state dict."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(9)
    folder.mkdir(parents=True)
    language = LlamaForCausalLM.from_pretrained(toys / "language")
    state = dict(language.state_dict())
    names = {"": (48, 32)} if linear else {"0.": (48, 32), "2.": (48, 48)}
    for name, size in names.items():
        state[f"model.mm_projector.{name}weight"] = torch.randn(size) * 0.1
        state[f"model.mm_projector.{name}bias"] = torch.randn(size[0]) * 0.1
    torch.save(state, folder / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(toys / "language").save_pretrained(folder)
    config = json.loads((toys / "language" / "config.json").read_text())
    config |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava" if linear else "llava_llama",
        "mm_vision_tower": str(toys / "clip"),
        "mm_projector_type": "linear" if linear else "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
    }
    (folder / "config.json").write_text(json.dumps(config | more))
    return state
