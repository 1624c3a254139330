"""``transformers serve`` answers the client in docs/how-to/serve.md about an image like ``llavactl chat``."""

from __future__ import annotations

import os
import re
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
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "serve.md"


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
    pytest.importorskip("openai")
    folder, image = tmp_path / "out", toys / "images" / "photo-002.jpg"
    model = native("ours", template="tokenizer")
    export = run_cli("export", "--model", str(model), "--format", "hf", "--to", str(folder), "--no-verify")
    assert export.exit_code == 0, export.stderr
    (client,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    options = ("--image", str(image), "--prompt", "What color is the image?", "--max-new-tokens", "12", "--json")
    ours = run_cli("chat", "--model", str(model), *options).json()["answer"]
    with served(folder, tmp_path / "server.log") as url:
        for written, here in {"http://localhost:8000/v1": url, "out/hf": str(folder), "photo.jpg": str(image)}.items():
            assert written in client
            client = client.replace(written, here)
        done = subprocess.run([sys.executable, "-c", client], capture_output=True, check=False)
    assert done.returncode == 0, f"{done.stderr.decode()}\n{(tmp_path / 'server.log').read_text()[-3000:]}"
    answer = done.stdout.decode()
    assert answer.strip()
    # An incomplete character at the end is decoded differently.
    assert answer.strip().rstrip("\ufffd") == ours.rstrip("\ufffd")
