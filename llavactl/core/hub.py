"""Downloads models and files from the Hugging Face Hub to its cache; the only module that does."""

from __future__ import annotations

from pathlib import Path

from llavactl.core.library_errors import loading


def download(model: str, hint: str) -> Path:
    """The folder of the hub's ``model``; files that are not in the cache are downloaded.

    Raises:
        ModelError: the download failed.
    """
    from huggingface_hub import snapshot_download

    with loading("model", model, hint):
        folder = snapshot_download(model, ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5"])
    return Path(folder)


def download_file(name: str, what: str, model: str, hint: str, *, required: bool = True) -> Path | None:
    """The file ``name`` of the hub's ``model``, downloaded if it is not in the cache; None if the model lacks it.

    ``what`` is the role of the model in messages.

    Raises:
        ModelError: the download failed, or the model lacks a ``required`` file.
    """
    from transformers.utils import cached_file

    with loading(what, model, hint):
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=required)
    return None if path is None else Path(path)


def has_file(name: str, model: str) -> bool:
    """Whether ``model`` (a folder or an id) has the file ``name``; False if it is not cached and the hub is offline."""
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(model, name, **optional) is not None
