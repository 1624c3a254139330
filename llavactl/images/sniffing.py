"""The kind of a file that isn't a readable image, from its first bytes, as a short reason."""

from __future__ import annotations

import re
from functools import cache

_HEIF = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF = frozenset({b"avif", b"avis"})

NO_MEMORY = "not enough memory"
HEIC = "HEIC, which needs a package: pip install pillow-heif"
"""The only reason that installing a package resolves. Stores keep it, so its text must not change."""

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the image: run `git lfs pull` there"),
    (rb"(\.\./)*\.git/annex/|/annex/objects/", "a git-annex pointer, not the image: run `git annex get` there"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg\b", "SVG: convert it to PNG"),
    (rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body|meta|title)\b", "an HTML page, not an image"),
    (rb"\s*<(\?xml|Error|!DOCTYPE)", "XML, perhaps a server's error message"),
    (rb"\s*[{\[]\s*[\"{}\[\]]", "JSON, perhaps a server's error message"),
    (rb"%PDF-", "PDF: convert its pages to images"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript: convert it to PNG"),
    (rb"8BPS", "a Photoshop document: export it as PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL: convert it to PNG"),
    (rb"\x1aE\xdf\xa3", "a video (Matroska or WebM): extract frames from it"),
    (rb"RIFF....AVI ", "a video (AVI): extract frames from it"),
    (rb"\0\0\x01[\xb3\xba]", "a video (MPEG): extract frames from it"),
    (rb"RIFF....WEBP", "damaged WebP, or not supported by this Pillow"),
    (rb"PK\x03\x04", "a zip archive, or a document in zip format"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf", "a compressed archive"),
    (rb"\xff\xd8\xff", "JPEG with a damaged header"),
    (rb"\x89PNG", "PNG with a damaged header"),
    (rb"GIF8", "GIF with a damaged header"),
)
_COMPILED = tuple((re.compile(pattern, re.DOTALL | re.IGNORECASE), kind) for pattern, kind in _BEGINNINGS)

HEAD_BYTES = 1024
"""The number of first bytes needed."""


def file_kind(start: bytes) -> str:
    """The kind of a file that begins with ``start`` and that Pillow can't read as an image."""
    if not start:
        return "the file is empty"
    start = start[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf")
    if start[4:8] == b"ftyp":
        brands = {
            start[offset : offset + 4] for offset in range(8, min(int.from_bytes(start[:4], "big"), len(start)), 4)
        }
        # The major brand of HEIC files varies, and AVIF files list HEIF's brands, too.
        if brands & _AVIF:
            return "damaged AVIF, or not supported by this Pillow"
        return HEIC if brands & _HEIF else "a video (MP4 or QuickTime): extract frames from it"
    if kind := next((kind for pattern, kind in _COMPILED if pattern.match(start)), ""):
        return kind
    if not start.strip(b"\0"):
        return "only zeros, probably an interrupted download"
    return "text, not an image" if _is_text(start) else "not an image of a known format"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # otherwise a character is truncated at the end
            return False
        text = start[: error.start].decode()
    return all(character.isprintable() or character.isspace() for character in text)


@cache
def reads_heif() -> bool:
    """Whether Pillow can read HEIC, which needs pillow-heif; registers it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def curable(reason: str) -> bool:
    """Whether an image that was skipped for ``reason`` may be readable now."""
    return reason == NO_MEMORY or (reason == HEIC and reads_heif())
