"""What bytes are that no image could be read from: told by how they begin, for a short reason."""

from __future__ import annotations

import re
from functools import cache

_HEIF = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF = frozenset({b"avif", b"avis"})

HEIC = "HEIC, which needs a package: pip install pillow-heif"
"""The one reason that a package can take away again."""

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the image: run `git lfs pull` there"),
    (rb"(\.\./)*\.git/annex/|/annex/objects/", "a git-annex pointer, not the image: run `git annex get` there"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg\b", "SVG, a drawing: convert it to PNG"),
    (rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body|meta|title)\b", "an HTML page, not an image"),
    (rb"\s*<(\?xml|Error|!DOCTYPE)", "XML, perhaps a server's error message"),
    (rb"\s*[{\[]\s*[\"{}\[\]]", "JSON, perhaps a server's error message"),
    (rb"%PDF-", "PDF: convert its pages to images"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript, which is not run here: convert it to PNG"),
    (rb"8BPS", "a Photoshop document: export it as PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL: convert it to PNG"),
    (rb"\x1aE\xdf\xa3", "a video (Matroska or WebM): extract frames from it"),
    (rb"RIFF....AVI ", "a video (AVI): extract frames from it"),
    (rb"\0\0\x01[\xb3\xba]", "a video (MPEG): extract frames from it"),
    (rb"RIFF....WEBP", "WebP that is damaged, or that this Pillow can't read"),
    (rb"PK\x03\x04", "a zip archive (or a document that is one)"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf", "a compressed archive"),
    (rb"\xff\xd8\xff", "JPEG with a damaged header"),
    (rb"\x89PNG", "PNG with a damaged header"),
    (rb"GIF8", "GIF with a damaged header"),
)
_COMPILED = tuple((re.compile(pattern, re.DOTALL | re.IGNORECASE), what) for pattern, what in _BEGINNINGS)

LOOKED_AT = 1024
"""Bytes from the beginning that are enough."""


def what_it_is(start: bytes) -> str:
    """What a file that begins with ``start`` is, where Pillow found no image in it."""
    start = start[:LOOKED_AT].removeprefix(b"\xef\xbb\xbf")
    if start[4:8] == b"ftyp":
        brands = {start[at : at + 4] for at in range(8, min(int.from_bytes(start[:4], "big"), len(start)), 4)}
        # Which one a HEIC file is led by differs; AVIF names heif's brands, too.
        if brands & _AVIF:
            return "AVIF that is damaged, or that this Pillow can't read"
        return HEIC if brands & _HEIF else "a video (MP4 or QuickTime): extract frames from it"
    found = next((what for pattern, what in _COMPILED if pattern.match(start)), "")
    if found:
        return found
    if not start.strip(b"\0"):
        return "nothing but zeros, as an interrupted download leaves them"
    return "text, not an image" if _is_text(start) else "not an image of a known format"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character that was cut
            return False
        text = start[: error.start].decode()
    return all(sign.isprintable() or sign.isspace() for sign in text)


@cache
def reads_heif() -> bool:
    """Whether Pillow reads HEIC here: it does with pillow-heif, which registers itself."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def curable(reason: str) -> bool:
    """Whether an image that was refused for ``reason`` can perhaps be read by now."""
    return reason == HEIC and reads_heif()
