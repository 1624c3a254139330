"""Untrusted images and conversation files."""

import base64
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llavactl_web import images
from PIL import Image

from llavactl import DataError


def encoded(format: str, size: tuple[int, int] = (8, 8)) -> bytes:  # noqa: A002
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("format", images.FORMATS)
def test_images_are_accepted(format: str) -> None:  # noqa: A002
    checked = images.checked(encoded(format))
    assert images.thumbnail_of(checked).startswith("data:image/jpeg;base64,")
    assert images.suffix(encoded(format)) == format.lower()


@pytest.mark.parametrize(
    "data",
    [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"<html>", encoded("PPM"), b"\x89PNG\r\n\x1a\n"],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        images.checked(data)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytearray(encoded("PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    for data, why in ((bytes(bomb), "million pixels"), (encoded("BMP") + bytes(images.MAX_BYTES), "MiB")):
        with pytest.raises(DataError, match=why):
            images.checked(data)


def test_a_truncated_image_has_no_thumbnail() -> None:
    assert images.thumbnail_of(images.checked(encoded("PNG", (400, 400))[:-60])) == ""


def conversation(image: Any) -> str:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]})


def embedded(image: Any, **allowed: bool) -> str:
    text = images.with_images_embedded(conversation(image), **{"allow_urls": False, "allow_files": False} | allowed)
    return str(json.loads(text)["messages"][0]["content"][0]["image"])


def test_embedded_images_are_loaded() -> None:
    uri = images.checked(encoded("PNG"))
    assert embedded(uri) == embedded(uri.replace("data:;", "data:image/png;")) == uri


def test_files_are_loaded_only_if_allowed(photos: Sequence[Path], tmp_path: Path) -> None:
    photo = str(photos[0].absolute())
    assert base64.b64decode(embedded(photo, allow_files=True).partition(",")[2]) == photos[0].read_bytes()
    refused: list[Any] = [
        photo,
        "/etc/passwd",
        "photo.jpg",
        f"file://{photo}",
        f"data:;base64,/../../..{photo}",
        "s3://a/b",
    ]
    for name in refused:
        with pytest.raises(DataError):
            embedded(name)
    (tmp_path / "secret.txt").write_text("secret")
    for name in (
        "/etc/passwd",
        "photo.jpg",
        "/dev/zero",
        str(tmp_path / "secret.txt"),
        f"file://{photo}",
        3,
        None,
        ["a"],
    ):
        with pytest.raises(DataError):
            embedded(name, allow_files=True)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ud800"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(DataError):
        images.with_images_embedded(text, allow_urls=False, allow_files=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "HTTP://localhost/a.png"])
def test_urls(url: str) -> None:
    with pytest.raises(DataError, match="disabled"):
        embedded(url)
    with pytest.raises(DataError, match="public"):
        embedded(url, allow_urls=True)
