"""A small language model as a teacher: behind ``transformers serve``, and in this process."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from llavactl.testing import run_cli

SERVING = all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai")))
RECIPE = """\
name: instruct
vision: {{name: clip, model: clip}}
connector: {{name: linear}}
language: {{name: hf, model: language}}
generate:
  source: {{name: caps-boxes, path: captions.jsonl}}
  teacher: {teacher}
  kinds: {{detail: 1}}
  out: instruct.jsonl
"""
CAPTIONS = ("Two dogs play on a beach.", "A red bus waits at a stop.", "A child flies a kite in a park.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    rows = [{"id": f"p{n}", "image": f"p{n}.jpg", "captions": [text]} for n, text in enumerate(CAPTIONS)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def server(language: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = ["serve", str(language), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise AssertionError(process.communicate()[0].decode())
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not SERVING, reason="transformers serve needs fastapi, uvicorn and openai")
def test_transformers_serve_is_a_teacher(folder: Path, server: str, language: Path) -> None:
    teacher = (
        f'{{name: openai, base_url: "{server}", model: "{language}", max_tokens: 60, timeout_s: 300, concurrency: 1}}'
    )
    (folder / "recipe.yaml").write_text(RECIPE.format(teacher=teacher))
    result = run_cli("data", "generate", "--json", cwd=folder)
    assert result.exit_code == 0, result.stderr
    report = result.json()
    assert report["requests"]["sent"] == 3
    assert report["requests"]["unanswered"] == 0
    assert report["requests"]["spent"]["replies"] == 3
    assert report["requests"]["spent"]["tokens_in"] > 300, "the token count of the server"
    assert report["samples"] + report["refused"] == 3
    assert run_cli("data", "generate", "--json", "--retry-refused", cwd=folder).exit_code == 0


@pytest.mark.slow
def test_a_model_in_this_process_is_a_teacher(folder: Path, language: Path) -> None:
    teacher = f'{{name: transformers, model: "{language}", max_tokens: 40, dtype: float32, device: cpu}}'
    (folder / "recipe.yaml").write_text(RECIPE.format(teacher=teacher))
    result = run_cli("data", "generate", "--json", cwd=folder)
    assert result.exit_code == 0, result.stderr
    report = result.json()
    assert report["requests"]["spent"]["replies"] == 3
    assert 3 <= report["requests"]["spent"]["tokens_out"] <= 120
    again = run_cli("data", "generate", "--json", "-o", "generate.gates.leaks=false", cwd=folder).json()
    assert again["requests"]["sent"] == 0
