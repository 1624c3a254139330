"""Diagnoses a model's files in one line, before they are loaded and after a library failed to load them.

A failed download may leave a Git LFS pointer, an error page or a truncated file under the right name. Libraries then
raise whatever their parsers raise, without naming the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llavactl.core.errors import LlavactlError, ModelError
from llavactl.core.network import proxy_fault
from llavactl.core.paths import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""File names of a model's weights, in the order in which transformers looks for them."""

LANGUAGE = "language model"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "chat_template.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_MORE = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)

_POINTERS = {b"version https://git-lfs.github.com/spec": "Git LFS", b"/annex/objects/": "git-annex"}
_LARGE = 4_000_000
_MAX_HEADER = 100_000_000  # safetensors' own bound
_WHOLE = "the download may be incomplete: download it again"
_OWN_CODE = "needs custom code (trust_remote_code), which llavactl never runs"
_NOT_RUN = "use a model whose class is part of transformers, or write a plugin for this one"


def file_fault(file: Path) -> ModelError | None:
    """Why ``file`` is not a valid file of the type that its name says; None if no fault is found.

    Weights are not read; only the file size is checked against the header.
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
    return ModelError(f"{file}: {why}", hint=_WHOLE) if why else None


def _safetensors(file: Path, size: int) -> str | None:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > _MAX_HEADER or opened.read(1) != b"{":
            return "not a safetensors file"
        if 8 + length > size:
            return f"truncated: {size:,} bytes, but its header alone has {length:,}"
        opened.seek(8)
        try:
            tensors = json.loads(opened.read(length))
            end = 8 + length + max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "not a safetensors file: its header can't be read"
    return None if size == end else f"{'truncated' if size < end else 'damaged'}: {size:,} bytes, expected {end:,}"


def _json(file: Path, size: int) -> str | None:
    if size > _LARGE:  # parsing takes half a second, and a truncated file shows at its end
        with file.open("rb") as opened:
            opened.seek(-64, os.SEEK_END)
            return None if opened.read().rstrip().endswith(b"}") else "truncated JSON"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        return "not JSON: nested too deeply"
    return None if isinstance(found, dict) else "expected a JSON object"


def _text(file: Path, _size: int) -> str | None:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return None


def _pickle(file: Path, _size: int) -> str | None:
    """PyTorch's files are zip archives since 1.6, before that bare pickles."""
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
    """The weight files in ``folder`` that transformers would read; empty if there are none.

    Raises:
        ModelError: the index can't be read, or names a file that doesn't exist.
    """
    first = next((folder / name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    names = shards_of(first)
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{first}: it names {missing[0]}{more}, not found in {folder}", hint=_WHOLE)
    return [folder / name for name in names]


def shards_of(index: Path) -> list[str]:
    """The names of the weight files that ``index`` (``*.index.json``) lists.

    Raises:
        ModelError: it can't be read.
    """
    check_files([index])
    held = read_json(index).get("weight_map")
    if not isinstance(held, dict) or not held or not all(isinstance(name, str) for name in held.values()):
        raise ModelError(f"{index}: not a weight index: expected a mapping `weight_map`", hint=_WHOLE)
    return sorted(set(held.values()))


def check_files(files: Sequence[Path]) -> None:
    """Raises ModelError for the first of ``files`` that has a fault."""
    for file in files:
        if fault := file_fault(file):
            raise fault


def check_model(
    model: str | Path, what: str, names: Sequence[str] = (), *, weights: bool = False, hint: str = ""
) -> None:
    """Refuses a ``model`` (a folder or an id) that can't be loaded, before loading any of it.

    Checks its configuration and those of the files ``names`` that exist; with ``weights`` also a folder's weight
    files. ``what`` is the role of the model in messages, such as "language model".

    Raises:
        ModelError: a file is missing or broken, the weights are quantised, or the model needs custom code.
    """
    local = Path(model).is_absolute()
    folder = Path(model) if local else _configuration(str(model), what, hint)
    if not (folder / "config.json").is_file():
        why = "no config.json" if folder.is_dir() else "no such folder"
        raise ModelError(f"{what} {model}: {why}", hint=hint)
    if any("\ud800" <= sign <= "\udfff" for sign in str(folder)):
        code = sys.getfilesystemencoding()
        raise ModelError(
            f"{what} {folder}: the folder's name is not valid {code}",
            hint="rename the folder" if code == "utf-8" else "set PYTHONUTF8=1, or a UTF-8 locale (LC_ALL=C.UTF-8)",
        )
    looked_at = ("config.json", "generation_config.json", *names)
    check_files([folder / name for name in looked_at if os.path.lexists(folder / name)])
    if method := quantised(folder):
        also = "; `stage2.method: qlora` quantises it for training" if what == LANGUAGE else ""
        raise ModelError(
            f"{what} {model}: its weights are quantised ({method})", hint=f"use the unquantised model{also}"
        )
    if "/" in str(read_json(folder / "config.json").get("attn_implementation", "")):  # a kernel on the hub
        raise ModelError(f"{what} {model}: {_OWN_CODE}", hint=_NOT_RUN)
    if weights and local:
        check_files(weight_files(folder))


def _configuration(model: str, what: str, hint: str) -> Path:
    """The folder in the hub's cache that has the configuration of ``model``; downloaded if necessary."""
    from transformers.utils import cached_file

    with loading(what, model, hint):
        return Path(cached_file(model, "config.json")).parent


def quantised(folder: Path) -> str:
    """The quantisation method of the weights in ``folder``; empty if they are not quantised."""
    config = read_json(folder / "config.json")
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for key, method in (("quantization_config", ""), ("compression_config", ""), ("quantization", "MLX")):
            if (found := part.get(key)) and isinstance(found, Mapping):
                bits = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & found.keys() else method
                return str(found.get("quant_method") or bits or "unknown method")
    older = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # from before transformers supported these
    return next((method for name, method in older.items() if (folder / name).is_file()), "")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Converts what a library raises while reading ``file`` to an error that names the file.

    Raises:
        ModelError: for any exception.
    """
    try:
        yield
    except (LlavactlError, MemoryError):
        raise
    except Exception as error:
        raise file_fault(file) or ModelError(f"{file}: {reason(error)}", hint=_WHOLE) from error


@contextlib.contextmanager
def loading(what: str, model: str | Path, hint: str = "", *, weights: bool = False) -> Iterator[None]:
    """Converts what a library raises while loading ``model`` to an error that names it, or its broken file.

    ``model`` is a folder or an id, ``what`` its role in messages; ``weights``: the weights are loaded, too.

    Raises:
        ModelError: for any exception but out-of-memory errors, which are passed on.
    """
    try:
        yield
    except (LlavactlError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(f"{what} {model}: {_OWN_CODE}", hint=_NOT_RUN) from error
        raise _culprit(model, weights) or _refusal(what, model, error, hint) from error


def _culprit(model: str | Path, weights: bool) -> ModelError | None:
    """The error for the first broken file in the model's folder."""
    folder = local_folder(model)
    if folder is None or not folder.is_dir():
        return None
    names = ("config.json", *TOKENIZER, *PROCESSOR, *_MORE)
    try:
        check_files([folder / name for name in names if os.path.lexists(folder / name)])
        check_files(weight_files(folder) if weights else ())
    except ModelError as error:
        return error
    return None


def local_folder(model: str | Path) -> Path | None:
    """The folder of ``model``; for an id its folder in the hub's cache, if it is there."""
    if Path(model).is_absolute():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):
        found = try_to_load_from_cache(str(model), "config.json")
        return Path(found).parent if isinstance(found, str) else None
    return None


def _refusal(what: str, model: str | Path, error: Exception, hint: str) -> ModelError:
    if isinstance(error, pickle.UnpicklingError | EOFError) or "file might be corrupted" in str(error):
        return ModelError(f"{what} {model}: its *.bin files are truncated, or hold more than tensors", hint=_WHOLE)
    if not Path(model).is_absolute() and (fault := proxy_fault()):
        return ModelError(f"{what} {model}: not downloaded: {fault.message}", hint=fault.hint)
    return ModelError(f"{what} {model}: {reason(error)}", hint=hint)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device or the host is out of memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory: you tried to allocate" in str(error)


_NEED_NAME = (KeyError, IndexError, TypeError, AttributeError, AssertionError, SystemExit)
"""Exceptions whose messages need the exception's name: a KeyError's is only the key."""


def reason(error: BaseException) -> str:
    """The message of ``error`` in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError) and not error.object.isascii():  # only file names are encoded this way
        name = json.dumps(error.object)
        return f"a file name can't be encoded in this locale ({error.encoding}): {name}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((at for at, line in enumerate(lines) if not line.endswith((":", ","))), 0)
    message = " ".join(lines[: last + 1])
    named = isinstance(error, _NEED_NAME) or not message
    return printable(f"{type(error).__name__}: {message}".removesuffix(": ") if named else message)


def printable(text: str) -> str:
    """``text`` with lone surrogates escaped."""
    return text.encode(errors="backslashreplace").decode()


def downloaded(model: str, hint: str) -> Path:
    """The folder of the hub's ``model``; files that are not in the cache are downloaded.

    Raises:
        ModelError: the download failed.
    """
    from huggingface_hub import snapshot_download

    with loading("model", model, hint):
        found = snapshot_download(model, ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5"])
    return Path(found)
