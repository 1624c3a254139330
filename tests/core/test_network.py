"""Invalid proxies in environment variables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llavactl.core.errors import ModelError
from llavactl.core.network import proxy_error
from llavactl.core.registry import registry
from llavactl.testing import run_cli

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # restored after the test; `main` sets it if it is missing


@pytest.mark.parametrize("address", ["http://host:3128", "host:3128", "http://user:word@[::1]:1", "https://host"])
@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_valid_proxy(monkeypatch: pytest.MonkeyPatch, name: str, address: str) -> None:
    monkeypatch.setenv(name, address)
    assert proxy_error() is None


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "address", ["socks5://h:1", "socks5h://h", "ftp://h:1", "http://[::bad", "http://h:port", "://"]
)
def test_an_invalid_proxy_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch, name: str, address: str) -> None:
    monkeypatch.setenv(name, address)
    error = proxy_error()
    assert error is not None
    assert name in error.message
    assert name in error.hint
    assert address not in str(error), "it may contain a password"
    monkeypatch.setenv("NO_PROXY", "*")
    assert proxy_error() is None


def test_offline_commands_ignore_an_invalid_proxy(monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://localhost:1")
    for command in (["extract"], ["train", "--stage", "1", "-o", "stage1.max_steps=1"], ["doctor"]):
        assert run_cli(*command, cwd=toy).exit_code == 0


@pytest.mark.parametrize("address", ["socks5://localhost:1", "http://[::bad"])
def test_commands_that_download_report_the_proxy(monkeypatch: pytest.MonkeyPatch, toy: Path, address: str) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    for command in (
        ["chat", "--model", "some/model", "--prompt", "hi"],
        ["eval", "scenes", "--model", "hf:some/model"],
        ["train", "--stage", "1", "-o", "language.model=some/model", "-o", "features.mode=live"],
        ["extract", "-o", "vision.model=some/model"],
    ):
        result = run_cli(*command, cwd=toy)
        assert result.exit_code == 1
        (error, hint) = [line for line in result.stderr.splitlines() if not line.startswith("llavactl:")]
        assert error.startswith("error: ")
        assert "ALL_PROXY" in error
        assert "ALL_PROXY" in hint


@pytest.mark.parametrize(("kind", "name"), [("vision", "clip"), ("languages", "hf")])
@pytest.mark.parametrize("offline", [True, False])
def test_a_model_that_cannot_be_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, name: str, offline: bool
) -> None:
    import transformers.utils.hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    def not_found(*_arguments: object, **_options: object) -> None:
        raise LocalEntryNotFoundError("no entry")

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", not_found)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="some/model: not in the hub's cache") as raised:
        registry().create(kind, {"name": name, "model": "some/model"}).check()
    assert ("HF_HUB_OFFLINE disables" in raised.value.message) == offline
    assert (constants.ENDPOINT in raised.value.message) == (not offline)
    assert "local folder" in raised.value.hint
    assert "hf download some/model" in raised.value.hint


def test_a_local_endpoint_needs_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.components.teachers.openai_api import OpenAI, OpenAIOptions
    from llavactl.core.errors import TeacherError
    from llavactl.core.protocols import Request
    from llavactl.core.schema import Sample

    monkeypatch.setenv("ALL_PROXY", "socks5://localhost:1")
    request = Request("1", "detail", ({"role": "user", "content": "hi"},), Sample("1", ()))
    remote = OpenAI(OpenAIOptions(model="m", base_url="http://host.invalid/v1"))
    with pytest.raises(TeacherError, match="ALL_PROXY") as caught:
        remote.reply(request)
    assert caught.value.then == "stop"
    local = OpenAI(OpenAIOptions(model="m", base_url="http://localhost:9/v1"))
    with pytest.raises(TeacherError, match="no connection"):
        local.reply(request)
    local.close()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
