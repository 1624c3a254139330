"""llama.cpp's own server, in xllamacpp, answers OpenAI's client as llama.cpp answers the prompt of training."""

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llavactl_gguf.outputs import as_square, metadata
from PIL import Image

from llavactl import ImageFile, Turn, open_model
from llavactl.testing import toy_photos

from .conftest import Toys, llama

SERVER = """\
import sys, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.mmproj.path = sys.argv[1:]
settings.n_ctx, settings.n_parallel, settings.warmup, settings.port, settings.verbosity = 1024, 1, False, 0, 0
settings.cpuparams.n_threads = 1
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
"""The program stops at the end of its standard input."""


@pytest.fixture
def model(toys: Toys) -> Path:
    return toys.model()


@pytest.fixture
def export(toys: Toys, model: Path) -> Path:
    return toys.export(model)


@pytest.fixture
def url(export: Path) -> Iterator[str]:
    files = [str(export / f"{name}-f32.gguf") for name in ("model", "mmproj")]
    command = [sys.executable, "-c", SERVER, *files]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        addresses = (line.strip() for line in process.stdout if line.startswith("http"))
        try:
            yield next(addresses)
        finally:
            process.kill()


def image_item(photo: Path) -> dict[str, Any]:
    encoded = base64.b64encode(photo.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}


@pytest.mark.slow
def test_the_server_answers_about_a_photo(model: Path, export: Path, url: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    openai = pytest.importorskip("openai")
    (photo,) = toy_photos(tmp_path / "photos", 1)
    settings = metadata(export / "mmproj-f32.gguf")
    image = as_square(Image.open(photo).convert("RGB"), settings)
    image.save(square := tmp_path / "square.png")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    content = [{"type": "text", "text": "What color is it?"}, image_item(square)]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": content}]
    reply = client.chat.completions.create(
        model="any", messages=messages, max_tokens=8, temperature=0, extra_body={"cache_prompt": False}
    )
    asked = (ImageFile(str(tmp_path), square.name), "\n", "What color is it?")
    prompt = open_model(model).prompt([Turn("system", ("Be short.",)), Turn("user", asked)])
    outputs = llama(export).run(prompt, [image], 8)
    assert reply.usage.prompt_tokens == len(outputs["ids"])
    expected = open_model(model).tokenizer().decode(outputs["said"].tolist(), skip_special_tokens=True)
    assert reply.choices[0].message.content.strip() == expected.strip() != ""
