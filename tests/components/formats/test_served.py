"""``transformers serve`` answers OpenAI's client about an image like ``llavactl chat``."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llavactl.testing import run_cli

from .conftest import Make

pytestmark = pytest.mark.slow
STARTS_WITHIN_S = 180


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """``transformers serve`` of ``folder``: its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command = [*program, "serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    cache = log.with_name("hub")
    cache.mkdir()  # the server lists this folder and fails if it doesn't exist
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        )
        try:
            until = time.monotonic() + STARTS_WITHIN_S
            while time.monotonic() < until and server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"transformers serve did not start: {log.read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


def test_served_by_transformers(native: Make, toys: Path, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    folder, image = tmp_path / "out", toys / "images" / "photo-002.jpg"
    export = run_cli(
        *("export", "--model", str(native("ours", template="tokenizer")), "--format", "hf", "--to", str(folder)),
        "--no-verify",
    )
    assert export.exit_code == 0, export.stderr
    options = ("--image", str(image), "--prompt", "What colour is the picture?", "--max-new-tokens", "12", "--json")
    ours = run_cli("chat", "--model", str(folder), *options).json()["answer"]
    with served(folder, tmp_path / "server.log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
        image_url = "data:image/jpeg;base64," + base64.b64encode(image.read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": image_url}},
            {"type": "text", "text": "What colour is the picture?"},
        ]
        try:
            reply = client.chat.completions.create(
                model=str(folder), messages=[{"role": "user", "content": content}], max_tokens=12, temperature=0
            )
        except openai.OpenAIError as error:
            pytest.fail(f"{error}\n{(tmp_path / 'server.log').read_text()[-3000:]}")
    answer = reply.choices[0].message.content or ""
    assert answer.strip()
    # An incomplete character at the end is decoded differently.
    assert answer.strip().rstrip("\ufffd") == ours.rstrip("\ufffd")
