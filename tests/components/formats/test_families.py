"""Exports of language models of many families are exact, or refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.formats import llava_outputs
from llavactl.components.formats.hf import HfLlava
from llavactl.components.formats.llava import OriginalLlava, OriginalLlavaOptions
from llavactl.core.errors import ModelError
from llavactl.model import folder as model_folder
from llavactl.model.imported import resolve
from llavactl.testing import run_cli

from .conftest import Make, native_model
from .families import EAGER, REFUSED, families, language_of
from .test_export import exported, written


@pytest.fixture(scope="module")
def model_of(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_of(family)``: the model folder of a language model of ``family``; don't write into it."""

    @cache
    def make(family: str) -> Path:
        parent = tmp_path_factory.mktemp(family)
        language = language_of(family, toys / "language", parent / "language")
        # With an adapter, the language model stays in its folder and keeps its attention implementation.
        settings: dict[str, Any] = {"method": "lora", "attention": "eager"} if family in EAGER else {}
        return native_model(toys, parent, "ours", language=language, **settings)

    return make


def logits(model: Any) -> Any:
    """Logits [T, V] for random embeddings."""
    import torch

    width = model.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(1, 24, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(inputs_embeds=embeds, use_cache=False).logits[0]


def assert_same_logits(model: Path, exported_model: Any) -> None:
    """``exported_model`` has the logits of ``model``, and none of its additional tokens is ever the most likely."""
    loaded = model_folder.load(model)
    language: Any = loaded.bundle.model.language
    if loaded.description["method"] == "lora":
        language = language.merge_and_unload()
    ours, found = logits(language), logits(exported_model)
    tokens = ours.shape[-1]
    # The attention implementations may differ.
    assert (ours - found[:, :tokens]).abs().max() <= 1e-4 * ours.abs().max()
    assert int(found.argmax(-1).max()) < tokens


def assert_read_back(model: Path, to: Path) -> None:
    """llavactl reads its own export as the same model, with the attention implementation of training."""
    again = model_folder.load(resolve(to)).bundle.model.language
    assert_same_logits(model, again)
    ours = model_folder.load(model).bundle.model.language
    assert again.config._attn_implementation == ours.config._attn_implementation


@pytest.mark.parametrize("family", families())
def test_hf_is_exact_or_refused(model_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    from transformers import LlavaForConditionalGeneration

    model, to = model_of(family), tmp_path / "out"
    if family in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family]) as refused:
            HfLlava(None).write(model, to)
        assert "--format llava" in refused.value.hint
        assert not to.exists()
        return
    HfLlava(None).write(model, to)
    exported_model, info = LlavaForConditionalGeneration.from_pretrained(to, output_loading_info=True)
    assert not any(info.values())
    assert_same_logits(model, exported_model)
    assert exported_model.config.text_config.use_cache
    assert_read_back(model, to)


