"""Checks the HTTP proxy configured by environment variables."""

from __future__ import annotations

import importlib.util
import os
import urllib.request
from urllib.parse import urlsplit

from llavactl.core.errors import LlavactlError

_SCHEMES = ("http", "https", "socks5", "socks5h")


def proxy_error() -> LlavactlError | None:
    """An error if the proxy in an environment variable is invalid, else None."""
    proxies = urllib.request.getproxies()
    if "*" in proxies.get("no", ""):
        return None
    for kind in ("http", "https", "all"):
        if (address := proxies.get(kind)) and (why := _invalid_reason(address)):
            name = next((name for name in os.environ if name.lower() == f"{kind}_proxy"), f"{kind}_proxy")
            hint = f"unset {name}, or set it to a proxy like http://host:port"
            if "socksio" in why:
                hint = f"`pip install socksio`, or unset {name}"
            return LlavactlError(f"invalid proxy in {name}: {why}", hint=hint)
    return None


def _invalid_reason(address: str) -> str:
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        return "not a proxy URL"
    if parts.scheme not in _SCHEMES:
        return f"expected a scheme of {', '.join(_SCHEMES)}, got {parts.scheme}"
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "SOCKS proxies need the package socksio"
    return ""
