"""Previews of HTML answers. Such HTML is untrusted: it may ask for passwords or report that it was shown.

The frame's sandbox and policy prevent scripts, forms, navigation, popups and requests. Some browsers still open
connections for links and ``<link rel=preconnect>``, so the document is rewritten without URLs.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Inline styles and embedded images, nothing from the network."""

_HEAD = (
    f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    '<meta http-equiv="x-dns-prefetch-control" content="off"><meta name="referrer" content="no-referrer">'
)
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_EXCLUDED = frozenset(
    "applet base embed frame frameset iframe link meta noscript object plaintext portal script xmp".split()  # noqa: SIM905
)
_ADDRESSES = frozenset(
    "action background cite classid codebase data formaction href imagesrcset longdesc manifest ping poster profile "  # noqa: SIM905
    "srcdoc srcset target usemap xlink xmlns".split()
)


def preview(document: str) -> str:
    """A frame that shows the HTML ``document``."""
    source = html.escape(_HEAD + without_addresses(document))
    return f'<iframe sandbox="" referrerpolicy="no-referrer" title="preview" srcdoc="{source}"></iframe>'


def without_addresses(document: str) -> str:
    """``document`` without scripts, and without elements and attributes with URLs, except data: images."""
    writer = _Writer()
    writer.feed(document)
    writer.close()
    return "".join(writer.pieces)


class _Writer(HTMLParser):
    """Writes what it parses in normalized form, so that browsers parse the same elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._inside = ""

    def parse_marked_section(self, i: int, report: int = 1) -> int:  # noqa: ARG002
        """As browsers do; HTMLParser of older Pythons raises AssertionError for ``<![<``."""
        return self.parse_bogus_comment(i)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._inside = tag
        if tag in _EXCLUDED or not _NAME.fullmatch(tag):
            return
        kept = "".join(
            f' {name}="{html.escape(_styles(value or "") if name == "style" else value or "")}"'
            for name, value in attrs
            if _is_kept(name, value or "")
        )
        self.pieces.append(f"<{tag}{kept}>")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""
        if tag not in _EXCLUDED and _NAME.fullmatch(tag):
            self.pieces.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.pieces.append(_styles(data).replace("<", ""))  # in SVG, <style> may contain elements
        elif self._inside != "script":
            self.pieces.append(html.escape(data))


_STYLE_ADDRESS = re.compile(r"@import[^;]*;?|url\(\s*['\"]?(?!data:)[^)]*\)?", re.IGNORECASE)


def _styles(text: str) -> str:
    """``text`` without ordinary URLs; the policy blocks others (with escapes, for example)."""
    return _STYLE_ADDRESS.sub("", text)


def _is_kept(name: str, value: str) -> bool:
    if name == "src":
        return value.strip().lower().startswith("data:image/")
    return _NAME.fullmatch(name) is not None and name not in _ADDRESSES and not name.startswith("on")