@pytest.mark.parametrize("family", families())
def test_llava_is_exact_or_refused(model_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """By default only Llama is exported; with ``strict: false`` every family."""
    model, to = model_of(family), tmp_path / "out"
    if family not in ("llama", "llama-tied"):
        with pytest.raises(ModelError) as refused:
            OriginalLlava(OriginalLlavaOptions()).write(model, to)
        assert "strict=false" in refused.value.hint
        assert not to.exists()
        OriginalLlava(OriginalLlavaOptions(strict=False)).write(model, to)
    else:
        OriginalLlava(OriginalLlavaOptions()).write(model, to)
    assert_same_logits(model, llava_outputs.language(to, json.loads((to / "config.json").read_text())))
    assert_read_back(model, to)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}],
)
def test_llava_has_the_older_keys_for_position_embeddings(
    native: Make, toys: Path, tmp_path: Path, rope: dict[str, Any]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    language = language_of("llama", toys / "language", tmp_path / "language")
    config = LlamaConfig.from_pretrained(language)
    config.rope_parameters = rope
    LlamaForCausalLM(config).save_pretrained(language)
    model, to = native("ours", language=language), tmp_path / "out"
    OriginalLlava(OriginalLlavaOptions()).write(model, to)
    written = json.loads((to / "config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"]
    assert (written["rope_scaling"] or {}).get("factor") == rope.get("factor")
    assert_same_logits(
        model, llava_outputs.language(to, {**written, "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}})
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt"])
def test_families_verified_by_another_process(model_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Compares text, batches and images, unlike the tests above."""
    assert not exported(model_of(family), "hf", tmp_path / "out")["verified"]["faults"]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("form", ["hf", "peft"])
def test_a_refused_export_keeps_the_previous_one(
    native: Make, toys: Path, tmp_path: Path, form: str, method: str
) -> None:
    out = tmp_path / "out"
    written(native("before", method="lora"), form, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    language = language_of("phi", toys / "language", tmp_path / "language")
    model = native("ours", language=language, method=method)
    result = run_cli("export", "--model", str(model), "--format", form, "--to", str(out))
    assert result.exit_code == 1
    assert "bias" in result.stderr or "no adapter" in result.stderr
    assert "Traceback" not in result.stderr
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_llava_refuses_other_backbones_than_clip(native: Make, toys: Path, tmp_path: Path) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**small, image_size=28, patch_size=14)).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "siglip")
    model = native("ours", image="pad")
    description = json.loads((model / "llavactl.json").read_text())
    description["vision"]["model"] = str(tmp_path / "siglip")
    (model / "llavactl.json").write_text(json.dumps(description))
    assert not exported(model, "hf", tmp_path / "hf")["verified"]["faults"]
    result = run_cli("export", "--model", str(model), "--format", "llava", "--to", str(tmp_path / "llava"))
    assert result.exit_code == 1
    assert "siglip" in result.stderr
    assert not (tmp_path / "llava").exists()


SETTINGS = {
    "bos_token_id": 0,
    "eos_token_id": [1, 7],
    "max_length": 512,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "repetition_penalty": 1.5,
}


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("hf", "full"),
        pytest.param("llava", "full", marks=pytest.mark.slow),
        pytest.param("peft", "lora", marks=pytest.mark.slow),
    ],
)
def test_generation_settings(native: Make, toys: Path, tmp_path: Path, form: str, method: str) -> None:
    """Answers end at the end tokens of the base and of the template; decoding is greedy."""
    language = language_of("llama", toys / "language", tmp_path / "language")
    (language / "generation_config.json").write_text(json.dumps(SETTINGS))
    model = native("ours", language=language, method=method, template="chatml")
    assert not exported(model, form, tmp_path / "out")["verified"]["faults"]
    base = tmp_path / "out" / ("base" if form == "peft" else "")
    found = json.loads((base / "generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 3, 7]  # 3: <|im_end|>
    assert found["max_length"] == 512
    assert not found["do_sample"]
    assert not found.keys() & {"temperature", "top_p", "repetition_penalty"}


@pytest.mark.parametrize(
    ("template", "texts"), [("vicuna-v0", ["###"]), ("vicuna-v1", []), ("plain", ["\n"]), ("chatml", [])]
)
@pytest.mark.parametrize(("form", "method"), [("hf", "full"), ("peft", "lora")])
def test_stop_strings_are_in_the_record_and_on_the_card(
    native: Make, tmp_path: Path, form: str, method: str, template: str, texts: list[str]
) -> None:
    """They are not in generation_config.json, with which ``generate`` would require the tokenizer."""
    written(native("ours", method=method, template=template), form, tmp_path / "out")
    base = tmp_path / "out" / ("base" if form == "peft" else "")
    assert json.loads((base / "llavactl_export.json").read_text())["stop_strings"] == texts
    assert "stop_strings" not in json.loads((base / "generation_config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"stop_strings={texts!r}" in card) == bool(texts)
