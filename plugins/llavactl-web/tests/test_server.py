"""The server as a process, and the screenshot of the documentation."""

import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from llavactl_web.guard import Access
from PIL import Image, ImageDraw

from llavactl import load_model, registry

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_server(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("gradio")
    arguments = ["web", "--model", str(folder), "--port", "0", "--token", "token-token"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "llavactl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        url = urlsplit(process.stdout.readline().decode().strip())
        assert url.query == "token=token-token"
        with socket.create_connection((url.hostname, url.port or 0)) as connection:
            cookie = Access((), "token-token").cookie
            request = f"GET /gradio_api/heartbeat/tab HTTP/1.1\r\nHost: {url.netloc}\r\n"
            connection.sendall(f"{request}Cookie: llavactl-web-{url.port}={cookie}\r\n\r\n".encode())
            assert b"200 OK" in connection.recv(100)
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"Traceback" not in errors
    assert list(tmp_path.glob("llavactl-web-*")) == []


SCREENSHOTS = os.environ.get("LLAVACTL_SCREENSHOTS")


@pytest.mark.skipif(not SCREENSHOTS, reason="LLAVACTL_SCREENSHOTS: the folder for browser.png")
def test_screenshot(open_tab: Any, serve: Any, setup: Any, script: dict[str, str], tmp_path: Path) -> None:
    scene = Image.new("RGB", (336, 336), "white")
    draw = ImageDraw.Draw(scene)
    draw.rectangle((40, 120, 160, 300), fill="#c62828")
    draw.ellipse((190, 60, 300, 170), fill="#1565c0")
    scene.save(tmp_path / "scene.png")
    page = "<h1 style='color: #1565c0'>Shapes</h1><ul><li>red rectangle<li>blue circle</ul>"
    script |= {
        "What is in this image?": "A red rectangle on the left and a blue circle **above it** on the right.",
        "List them as a web page.": f"```html\n{page}\n```",
    }
    tab = open_tab(serve(setup("my-run"))[0])
    tab.page.set_viewport_size({"width": 1180, "height": 960})
    tab.ask("What is in this image?", [tmp_path / "scene.png"])
    tab.ask("List them as a web page.")
    save_screenshot(tab, "browser.png", 64)


DEMO_MODEL = os.environ.get("LLAVACTL_DEMO_MODEL")


@pytest.mark.skipif(
    not (SCREENSHOTS and DEMO_MODEL), reason="LLAVACTL_SCREENSHOTS, LLAVACTL_DEMO_MODEL: such as runs/demo/stage2/model"
)
def test_screenshot_of_maps(open_tab: Any, serve: Any, setup: Any, tmp_path: Path) -> None:
    scenes = registry().create("sources", {"name": "scenes", "split": "test", "scenes": 4, "about": ["color", "shape"]})
    *_, sample = scenes
    (tmp_path / "scene.png").write_bytes(sample.images[0].read())
    made = setup("demo")
    made.models[0] = dataclasses.replace(made.models[0], assistant=load_model(str(DEMO_MODEL)))
    tab = open_tab(serve(made)[0])
    tab.page.set_viewport_size({"width": 1180, "height": 1000})
    tab.page.set_default_timeout(120_000)
    tab.ask(sample.turns[-2].text, [tmp_path / "scene.png"])
    tab.press("Explain")
    tab.wait("document.querySelectorAll('#maps0 img').length")
    tab.ready()
    save_screenshot(tab, "explain.png", 256)


def save_screenshot(tab: Any, name: str, colors: int) -> None:
    tab.page.wait_for_timeout(500)
    with Image.open(io.BytesIO(tab.page.screenshot())) as image:
        image.quantize(colors).save(Path(str(SCREENSHOTS)) / name, optimize=True)
