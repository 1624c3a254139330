"""A model hub that can't be reached is asked once; models in its cache are used."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..preloaded import WITHOUT_HUB, Interpreters

PROGRAM = "from llavactl.cli import main; main()"
COMMIT = "0" * 40
RETRY = "Retrying"
"""Part of huggingface_hub's messages about further attempts."""


class Hub:
    """A server on this machine that accepts connections and counts them."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.connections: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                if self.answer is not None:
                    connection.sendall(self.answer)
                    connection.close()


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    """A hub that answers with the parameter; by default never."""
    hub = Hub(getattr(request, "param", None))
    yield hub
    hub.listener.close()


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """Runs ``llavactl ARGUMENTS`` in ``cwd`` with the hub at ``endpoint``."""
    interpreters = Interpreters(WITHOUT_HUB)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFF"))}

    def command(*arguments: str, cwd: Path, endpoint: str, **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cwd / "hub"), "HF_HUB_ETAG_TIMEOUT": "1", **variables}
        home = {"LLAVACTL_HOME": os.environ["LLAVACTL_HOME"]}  # of the test
        return interpreters.run(PROGRAM, *arguments, cwd=cwd, env={**inherited, **home, **settings})

    yield command
    interpreters.close()


def cached(toy: Path, model: str) -> str:
    """The id of the toy ``model``, in the hub's cache; optional files that it lacks aren't known to be missing."""
    folder = toy / "hub" / "hub" / f"models--toys--{model}"
    shutil.copytree(toy / model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return f"toys/{model}"


@pytest.mark.parametrize(
    "hub", [None, pytest.param(b"", marks=pytest.mark.slow), b"HTTP/1.1 503 Unavailable\r\n\r\n"], indirect=True
)
def test_a_model_that_is_not_cached(toy: Path, command: Command, hub: Hub) -> None:
    result = command("extract", "-o", "vision.model=some/model", cwd=toy, endpoint=hub.url)
    assert result.returncode == 1
    (error, hint) = result.stderr.splitlines()
    assert hub.url in error
    assert "some/model" in error
    assert "HF_HUB_OFFLINE" in hint
    assert "local folder" in hint
    assert len(hub.connections) == 1


def test_cached_models_are_used(toy: Path, command: Command, hub: Hub) -> None:
    models = ("--vision", cached(toy, "clip"), "--language", cached(toy, "language"))
    result = command("init", "--data", "records.json", *models, "--to", "new.yaml", cwd=toy, endpoint=hub.url)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if hub.url in line)
    assert "HF_HUB_OFFLINE" in line
    assert RETRY not in result.stderr
    assert len(hub.connections) == 1


def test_a_hub_that_refuses_connections(toy: Path, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    result = command("chat", "--model", "some/model", "--prompt", "hi", cwd=toy, endpoint=url)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 2
    assert url in result.stderr


def test_offline_mode_asks_nothing(toy: Path, command: Command, hub: Hub) -> None:
    options = ("-o", f"vision.model={cached(toy, 'clip')}")
    result = command("extract", *options, cwd=toy, endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert hub.url not in result.stderr
    assert hub.connections == []
