"""A finished model on disk, with everything needed to use it again.

model/
  llavactl.json            description: components, template, fingerprint of its features, versions; ``location``,
                           where it was written, from which its paths can be followed when it has moved; after full
                           fine-tuning also ``trained_language``, the options to load the language model with
  connector.safetensors    the connector, always its own file
  language/                the language model and its tokenizer, after full fine-tuning in stage 2
  adapter/                 the PEFT adapter, if stage 2 trained one
"""

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
from llavactl.core.identity import component_identity, with_moved_paths
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_files import check_files
from llavactl.core.paths import apply_umask, read_json, sync_folder, write_json
from llavactl.core.schema import FeatureShape
from llavactl.model.build import Parts, build

if TYPE_CHECKING:
    import torch
    from torch import nn

DESCRIPTION = "llavactl.json"
CONNECTOR = "connector.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Loaded:
    """A model folder, read: its ``parts`` and its description."""

    parts: Parts
    description: Mapping[str, Any]


def save(folder: Path, parts: Parts, connector: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Writes ``folder`` whole or not at all: beside it first, then renamed.

    ``connector`` is its state dict in full precision. ``description["method"]`` says what else was
    trained: ``connector`` (nothing), ``full`` or ``lora``.

    Raises:
        StoreError: it can't be written.
    """
    with whole_folder(folder) as temporary:
        # Clones, because safetensors refuses tensors that share memory.
        save_file({name: weight.clone().contiguous() for name, weight in connector.items()}, temporary / CONNECTOR)
        method, language = description["method"], parts.model.language
        if method == "full":
            language.save_pretrained(temporary / "language")
            parts.tokenizer.save_pretrained(temporary / "language")
            description = {**description, "trained_language": _options_of(language)}
        elif method == "lora":
            language.save_pretrained(temporary / "adapter")
        write_json(temporary / DESCRIPTION, {"format": FORMAT, "location": str(folder.absolute()), **description})


def _options_of(language: Any) -> dict[str, Any]:
    """The component that loads the saved ``language``, with the attention implementation, which its files lack."""
    attention = language.config._attn_implementation
    return {"name": "hf", **({"attention": attention} if attention in ("sdpa", "eager") else {})}


def language_of(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The language component of the model in ``folder``, without its adapter: ``{"name", options}``."""
    if description["method"] != "full":
        return dict(description["language"])
    return {**description.get("trained_language", {"name": "hf"}), "model": str((folder / "language").absolute())}


def identity(folder: Path) -> str:
    """A hash of everything that determines the answers of the model in ``folder``.

    That is the contents of its files and of the language model and backbone that they name, and the components.

    Raises:
        ModelError: a part of it can't be read.
    """
    description = describe(folder)
    kinds = {"languages": language_of(folder, description)}
    kinds |= {"vision": description["vision"], "connectors": description["connector"]}
    parts = {kind: component_identity(kind, spec) for kind, spec in kinds.items()}
    parts["templates"] = component_identity("templates", description["template"])
    named = ("vision", "connector", "language", "template", "trained_language", "location", "versions")
    rest = {key: value for key, value in description.items() if key not in named}
    return hash_json([hash_folder(folder, but=(DESCRIPTION,)), parts, rest])


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``folder`` at the end of the block; until then ``folder`` is as it was.

    Raises:
        StoreError: it can't be written: a full disk, no permission.
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
            hint="free some disk, mend its permissions, or another `run_dir`",
        ) from error


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts ``temporary`` in the place of ``folder``, to outlast a power cut; what was there is gone only after that."""
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
    for each in [*(at for at in folder.rglob("*") if at.is_dir()), folder, folder.parent]:
        sync_folder(each)
    shutil.rmtree(old, ignore_errors=True)


def describe(folder: Path) -> dict[str, Any]:
    """The description of the model in ``folder``; if it has moved, with the paths to what moved with it.

    Raises:
        ModelError: there is none, or a newer llavactl wrote it.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        found = sorted(str(p.parent) for p in folder.glob(f"**/{DESCRIPTION}")) if folder.is_dir() else []
        hint = (
            f"did you mean {found[-1]}?"
            if found
            else "`--model` takes a run, a model/ folder, or a checkpoint of another program"
        )
        raise ModelError(f"{folder}: not a model folder (no {DESCRIPTION})", hint=hint)
    check_files([path])
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise ModelError(f"{path}: format {description.get('format')}, this llavactl reads {FORMAT}")
    return with_moved_paths(description, folder)


def of_run(run_dir: Path) -> Path:
    """The last model that a run has finished: stage 2's, else stage 1's."""
    for stage in ("stage2", "stage1"):
        if (folder := run_dir / stage / "model").is_dir():
            return folder
    raise ModelError(
        f"{run_dir}: no stage is trained yet", hint="`llavactl run` trains; `--model DIR` names another model"
    )


def load(folder: Path, *, dtype: str | None = None) -> Loaded:
    """The model in ``folder`` on the CPU, in ``dtype`` (default: the precision it was trained in), not training.

    Raises:
        ModelError: anything missing, of the wrong shape, or not finite.
    """
    description = describe(folder)
    _refuse_broken(folder, description["method"])
    language = language_of(folder, description)
    shape = FeatureShape(**{**description["shape"], "grid": tuple(description["shape"]["grid"])})
    parts = build(description["connector"], language, shape, dtype=dtype or description["precision"])
    load_connector(parts.model.connector, folder)
    if description["method"] == "lora":
        from peft import PeftModel

        with loading("adapter", folder / "adapter"):
            adapted = PeftModel.from_pretrained(parts.model.language, folder / "adapter", autocast_adapter_dtype=False)
        # Not ``adapted.to``: that would round the frequencies of rotary positions, which are no weights, as well.
        own = parts.model.language.get_input_embeddings().weight.dtype
        for weight in adapted.parameters():
            weight.data = weight.data.to(own)
        parts.model.language = adapted
    parts.model.eval().requires_grad_(False)
    return Loaded(parts, description)


def _refuse_broken(folder: Path, method: str) -> None:
    """Raises ModelError if a file of the model folder is missing or broken, before anything large is read."""
    files = [folder / CONNECTOR]
    if method == "lora":
        names = ("adapter_model.safetensors", "adapter_model.bin")  # the latter from older versions of peft
        weights = next((name for name in names if (folder / "adapter" / name).exists()), names[0])
        files += [folder / "adapter" / name for name in ("adapter_config.json", weights)]
    check_files(files)


def load_connector(connector: nn.Module, folder: Path) -> None:
    """Fills ``connector`` from ``folder``; every weight must be there, of the right shape and finite."""
    path = folder / CONNECTOR
    with reading(path):
        weights = load_file(path)
        connector.load_state_dict(weights)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ModelError(f"{path}: holds weights that are not finite")
