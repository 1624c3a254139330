"""SmolLM2-135M-Instruct out of a GGUF file, as a plain ``LlamaForCausalLM`` folder with its tokenizer.

The weights are written in bfloat16. They are 4-bit values (Q4_1) to begin with, and rounding them moves the
next-token distributions by about 1e-4 nats (KL divergence, mean over positions). For that the folder is half
the size, and every dtype reads the same numbers: a frozen bfloat16 model and the float32 masters of a trained
one start alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8192
"""Tokens, ``llama.context_length`` of the file."""


def write(source: Path, folder: Path) -> None:
    """Writes model and tokenizer of the GGUF file ``source`` to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            # Without it the model stays quantised and can't be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        tokenizer(source).save_pretrained(folder)


def tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file ``source``, with the word splitting that the file asks for.

    The file names its splitting (``tokenizer.ggml.pre = smollm``: each digit alone, then GPT-2's rule);
    transformers reads it as GPT-2's alone, which takes the last space before a digit off a longer
    run of spaces: "a  1" would become tokens that the model was never trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    made.model_max_length = CONTEXT
    return made


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps transformers' bars for loading and saving off stderr, which flash by; the setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
