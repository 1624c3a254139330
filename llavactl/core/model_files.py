"""Checks the files of a model: type, size and completeness, without reading weights.

A failed download may leave a Git LFS pointer, an HTML page or a truncated file under the right name. Libraries then
raise their parser's exception, without the name of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""File names of a model's weights, in the order in which transformers looks for them."""

TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "chat_template.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Files of which a tokenizer has at least one; without any of them, transformers builds one without tokens."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Weight files of an adapter in the order in which peft looks for them; older versions of peft wrote the second."""

_OTHERS = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *(ADAPTER_CONFIG, *ADAPTER_WEIGHTS),
)
SMALL_FILES = ("config.json", *TOKENIZER, *PROCESSOR, *_OTHERS)
"""All files of a model except its weights; a library may fail on any of them."""

INCOMPLETE = "the download may be incomplete: download it again"
"""The hint for a broken file."""

_POINTERS = {b"version https://git-lfs.github.com/spec": "Git LFS", b"/annex/objects/": "git-annex"}
_LARGE = 4_000_000
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


def file_error(file: Path) -> ModelError | None:
    """An error if ``file`` is not a valid file of the type that its suffix indicates, else None.

    For weights, only the file size is checked, against the header.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(512)
        for mark, what in _POINTERS.items():
            if head.startswith(mark):
                command = "git lfs pull" if "LFS" in what else "git annex get ."
                return ModelError(f"{file}: a {what} pointer, not the file", hint=f"run `{command}` in {file.parent}")
        if not size:
            why: str | None = "empty"
        elif head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
            why = "an HTML page, probably an error or login page that was downloaded instead of the file"
        else:
            why = _CHECKS.get(file.suffix, lambda _file, _size: None)(file, size)
    except FileNotFoundError:
        why = "a broken symbolic link" if file.is_symlink() else "no such file"
    except OSError as error:
        why = error.strerror or str(error)
    return ModelError(f"{file}: {why}", hint=INCOMPLETE) if why else None


def _safetensors(file: Path, size: int) -> str | None:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > _MAX_HEADER or opened.read(1) != b"{":
            return "not a safetensors file"
        if 8 + length > size:
            return f"truncated: {size:,} bytes, expected a header of {length:,}"
        opened.seek(8)
        try:
            tensors = json.loads(opened.read(length))
            end = 8 + length + max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "not a safetensors file: its header can't be read"
    return None if size == end else f"{'truncated' if size < end else 'damaged'}: {size:,} bytes, expected {end:,}"


def _json(file: Path, size: int) -> str | None:
    if size > _LARGE:  # parsing takes 0.5 s; truncation is detected at the end of the file
        with file.open("rb") as opened:
            opened.seek(-64, os.SEEK_END)
            return None if opened.read().rstrip().endswith(b"}") else "truncated JSON"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        return "not JSON: nested too deeply"
    return None if isinstance(document, dict) else "expected a JSON object"


def _text(file: Path, _size: int) -> str | None:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return None


def _pickle(file: Path, _size: int) -> str | None:
    """PyTorch files are zip archives since PyTorch 1.6; older ones are plain pickles."""
    with file.open("rb") as opened:
        head = opened.read(4)
    if head[:1] == b"\x80":
        return None
    if head != b"PK\x03\x04":
        return "not a PyTorch weight file"
    try:
        with zipfile.ZipFile(file):
            return None
    except zipfile.BadZipFile:
        return "truncated"


_CHECKS: Mapping[str, Callable[[Path, int], str | None]] = {
    ".safetensors": _safetensors,
    ".json": _json,
    ".jinja": _text,
    ".txt": _text,
    ".bin": _pickle,
    ".pt": _pickle,
    ".pth": _pickle,
}


def weight_files(folder: Path) -> list[Path]:
    """The weight files in ``folder`` that transformers would load; empty if none exist.

    Raises:
        ModelError: the index can't be read or lists a missing file.
    """
    first = next((folder / name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    names = shards_of(first)
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{first}: lists {missing[0]}{more}, not found in {folder}", hint=INCOMPLETE)
    return [folder / name for name in names]


def shards_of(index: Path) -> list[str]:
    """The names of the weight files listed in ``index`` (``*.index.json``).

    Raises:
        ModelError: the index can't be read.
    """
    check_files([index])
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{index}: not a weight index: expected a mapping `weight_map`", hint=INCOMPLETE)
    return sorted(set(files.values()))


def check_files(files: Sequence[Path]) -> None:
    """Raises ModelError for the first broken file in ``files``."""
    for file in files:
        if error := file_error(file):
            raise error


def quantization_method(folder: Path) -> str:
    """The quantization method of the weights in ``folder``; empty if they are not quantized."""
    config = read_json(folder / "config.json")
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for key, method in (("quantization_config", ""), ("compression_config", ""), ("quantization", "MLX")):
            if (quantization := part.get(key)) and isinstance(quantization, Mapping):
                default = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & quantization.keys() else method
                return str(quantization.get("quant_method") or default or "unknown method")
    older = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # predate support in transformers
    return next((method for name, method in older.items() if (folder / name).is_file()), "")


def has_vocabulary(folder: Path) -> bool:
    """Whether ``folder`` has the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def local_folder(model: str | Path) -> Path | None:
    """The folder of ``model``: for an id, its folder in the hub's cache, or None if it is not cached."""
    if Path(model).is_absolute():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):
        config = try_to_load_from_cache(str(model), "config.json")
        return Path(config).parent if isinstance(config, str) else None
    return None
