"""ASGI middleware around the whole server: access control and security headers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_REQUEST = 2 << 20
"""Bytes of a request without files."""

_GET = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)/?|/(assets|static)/.*|/(conversations|votes)[\w./-]*"
    r"|/gradio_api/(heartbeat/\w+|queue/data|upload_progress|startup-events|file=.*)"
)
_POST = re.compile(r"/gradio_api/(queue/join|cancel|reset|upload)/?")

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=(), display-capture=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server: ``hosts`` are its names; ``token`` "" admits everyone who can connect."""

    hosts: Collection[str]
    token: str = ""
    addresses: bool = False
    """Whether any IP address is accepted as the host: DNS rebinding needs a host name."""

    def is_own(self, host: str) -> bool:
        """Whether the ``Host`` header is a name of this server."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or (self.addresses and _is_address(name))

    def admits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    @property
    def cookie(self) -> str:
        """The value of the cookie that replaces the token."""
        return hmac.new(self.token.encode(), b"llavactl-web cookie", hashlib.sha256).hexdigest()


class Guard:
    """Refuses requests for other hosts, from other origins, without the token, or for paths the page doesn't use."""

    def __init__(self, app: App, access: Access, max_upload: int) -> None:
        self.app, self.access, self.max_upload = app, access, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, _secured(send))

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self.access.is_own(headers.get("host", "")):
            return await _refuse(send, 421, "unknown host name: see --allow-host")
        if _is_cross_site(headers):
            return await _refuse(send, 403, "requests from other sites are refused")
        if self.access.token and not self._has_cookie(scope, headers):
            return await self._sign_in(scope, headers, send)
        path, is_post = scope["path"], scope["method"] == "POST"
        if scope["method"] not in ("GET", "HEAD", "POST") or not (_POST if is_post else _GET).fullmatch(path):
            return await _refuse(send, 404, "not found")
        if is_post and not path.startswith("/gradio_api/upload"):
            body = await _body(receive)
            if body is None:
                return await _refuse(send, 413, f"more than {MAX_REQUEST} bytes")
            if names_url_as_file(body):
                return await _refuse(send, 400, "files must be uploaded")
            receive = _replayed(body, receive)
        elif is_post and int(headers.get("content-length", "-1") or -1) not in range(self.max_upload):
            return await _refuse(send, 413, f"uploads are limited to {self.max_upload} bytes")
        if path == "/":  # uncompressed, so that its scripts can be hashed
            scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"accept-encoding"]
        await self.app(scope, receive, send)
        return None

    def _has_cookie(self, scope: Scope, headers: MutableMapping[str, str]) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        cookie = cookies.get(_cookie_name(scope))
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.access.cookie.encode())

    async def _sign_in(self, scope: Scope, headers: MutableMapping[str, str], send: Send) -> None:
        """Exchanges the token in the URL for a cookie."""
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if scope["path"] != "/" or not self.access.admits(given):
            return await _refuse(send, 401, "open the URL with the token that llavactl printed")
        cookie = f"{_cookie_name(scope)}={self.access.cookie}; HttpOnly; SameSite=Lax; Path=/; Max-Age=2592000"
        if headers.get("x-forwarded-proto", scope.get("scheme")) == "https":
            cookie += "; Secure"
        fields = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 303, "headers": fields})
        await send({"type": "http.response.body", "body": b""})
        return None


def _cookie_name(scope: Scope) -> str:
    """The name contains the port, because browsers share cookies between the ports of a host."""
    server = scope.get("server") or ("", 0)
    return f"llavactl-web-{server[1]}"


def _is_cross_site(headers: MutableMapping[str, str]) -> bool:
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return True
    # "none": typed or bookmarked. A link on another site may open the page, but nothing else.
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and (
        headers.get("sec-fetch-mode") != "navigate"
    )


def names_url_as_file(body: bytes) -> bool:
    """Whether ``body`` is not JSON, or has a file that gradio would download."""
    try:
        pending = [json.loads(body or b"{}")]
    except (ValueError, RecursionError):
        return True
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if any(isinstance(value.get(key), str) and "://" in value[key] for key in ("path", "name")):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


async def _body(receive: Receive) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_REQUEST:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": pending.pop(), "more_body": False} if pending else await receive()

    return replay


def _secured(send: Send) -> Send:
    """``send`` with security headers. A page is held back until its scripts are known."""
    held: list[Message] = []

    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower(): value for name, value in message["headers"]}
            message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in _HEADERS.items())]
            if names.get(b"content-type", b"").startswith(b"text/html"):
                held.append(message)
                return
            message["headers"].append((b"content-security-policy", policy("").encode()))
        elif held:
            held.append(message)
            if message.get("more_body"):
                return
            start, *bodies = held
            page = b"".join(body.get("body", b"") for body in bodies)
            start["headers"].append((b"content-security-policy", policy(page.decode("utf-8", "replace")).encode()))
            start["headers"].append((b"cache-control", b"no-store"))
            held.clear()
            await send(start)
            message = {"type": "http.response.body", "body": page}
        await send(message)

    return secured


_INLINE_SCRIPT = re.compile(r"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)


def policy(page: str) -> str:
    """The content security policy of ``page``: no other hosts, and only the inline scripts of ``page``.

    gradio compiles the functions of gr.HTML and ``js=``, hence ``unsafe-eval``. Event handlers in attributes don't run.
    """
    hashes = (hashlib.sha256(script.encode()).digest() for script in _INLINE_SCRIPT.findall(page))
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src 'self' 'unsafe-eval' {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
        "manifest-src 'self'; worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


async def _refuse(send: Send, status: int, reason: str) -> None:
    fields = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
