"""Reads models and files of the Hugging Face Hub, downloaded to its cache; the only module that does.

If the hub doesn't answer a first request, the process reads from the cache only: huggingface_hub would retry the
request for each file that is not cached for 23 s.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from llavactl.core.library_errors import loading

log = logging.getLogger(__name__)

_ANSWER_S = 5
"""How long the first request may take, unless HF_HUB_ETAG_TIMEOUT is set."""

_AGAIN_S = 60
"""When a hub that didn't answer is asked again: in a notebook, the user may have connected meanwhile."""


@dataclass
class _State:
    """What this process knows about the hub: whether it answered, when it last didn't, and whether that was logged."""

    answered: bool = False
    failed_at: float = -math.inf
    logged: bool = False


_state = _State()


def download(model: str, hint: str) -> Path:
    """The folder of the hub's ``model``; files that are not in the cache are downloaded.

    Raises:
        ModelError: the download failed.
    """
    from huggingface_hub import snapshot_download

    with _access(model), loading("model", model, hint):
        folder = snapshot_download(model, ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5"])
    return Path(folder)


@overload
def download_file(name: str, what: str, model: str, hint: str, *, required: Literal[True] = True) -> Path: ...
@overload
def download_file(name: str, what: str, model: str, hint: str, *, required: bool) -> Path | None: ...
def download_file(name: str, what: str, model: str, hint: str, *, required: bool = True) -> Path | None:
    """The file ``name`` of the hub's ``model``, downloaded if it is not in the cache; None if the model lacks it.

    ``what`` is the role of the model in messages.

    Raises:
        ModelError: the download failed, or the model lacks a ``required`` file.
    """
    from transformers.utils import cached_file

    with _access(model), loading(what, model, hint):
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=required)
    return None if path is None else Path(path)


def has_file(name: str, model: str) -> bool:
    """Whether ``model`` (a folder or an id) has the file ``name``; False if it is not cached and the hub is offline."""
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with _access(model):
        return cached_file(model, name, **optional) is not None


def model_config(model: str) -> dict[str, Any]:
    """The content of config.json of ``model`` (a folder or an id), downloaded if it is not in the cache.

    Raises:
        OSError: there is no such file, or the download failed.
    """
    from transformers import PreTrainedConfig

    with _access(model):
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(model)[0]
    return config


@contextlib.contextmanager
def _access(model: str) -> Iterator[None]:
    """Reads ``model`` from the cache only if the hub doesn't answer, which is logged once; it may be a folder."""
    from huggingface_hub import constants

    if Path(model).is_absolute() or Path(model).is_dir():
        yield
        return
    _go_offline_unless_answered()
    yield
    if constants.is_offline_mode() and not _state.logged and _state.failed_at > -math.inf:
        _state.logged = True
        text = "%s can't be reached: using models in the hub's cache; HF_HUB_OFFLINE=1 does so without trying"
        log.warning(text, constants.ENDPOINT)


def _go_offline_unless_answered() -> None:
    """Sets the offline mode of huggingface_hub, for the whole process, if the hub can't be reached."""
    from huggingface_hub import constants

    known = _state.answered or time.monotonic() - _state.failed_at < _AGAIN_S
    chosen = constants.is_offline_mode() and _state.failed_at == -math.inf
    if known or chosen:
        return
    constants.HF_HUB_OFFLINE = False  # set by an earlier failure
    _state.answered = _answers()
    if not _state.answered:
        _state.failed_at = time.monotonic()
        constants.HF_HUB_OFFLINE = True


def _answers() -> bool:
    """Whether the hub answers one request in time, without a server error.

    In a thread, because the timeout of a request is per address and doesn't include resolving the hub's name.
    """
    from huggingface_hub import constants, get_session

    timeout_s = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _ANSWER_S
    status: list[int] = []

    def request() -> None:
        with contextlib.suppress(Exception):  # whatever the reason is: no answer
            status.append(get_session().head(constants.ENDPOINT, timeout=timeout_s, follow_redirects=False).status_code)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(status) and status[0] < 500
