"""A toy model, its endpoint in this process, and requests."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from llavactl_serve.app import application
from llavactl_serve.service import Service, Settings
from starlette.testclient import TestClient

import llavactl
from llavactl import Assistant, Batcher
from llavactl.testing import toy_model, toy_photos

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Client = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # not for the tests of other folders in the same process


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy model with random weights."""
    return toy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(folder: Path) -> Assistant:
    return llavactl.load_model(folder, device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return toy_photos(tmp_path_factory.mktemp("photos"), 4)


@pytest.fixture
def service(model: Assistant) -> Iterator[Callable[..., Service]]:
    """A service of the toy model with the given settings."""
    batchers = []

    def make(*, max_batch: int = 4, **settings: Any) -> Service:
        batchers.append(Batcher(model, max_batch))
        return Service(batchers[-1], Settings("toy", **settings))

    yield make
    for batcher in batchers:
        batcher.close()


@pytest.fixture
def client(service: Callable[..., Service]) -> Client:
    """A client of the endpoint with the given settings."""
    return lambda **settings: TestClient(application(service(**settings)), raise_server_exceptions=False)


def data_url(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*content: Any) -> dict[str, Any]:
    """A user message of a string, or of parts."""
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def body(*messages: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": list(messages or [user("What is it?")]), "max_tokens": 6, **parameters}
