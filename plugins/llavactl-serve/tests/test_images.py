"""Images of requests: broken, huge, by URL."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavactl import Assistant

from .conftest import Client, body, data_url, image_part, text_part, user

URL = "/v1/chat/completions"


def image_bytes(size: tuple[int, int], kind: str = "PNG") -> bytes:
    Image.new("1", size).convert("L").save(file := io.BytesIO(), kind)
    return file.getvalue()


def resized(side: int) -> bytes:
    """A small PNG whose header says ``side`` x ``side``."""
    data = bytearray(image_bytes((8, 8)))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


WHOLE = image_bytes((40, 40), "JPEG")

BROKEN: dict[str, tuple[Any, str]] = {
    "base64": ("data:image/png;base64,####", "invalid_base64"),
    "cut base64": (data_url(WHOLE)[:-3], "invalid_base64"),
    "no base64": ("data:image/png,abc", "invalid_base64"),
    "empty": ("data:image/png;base64,", "invalid_image"),
    "text": (data_url(b"not an image"), "invalid_image"),
    "cut": (data_url(WHOLE[: len(WHOLE) // 2]), "invalid_image"),
    "svg": (data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "invalid_image"),
    "long": (data_url(image_bytes((1, 20_000))), "invalid_image"),
    "pixels": (data_url(resized(10_000)), "invalid_image"),
    "bomb": (data_url(resized(50_000)), "invalid_image"),
    "path": ("/etc/hostname", "invalid_image_url"),
    "file": ("file:///etc/hostname", "invalid_image_url"),
    "bare base64": (data_url(WHOLE).partition(",")[2], "invalid_image_url"),
    "url": ("https://example.com/a.jpg", "image_urls_not_allowed"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_a_400_that_names_its_part(client: Client, kind: str) -> None:
    url, code = BROKEN[kind]
    messages = [user("Hi"), {"role": "assistant", "content": "Hello"}, user(text_part("What?"), image_part(url))]
    response = client().post(URL, json=body(*messages))
    assert response.status_code == 400
    problem = response.json()["error"]
    assert problem["param"] == "messages[2].content[1].image_url.url"
    assert problem["message"].startswith("messages[2].content[1]: ")
    assert problem["code"] == code


def test_line_breaks_in_base64_are_read(client: Client) -> None:
    url = data_url(WHOLE)
    wrapped = "\r\n".join(url[start : start + 76] for start in range(0, len(url), 76))
    assert client().post(URL, json=body(user(image_part(wrapped)))).status_code == 200


def test_a_repeated_image_is_encoded_once(
    client: Client, model: Assistant, photos: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    features: Any = model.features
    encoded: list[int] = []
    encode = features.backbone.encode_async
    monkeypatch.setattr(features.backbone, "encode_async", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    features._recent.cache_clear()
    part = image_part(photos[0].read_bytes())
    endpoint = client()
    for text in ("What is it?", "Why?"):
        assert endpoint.post(URL, json=body(user(part, part, text_part(text)))).status_code == 200
    assert encoded == [1]


class Web(BaseHTTPRequestHandler):
    """Serves an image, redirects, and what an attacker would serve."""

    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(2)
        if self.path == "/slow-head":
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.0 200 OK\r\nX-Header: " + b"x" * 200:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            return
        redirects = {
            "/moved": "/image.jpg",
            "/loop": "/loop",
            "/inside": "http://10.0.0.1/",
            "/file": "file:///etc/hosts",
        }
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 65536)
            elif self.path == "/trickle":
                for byte in WHOLE:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            else:
                self.wfile.write(WHOLE)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def local_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.images.public_urls.is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr("llavactl.images.public_urls.TIMEOUT_S", 1.0)


@pytest.mark.usefixtures("local_is_public")
@pytest.mark.parametrize("path", ["/image.jpg", "/moved", "/image.jpg?a=b#c"])
def test_an_image_is_downloaded_if_that_is_allowed(client: Client, web: str, path: str) -> None:
    endpoint = client(allow_urls=True)
    shown = endpoint.post(URL, json=body(user(image_part(web + path), text_part("What?")))).json()
    sent = endpoint.post(URL, json=body(user(image_part(WHOLE), text_part("What?")))).json()
    assert shown["choices"] == sent["choices"]


@pytest.mark.usefixtures("local_is_public")
@pytest.mark.parametrize(
    "path", ["/missing", "/loop", "/inside", "/file", "/endless", "/slow", "/slow-head", "/trickle"]
)
def test_a_download_that_fails_or_exceeds_a_limit_is_a_400(client: Client, web: str, path: str) -> None:
    start = time.monotonic()
    response = client(allow_urls=True).post(URL, json=body(user(image_part(web + path))))
    assert time.monotonic() - start < 10
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "image_download_failed"


def test_private_addresses_are_not_reached(client: Client, web: str) -> None:
    port = web.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "0x7f.1"):
        response = client(allow_urls=True).post(URL, json=body(user(image_part(f"http://{host}:{port}/image.jpg"))))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "image_download_failed"
