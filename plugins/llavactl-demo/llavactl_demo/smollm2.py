"""Conversion of SmolLM2-135M-Instruct from a GGUF file to a ``LlamaForCausalLM`` folder with its tokenizer.

The weights are stored in bfloat16. They are dequantized 4-bit values (Q4_1); rounding them changes the next-token
distributions by about 1e-4 nats (mean KL divergence). The folder is half the size of float32, and the weights are equal
in every dtype: a frozen bfloat16 model and float32 master weights start alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8192
"""In tokens; ``llama.context_length`` of the file."""


def write(source: Path, folder: Path) -> None:
    """Converts model and tokenizer of the GGUF file ``source`` to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            # Without it, the model stays quantized and can't be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file ``source``, with the file's pre-tokenizer.

    The file specifies ``tokenizer.ggml.pre = smollm``: single digits, then GPT-2's rule. transformers applies only
    GPT-2's rule, which separates the last space before a digit from other spaces: "a  1" would become tokens that the
    model was not trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT
    return tokenizer


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disables transformers' progress bars for loading and saving, then restores the setting."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
