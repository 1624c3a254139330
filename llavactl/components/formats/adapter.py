"""Reads LoRA adapters of other programs: every tensor must belong to the language model."""

from __future__ import annotations

import warnings
from collections.abc import Set
from pathlib import Path
from typing import Any

from llavactl.components.formats.native import adapter_weights
from llavactl.components.formats.weights import read_file
from llavactl.components.languages.llava_checkpoint import load_arguments
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reason
from llavactl.core.model_files import ADAPTER_CONFIG
from llavactl.core.paths import read_json


def check_adapter(folder: Path, base: str | None) -> None:
    """Checks that the adapter in ``folder`` fits the language model ``base``.

    Raises:
        ModelError: ``base`` is None, the adapter is not a LoRA adapter, or its tensors don't match ``base``.
    """
    if base is None:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is missing")
    refuse_mismatched_adapter(folder, read_file(adapter_weights(folder)).keys(), base)


def refuse_mismatched_adapter(folder: Path, names: Set[str], base: str) -> None:
    """Refuses the adapter in ``folder`` unless its tensors ``names`` are those that peft creates for ``base``.

    peft silently ignores unexpected tensors, such as those of an adapter on the vision encoder, and initializes missing
    ones.
    """
    if (peft_type := read_json(folder / ADAPTER_CONFIG).get("peft_type")) != "LORA":
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: peft_type {peft_type} is not supported", hint="llavactl reads LORA adapters"
        )
    expected = _expected_names(folder, base)
    for problem, tensors in (("unexpected", names - expected), ("missing", expected - names)):
        if tensors:
            raise ModelError(
                f"{folder}: {len(tensors)} {problem} adapter tensors, such as {min(tensors)}",
                hint="llavactl reads only complete adapters of the language model",
            )


def _expected_names(folder: Path, base: str) -> Set[str]:
    """The tensor names of an adapter configured as in ``folder``; no weights are loaded."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = load_arguments(base).get("config") or AutoConfig.from_pretrained(base, trust_remote_code=False)
        adapter = LoraConfig.from_pretrained(folder)
        adapter.init_lora_weights = False
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(AutoModelForCausalLM.from_config(config, trust_remote_code=False), adapter)
            return get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: not an adapter for {base}: {reason(error)}") from error
