"""The package as a plugin of llavactl, and the command's checks before it loads a model."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from llavactl_serve.server import bound, is_loopback, url_of

from llavactl.testing import check_plugin, run_cli


def test_the_plugin_passes_the_conformance_kit() -> None:
    assert check_plugin("serve") == []


def test_importing_the_plugin_and_its_help_are_light() -> None:
    heavy = "{'torch', 'PIL', 'starlette', 'uvicorn', 'transformers'} & sys.modules.keys()"
    code = f"import sys, llavactl_serve.command; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_port_in_use_is_one_line_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_cli("serve", "--model", "no-such-model", "--port", port)
    assert result.exit_code == 1
    error, hint = result.stderr.splitlines()
    assert port in error
    assert "--port" in hint


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "65536"),
        ("--max-batch", "0"),
        ("--max-queue", "-1"),
        ("--timeout", "0"),
        ("--token", "two words"),
        ("--token", "tökén"),
        ("--cors", "localhost:3000"),
        ("--cors", "https://example.com/path"),
    ],
)
def test_an_invalid_option_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    result = run_cli("serve", "--model", "no-such-model", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a" * 300])
def test_an_unknown_host_is_one_line(host: str) -> None:
    result = run_cli("serve", "--model", "no-such-model", "--host", host, "--port", "0")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 2
    assert "127.0.0.1" in result.stderr


def test_without_a_recipe_or_model_the_recipes_are_named(tmp_path: Path) -> None:
    served, chat = (run_cli(command, cwd=tmp_path) for command in ("serve", "chat"))
    assert served.exit_code == chat.exit_code == 1
    assert served.stderr == chat.stderr


def test_only_loopback_addresses_need_no_token() -> None:
    for host, loopback in (("127.0.0.1", True), ("localhost", True), ("127.9.9.9", True), ("0.0.0.0", False)):
        with bound(host, 0) as sock:
            assert is_loopback(sock) is loopback
            assert url_of(host, sock) == f"http://{host}:{sock.getsockname()[1]}/v1"
