"""A LoRA adapter as ``peft`` loads it, beside the LLaVA of transformers that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.components.formats.adapter import refuse_unfit
from llavactl.components.formats.hf import assemble
from llavactl.components.formats.hf_read import read_hf
from llavactl.components.formats.native import NativeModel
from llavactl.components.formats.weights import read
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reading
from llavactl.core.paths import read_json, write_atomic, write_json

BASE = "base"
OURS, THEIRS = "base_model.model.model.", "base_model.model.model.language_model."


class PeftAdapter:
    """The layout ``peft``: the adapter at the top, ``base/`` with the language model as it was and the connector."""

    reload = Path(__file__).with_name("hf_outputs.py")

    def __init__(self, options: Any) -> None:
        pass

    def recognise(self, folder: Path) -> bool:
        return read_json(folder / "adapter_config.json").get("base_model_name_or_path") == BASE

    def read(self, folder: Path, model: Path) -> None:
        """Writes the model folder ``model`` that stands for the adapter and its base."""
        from safetensors.torch import save_file

        if not (folder / BASE / "config.json").is_file():
            raise ModelError(f"{folder}: its {BASE}/ is missing", hint="the adapter and its base belong together")
        read_hf(folder / BASE, model)
        config = read_json(folder / "adapter_config.json")
        weights = read(folder / "adapter_model.safetensors")
        (model / "adapter").mkdir(exist_ok=True)
        ours = {name.replace(THEIRS, OURS, 1): weight for name, weight in weights.items()}
        save_file(ours, model / "adapter" / "adapter_model.safetensors")
        names = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in ours})
        language = str((folder / BASE).absolute())
        own = {**config, "target_modules": names, "base_model_name_or_path": language}
        _write_config(model / "adapter", own)
        refuse_unfit(model / "adapter", ours.keys(), language)
        description = read_json(model / "llavactl.json")
        write_json(model / "llavactl.json", {**description, "method": "lora"})

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``.

        Raises:
            ModelError: it has no adapter, or one that is more than LoRA on linear layers.
        """
        from safetensors.torch import load_file, save_file

        native = NativeModel(model)
        if native.method != "lora":
            raise ModelError(f"{model}: stage 2 trained no adapter", hint="--format hf exports the model whole")
        with reading(file := native.adapter / "adapter_model.safetensors"):
            weights = load_file(file)
        if others := sorted(name for name in weights if not name.startswith(OURS)):
            raise ModelError(f"{native.adapter}: {others[0]} lies outside the language model's blocks")
        assemble(native, native.base(), to / BASE)
        renamed = {name.replace(OURS, THEIRS, 1): weight for name, weight in weights.items()}
        save_file(renamed, to / "adapter_model.safetensors", metadata={"format": "pt"})
        config = read_json(native.adapter / "adapter_config.json")
        names = "|".join(sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights}))
        # By path: the vision tower has layers of the same names.
        own = {"base_model_name_or_path": BASE, "target_modules": rf".*language_model.*\.({names})"}
        _write_config(to, {**config, **own})


def _write_config(adapter: Path, config: Mapping[str, Any]) -> None:
    """Writes ASCII only, since peft reads the file in the locale's encoding."""
    write_atomic(adapter / "adapter_config.json", json.dumps(config, indent=2) + "\n")
