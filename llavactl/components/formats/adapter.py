"""A LoRA adapter of another program: every one of its tensors must have its place in the language model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Set
from pathlib import Path
from typing import Any

from llavactl.components.formats.weights import read
from llavactl.components.languages.inside import inside
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which peft looks for them."""


def copy_adapter(folder: Path, to: Path, base: str | None) -> None:
    """Copies the adapter in ``folder`` to ``to``.

    Raises:
        ModelError: it names no ``base``, is no LoRA, or its tensors are not those of one on ``base``.
    """
    if base is None:
        raise ModelError(f"{folder / CONFIG}: names no base_model_name_or_path")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder}: an adapter without weights", hint=f"looked for {' and '.join(WEIGHTS)}")
    refuse_unfit(folder, read(file).keys(), base)
    to.mkdir(exist_ok=True)
    for each in (folder / CONFIG, file):
        shutil.copyfile(each, to / each.name)


def refuse_unfit(folder: Path, names: Set[str], base: str) -> None:
    """Refuses the adapter in ``folder`` unless its tensors ``names`` are those that peft would make for ``base``.

    peft itself leaves out what it finds no place for, such as an adapter of the vision encoder, and takes what is
    missing as untrained.
    """
    if (kind := read_json(folder / CONFIG).get("peft_type")) != "LORA":
        raise ModelError(f"{folder / CONFIG}: peft_type is {kind}", hint="llavactl reads LORA adapters")
    wanted = _tensor_names(folder, base)
    for what, found in (("that its base has no place for", names - wanted), ("too few", wanted - names)):
        if found:
            raise ModelError(
                f"{folder}: {len(found)} adapter tensors {what}, such as {min(found)}",
                hint="llavactl reads adapters of the language model alone, whole",
            )


def _tensor_names(folder: Path, base: str) -> Set[str]:
    """The names of the tensors of an adapter configured as in ``folder``; nothing is computed."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = inside(base).get("config") or AutoConfig.from_pretrained(base, trust_remote_code=False)
        adapter = LoraConfig.from_pretrained(folder)
        adapter.init_lora_weights = False
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(AutoModelForCausalLM.from_config(config, trust_remote_code=False), adapter)
            return get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder / CONFIG}: no adapter of {base}: {reason}") from error
