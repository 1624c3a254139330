"""Format ``peft``: a LoRA adapter that ``peft`` loads, and its base model in format ``hf``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llavactl.components.formats.adapter import refuse_mismatched_adapter
from llavactl.components.formats.hf import save_checkpoint
from llavactl.components.formats.hf_read import hf_checkpoint
from llavactl.components.formats.native import open_model, save_model
from llavactl.components.formats.weights import read_file
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reading
from llavactl.core.model_files import ADAPTER_CONFIG
from llavactl.core.paths import read_json, write_atomic

BASE = "base"
WEIGHTS = "adapter_model.safetensors"
NATIVE_PREFIX, LLAVA_PREFIX = "base_model.model.model.", "base_model.model.model.language_model."
"""Prefixes of adapter tensors in llavactl's model folder, and on ``LlavaForConditionalGeneration``."""


class PeftAdapter:
    """The format ``peft``: the adapter, and ``base/`` with connector and unmodified language model."""

    reload = Path(__file__).with_name("hf_outputs.py")

    def __init__(self, options: Any) -> None:
        pass

    def recognise(self, folder: Path) -> bool:
        return read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") == BASE

    def read(self, folder: Path, model: Path) -> None:
        """Converts the adapter and its base in ``folder`` to the model folder ``model``."""
        from safetensors.torch import save_file

        if not (folder / BASE / "config.json").is_file():
            raise ModelError(
                f"{folder}: {BASE}/ is missing", hint=f"copy the folder including {BASE}/, or export again"
            )
        checkpoint = hf_checkpoint(folder / BASE)
        config = read_json(folder / ADAPTER_CONFIG)
        tensors = read_file(folder / WEIGHTS)
        weights = {name.replace(LLAVA_PREFIX, NATIVE_PREFIX, 1): weight for name, weight in tensors.items()}
        language = str((folder / BASE).absolute())
        changes = {"target_modules": _module_names(weights), "base_model_name_or_path": language}
        with TemporaryDirectory() as name:
            adapter = Path(name)
            save_file(weights, adapter / WEIGHTS)
            _write_config(adapter, {**config, **changes})
            refuse_mismatched_adapter(adapter, weights.keys(), language)
            save_model(model, **checkpoint, adapter=adapter)

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``.

        Raises:
            ModelError: the model has no adapter, or one that adapts other layers than linear ones.
        """
        from safetensors.torch import load_file, save_file

        saved = open_model(model)
        if saved.adapter is None:
            raise ModelError(
                f"{model}: the model has no adapter", hint="use `--format hf` to export the complete model"
            )
        with reading(file := saved.adapter / WEIGHTS):
            weights = load_file(file)
        if others := sorted(name for name in weights if not name.startswith(NATIVE_PREFIX)):
            raise ModelError(f"{saved.adapter}: adapter tensor {others[0]} is outside the language model's layers")
        save_checkpoint(saved, saved.language(merged=False), to / BASE)
        renamed = {name.replace(NATIVE_PREFIX, LLAVA_PREFIX, 1): weight for name, weight in weights.items()}
        save_file(renamed, to / WEIGHTS, metadata={"format": "pt"})
        config = read_json(saved.adapter / ADAPTER_CONFIG)
        names = "|".join(_module_names(weights))
        # A pattern with the path, because the vision encoder has layers with the same names.
        changes = {"base_model_name_or_path": BASE, "target_modules": rf".*language_model.*\.({names})"}
        _write_config(to, {**config, **changes})


def _module_names(weights: Iterable[str]) -> list[str]:
    """The names of the adapted modules, such as ``q_proj``."""
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights})


def _write_config(adapter: Path, config: Mapping[str, Any]) -> None:
    """Writes ASCII only, because peft reads the file in the locale's encoding."""
    write_atomic(adapter / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
