"""Saves and loads model folders, whose layout is that of ``llavactl.core.model_description``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llavactl.core.errors import ModelError, StoreError
from llavactl.core.hashes import hash_folder, hash_json
from llavactl.core.identity import component_identity
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_description import (
    ADAPTER,
    CONNECTOR,
    DESCRIPTION,
    FORMAT,
    LANGUAGE,
    ModelDescription,
    feature_shape,
    language_spec,
    read_description,
)
from llavactl.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_files
from llavactl.core.paths import apply_umask, sync_folder, write_json
from llavactl.model.build import ModelBundle, build
from llavactl.model.quantized import Bits
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LoadedModel:
    """The model of a model folder, and its description."""

    bundle: ModelBundle
    description: ModelDescription


def save(
    folder: Path,
    bundle: ModelBundle,
    connector: Mapping[str, torch.Tensor],
    description: Mapping[str, Any],
    language_state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the model folder ``folder`` atomically.

    ``connector`` is its state dict in full precision. ``description["method"]`` is what else was trained:
    ``connector`` (nothing), ``full`` or ``lora``. ``language_state`` replaces the state dict of the language model, or
    of its adapter.

    Raises:
        StoreError: it can't be written.
    """
    with atomic_folder(folder) as temporary:
        # Cloned, because safetensors refuses tensors that share memory.
        save_file({name: weight.clone().contiguous() for name, weight in connector.items()}, temporary / CONNECTOR)
        method, language = description["method"], bundle.model.language
        if method == "full":
            language.save_pretrained(temporary / LANGUAGE, state_dict=language_state)
            if language_state is not None:
                # transformers writes the dtype of the parameters in memory, not of ``language_state``.
                language.config.dtype = description["precision"]
                language.config.save_pretrained(temporary / LANGUAGE)
            bundle.tokenizer.save_pretrained(temporary / LANGUAGE)
            description = {**description, "trained_language": _loading_options(language)}
        elif method == "lora":
            _sort_target_modules(language)
            language.save_pretrained(temporary / ADAPTER, state_dict=language_state)
        write_json(temporary / DESCRIPTION, {"format": FORMAT, "location": str(folder.absolute()), **description})


def _sort_target_modules(adapted: Any) -> None:
    """Sorts the module names in the configuration of each adapter; peft keeps a set, in a different order every run."""
    for config in adapted.peft_config.values():
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)


def _loading_options(language: Any) -> dict[str, Any]:
    """The component that loads the saved ``language``, with the attention implementation, which isn't in its files."""
    attention = language.config._attn_implementation
    return {"name": "hf", **({"attention": attention} if attention in ("sdpa", "eager") else {})}


def identity(folder: Path) -> str:
    """A hash of everything that determines the answers of the model in ``folder``.

    It covers the contents of its files, the language model and vision encoder that they refer to, and the components.

    Raises:
        ModelError: a file can't be read.
    """
    description = read_description(folder)
    specs = {"languages": language_spec(folder, description)}
    specs |= {"vision": description["vision"], "connectors": description["connector"]}
    components = {kind: component_identity(kind, spec) for kind, spec in specs.items()}
    components["templates"] = component_identity("templates", description["template"])
    excluded = ("vision", "connector", "language", "template", "trained_language", "location", "versions", "plugins")
    rest = {key: value for key, value in description.items() if key not in excluded}
    return hash_json([hash_folder(folder, exclude=(DESCRIPTION,)), components, rest])


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``folder`` at the end of the block.

    Raises:
        StoreError: it can't be written, for example because of a full disk or missing permission.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(
            f"{folder}: can't be written: {' '.join(str(error).split())}",
            hint="free disk space, check permissions, or set another `run_dir`",
        ) from error


def replace_folder(temporary: Path, folder: Path) -> None:
    """Replaces ``folder`` by ``temporary``, flushed to disk; the previous contents are removed afterwards."""
    for file in temporary.rglob("*"):
        if file.is_file():
            apply_umask(file)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    for changed in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent]:
        sync_folder(changed)
    shutil.rmtree(old, ignore_errors=True)


PREVIEW = "preview"
"""The folder, in that of a stage, with its previews; it has a model while the stage is in training or interrupted."""


def preview_model(stage_folder: Path) -> Path:
    """The model folder of the newest preview of a stage."""
    return stage_folder / PREVIEW / "model"


def newest_preview(run_dir: Path) -> Path | None:
    """The model of the newest preview of the last stage that is in training or interrupted; None without one."""
    folders = (preview_model(run_dir / stage) for stage in reversed(STAGES.values()))
    return next((folder for folder in folders if folder.is_dir()), None)


def latest_model(run_dir: Path) -> Path:
    """The model folder of the last finished stage of a run."""
    for stage in reversed(STAGES.values()):
        if (folder := run_dir / stage / "model").is_dir():
            return folder
    raise ModelError(f"{run_dir}: no stage has been trained", hint="train with `llavactl run`, or pass `--model DIR`")


def load(folder: Path, *, dtype: str | None = None, quantize_on: str | None = None, bits: Bits = 4) -> LoadedModel:
    """The model in ``folder`` on the CPU, in ``dtype`` (default: that of its training), in evaluation mode.

    With ``quantize_on``, its language model is loaded in ``bits`` on this device; see ``build``.

    Raises:
        ModelError: a file is missing or broken, or a weight has the wrong shape or is not finite.
    """
    description = read_description(folder)
    _check_model_files(folder, description["method"])
    language = language_spec(folder, description)
    shape = feature_shape(description)
    dtype = dtype or description["precision"]
    bundle = build(description["connector"], language, shape, dtype=dtype, quantize_on=quantize_on, bits=bits)
    load_connector(bundle.model.connector, folder)
    if description["method"] == "lora":
        from peft import PeftModel

        with loading("adapter", folder / ADAPTER):
            adapted = PeftModel.from_pretrained(bundle.model.language, folder / ADAPTER, autocast_adapter_dtype=False)
        # Not ``adapted.to``, which would also round the frequencies of rotary position embeddings.
        weight_dtype = bundle.model.language.get_input_embeddings().weight.dtype
        for weight in adapted.parameters():
            if weight.is_floating_point():  # quantized weights are integers
                weight.data = weight.data.to(weight_dtype)
        bundle.model.language = adapted
    bundle.model.eval().requires_grad_(False)
    return LoadedModel(bundle, description)


def _check_model_files(folder: Path, method: str) -> None:
    """Raises ModelError if a file of the model folder is missing or broken, before large files are read."""
    files = [folder / CONNECTOR]
    if method == "lora":
        weights = next((name for name in ADAPTER_WEIGHTS if (folder / ADAPTER / name).exists()), ADAPTER_WEIGHTS[0])
        files += [folder / ADAPTER / name for name in (ADAPTER_CONFIG, weights)]
    check_files(files)


def load_connector(connector: nn.Module, folder: Path) -> None:
    """Loads the weights of ``connector`` from ``folder``; raises ModelError unless all are valid and finite."""
    path = folder / CONNECTOR
    with reading(path):
        weights = load_file(path)
        connector.load_state_dict(weights)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ModelError(f"{path}: contains weights that are not finite")
