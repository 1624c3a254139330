"""The package as a plugin, and the command without a browser."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llavactl import LlavactlError
from llavactl.testing import check_plugin, run_cli


def test_the_plugin_passes_the_conformance_kit() -> None:
    assert check_plugin("web") == []


def test_importing_the_plugin_is_light() -> None:
    code = (
        "import sys, llavactl_web, llavactl_web.command; "
        "print(sorted({'torch', 'PIL', 'gradio', 'fastapi', 'uvicorn', 'markdown_it'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_gradio_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    result = run_cli("web", "--model", str(folder))
    assert result.exit_code == 1
    assert "llavactl-web[gradio]" in result.stderr
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("arguments", [["--blind"], ["--port", "70000"]])
def test_invalid_options(arguments: list[str]) -> None:
    assert run_cli("web", "--model", "m", *arguments).exit_code == 2


def test_a_taken_port() -> None:
    pytest.importorskip("uvicorn")
    from llavactl_web import server

    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LlavactlError):
            server.listen("127.0.0.1", port)
    with pytest.raises(LlavactlError):
        server.listen("192.0.2.1", 0)
    with server.listen("127.0.0.1", None) as first, server.listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] < second.getsockname()[1]
        assert server.url(second, "127.0.0.1", "") == f"http://127.0.0.1:{second.getsockname()[1]}/"
    assert isinstance(first, socket.socket)
