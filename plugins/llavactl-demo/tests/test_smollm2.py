"""The converted language model loads without output, has the file's weights, and the tokenizer's exact tokens."""

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from llavactl_demo.weights import LANGUAGE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging


@pytest.fixture(scope="module")
def tokenizer(language: Path):
    return AutoTokenizer.from_pretrained(language)


@pytest.fixture(scope="module")
def model(language: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).eval()


def test_loading_prints_nothing(language: Path, capfd: pytest.CaptureFixture[str]):
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForCausalLM.from_pretrained(language, output_loading_info=True)
        AutoTokenizer.from_pretrained(language)
    if enabled:
        logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert not any(report.values()), report
    assert type(model) is LlamaForCausalLM
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")


def test_weights_equal_the_dequantized_file(model: LlamaForCausalLM):
    """Compared with gguf's dequantization: embeddings, a matrix, and one with permuted rows for rotary embeddings."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(LANGUAGE.path()).tensors}

    def rounded(name: str) -> torch.Tensor:
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        return torch.from_numpy(np.asarray(values)).bfloat16().float()

    layer = model.model.layers[7]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert torch.equal(model.model.embed_tokens.weight, rounded("token_embd.weight"))
    assert torch.equal(layer.mlp.down_proj.weight, rounded("blk.7.ffn_down.weight"))
    # llama.cpp stores each head's 64 rows as 32 pairs; transformers as two halves.
    paired = rounded("blk.7.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(layer.self_attn.q_proj.weight, paired)


def test_the_model_generates_fluent_text(model: LlamaForCausalLM, tokenizer):
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris.")


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    assert tokenizer.is_fast
    text = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer(text).input_ids[0] == 1
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template(tokenizer):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # Spaces before a digit are one token; GPT-2's rule gives ["a", "Ġ", "Ġ", "1", "2"].
        ("a  12", ["a", "ĠĠ", "1", "2"]),
        ("x\n\n3", ["x", "ĊĊ", "3"]),
        ("in 1999", ["in", "Ġ", "1", "9", "9", "9"]),
        (" don't", ["Ġdon", "'t"]),
    ],
)
def test_the_pre_tokenizer_splits_digits_first(tokenizer, text: str, tokens: list[str]):
    assert tokenizer.tokenize(text) == tokens


@pytest.mark.parametrize("text", ["café, naïve — 你好 🙂", "  two  spaces\n\n\ttab ", "def f(x):\n    return x ** 2"])
def test_decoding_restores_the_text(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    offsets = tokenizer("The red circle.", return_offsets_mapping=True).offset_mapping
    assert ["The red circle."[start:end] for start, end in offsets] == ["The", " red", " circle", "."]
