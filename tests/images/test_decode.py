"""Decoding any bytes gives an upright RGB image or a short reason."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from llavactl import DataError
from llavactl.images import decode as images
from llavactl.images.decode import ImageError, decode, inspect
from llavactl.images.references import image_in
from llavactl.images.sniffing import HEIC, curable, reads_heif


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def two_colors(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Red on the left, blue on the right, without any symmetry."""
    image = Image.new("RGB", size, (200, 30, 40))
    image.paste((20, 40, 180), (size[0] // 2, 0, *size))
    image.paste((250, 250, 250), (0, 0, 3, 2))
    return image.convert(mode)


def similar(image: Image.Image, expected: Image.Image, within: int = 12) -> bool:
    """Equal except for the artifacts of lossy formats."""
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
    return image.size == expected.size and float(np.median(difference)) <= within


def photo(size: tuple[int, int] = (64, 48)) -> bytes:
    rng = np.random.default_rng(0)
    return encoded(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), "JPEG", quality=95)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"])
def test_common_formats(kind: str) -> None:
    image = decode(encoded(two_colors(size=(48, 32)), kind))
    assert image.mode == "RGB"
    assert similar(image, two_colors(size=(48, 32)))


MODES = "L-PNG LA-PNG RGBA-PNG P-PNG 1-PNG CMYK-JPEG YCbCr-JPEG L-JPEG CMYK-TIFF"


@pytest.mark.parametrize(("mode", "kind"), [tuple(each.split("-")) for each in MODES.split()])
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    image = decode(encoded(two_colors(mode, (48, 32)), kind))
    assert image.mode == "RGB"
    assert similar(image, two_colors(mode, (48, 32)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_composited(mode: str) -> None:
    image = two_colors(mode)
    image.putalpha(0)
    assert similar(decode(encoded(image)), two_colors(mode).convert("RGB"), 0)


def test_a_palette_with_transparency_is_decoded_without_a_warning() -> None:
    image = two_colors("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(encoded(image, transparency=bytes(range(256))))
    assert similar(decoded, image.convert("RGB"), 0)


def test_16_bit_gray_keeps_its_high_byte() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = np.asarray(decode(encoded(Image.fromarray(ramp))))
    assert np.array_equal(decoded[..., 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize(("top", "shift"), [(255, 0), (65535, 8)])
def test_32_bit_gray(top: int, shift: int) -> None:
    ramp = np.linspace(0, top, 64).astype(np.int32).reshape(8, 8)
    decoded = np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF")))
    assert np.array_equal(decoded[..., 1], (ramp >> shift).astype(np.uint8))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [two_colors(size=(48, 32)), Image.new("RGB", (48, 32), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert similar(decode(data), frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(two_colors(size=(64, 32)), "JPEG", exif=exif, quality=95)
    decoded = decode(data)
    assert decoded.size == ((64, 32) if orientation <= 4 else (32, 64))
    assert similar(decoded, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"), 0)


def test_equal_to_transformers_load_image(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(two_colors(size=(64, 32)), "JPEG", exif=exif))
    assert np.array_equal(decode((tmp_path / "a.jpg").read_bytes()), load_image(str(tmp_path / "a.jpg")))


# --- invalid images


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "HTML"),
        (b"\xff\xd8\xff", "JPEG"),
        (photo()[:-500], "image file is truncated"),
        (encoded(two_colors(size=(99, 99)))[:-30], "truncated|broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
    ],
    ids=["empty", "html", "stump", "cut jpeg", "cut png", "postscript"],
)
def test_a_broken_file_has_a_short_deterministic_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data)
    (tmp_path / "a.jpg").write_bytes(data)
    for whole in (False, True):
        with pytest.raises(ImageError) as inspected:
            inspect(image_in(str(tmp_path), "a.jpg"), whole=whole)
        assert inspected.value.reason == caught.value.reason, "`data check` and `extract` give the same reason"
    assert isinstance(caught.value, DataError)
    assert len(caught.value.reason) <= 200
    assert "0x" not in caught.value.reason, "a memory address would differ each time"


def ftyp(*brands: bytes) -> bytes:
    """The beginning of an ISO base media file: HEIC, AVIF, MP4."""
    body = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + bytes(64)


OTHER_KINDS = {
    "HTML": [
        b"<!DOCTYPE html>\n<html>",
        b"\xef\xbb\xbf\n <!-- x -->\n<HEAD>",
        b"<html lang='de'>" + "Ü".encode() * 800,
    ],
    "SVG": [b"<svg xmlns='x'/>", b"<?xml version='1.0'?>\n<!-- a -->\n<svg>", b"<!DOCTYPE svg PUBLIC 'x'>\n<svg>"],
    "XML": [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"],
    "JSON": [b'{"error": "not found"}', b"[]", b'[{"a": 1}]'],
    "git lfs pull": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"],
    "git annex get": [b"/annex/objects/SHA256E-s1--0.jpg\n"],
    "PDF": [b"%PDF-1.7\n"],
    "video": [
        ftyp(b"isom", b"avc1"),
        ftyp(b"qt  "),
        b"\x1aE\xdf\xa3" + bytes(9),
        b"RIFF\0\0\0\0AVI LIST",
        b"\0\0\x01\xba\0",
    ],
    "AVIF": [ftyp(b"avif", b"mif1", b"miaf")],
    "JPEG XL": [b"\xff\x0a\0\0", b"\0\0\0\x0cJXL \r\n\x87\n"],
    "Photoshop": [b"8BPS\0\1"],
    "zip": [b"PK\3\4\0"],
    "compressed": [b"\x1f\x8b\x08\0"],
    "zeros": [bytes(5000)],
    "text": [b"Not Found\n", "Ärger ".encode() * 400],
    "known format": [b"\x01\x02\xfe\xff" * 9],
}


@pytest.mark.parametrize(("what", "data"), [(what, data) for what, each in OTHER_KINDS.items() for data in each])
def test_the_reason_names_the_kind_of_file(what: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    checks = [
        lambda: decode(data),
        *(partial(inspect, image_in(str(tmp_path), "a.jpg"), whole=whole) for whole in (False, True)),
    ]
    for check in checks:
        with pytest.raises(ImageError) as caught:
            check()
        assert what in caught.value.reason
        assert len(caught.value.reason) < 80


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_the_reason_for_heic_names_the_package(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heif.cache_clear()
    with pytest.raises(ImageError, match="pillow-heif") as caught:
        decode(ftyp(brand, b"mif1", b"heic"))
    assert not curable(caught.value.reason)
    reads_heif.cache_clear()


def test_heic_is_read_with_its_package_and_skipped_images_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake pillow-heif, whose opener accepts the brand and returns a fixed image."""

    class Opener(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode, self.tile = (4, 3), "RGB", []
            self.im = Image.new("RGB", (4, 3), (200, 0, 0)).im

    def register_heif_opener() -> None:
        Image.register_open("HEIF", Opener, lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    reads_heif.cache_clear()
    assert decode(ftyp(b"heic")).getpixel((0, 0)) == (200, 0, 0)
    assert curable(HEIC)
    assert not curable("image file is truncated")
    reads_heif.cache_clear()


def bomb(width: int, height: int) -> bytes:
    """A PNG of 100 bytes whose header declares ``width`` by ``height``."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((30_000, 30_000), "more than 89478485 pixels"),
        ((10_000, 10_000), "more than 89478485 pixels"),
        ((20_000, 1_000), "longer than 16384"),
        ((1, 201), "200 times its other side"),
    ],
)
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ImageError, match=reason):
        decode(bomb(*size))


def test_the_limits_are_inclusive() -> None:
    assert decode(encoded(Image.new("L", (200, 1)))).size == (200, 1)
    assert images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_a_bomb_is_refused_if_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="more than 89478485 pixels"):
            decode(bomb(10_000, 10_000))


def _damaged(data: bytes, edits: list[tuple[int, int]], cut: int) -> bytes:
    damaged = bytearray(data)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    return bytes(damaged[: len(damaged) - cut % len(damaged)])


SOURCES = {
    "jpeg": photo((24, 16)),
    "png": encoded(two_colors()),
    "gif": encoded(two_colors("P"), "GIF"),
    "webp": encoded(two_colors(), "WEBP"),
    "tiff": encoded(two_colors(), "TIFF"),
    "16-bit": encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))),
    "jpeg2000": encoded(two_colors(size=(48, 32)), "JPEG2000"),
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(SOURCES)),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 200),
)
@example(kind="png", edits=[], cut=0)
def test_any_bytes_decode_or_raise_image_error(kind: str, edits: list[tuple[int, int]], cut: int) -> None:
    try:
        image = decode(_damaged(SOURCES[kind], edits, cut))
    except ImageError as error:
        assert error.reason  # noqa: PT017
    else:
        assert image.mode == "RGB"
        assert image.width * image.height > 0
