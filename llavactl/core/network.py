"""Why the network can't be used: an invalid proxy, offline mode, or a model hub that can't be reached."""

from __future__ import annotations

import importlib.util
import os
import urllib.request
from collections.abc import Iterator
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


def offline_variable() -> str:
    """The environment variable that disables downloads from the model hub; "" if they are allowed."""
    # Of the two, huggingface_hub uses the first that isn't empty.
    name = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)), "")
    return name if os.environ.get(name, "").upper() in _TRUE else ""


_TRUE = ("1", "ON", "YES", "TRUE")
"""Values that huggingface_hub reads as true."""


def hub_error(error: BaseException, model: str = "") -> LlavactlError | None:
    """An error if ``error`` means that files of ``model`` are not in the hub's cache and can't be downloaded."""
    if invalid_proxy := proxy_error():
        return LlavactlError(f"not downloaded: {invalid_proxy.message}", hint=invalid_proxy.hint)
    if not any(_NOT_DOWNLOADED & {cls.__name__ for cls in type(each).__mro__} for each in _causes(error)):
        return None
    fill = f"on a machine with network access, `hf download {model or 'ID'}` downloads a model to the hub's cache"
    if variable := offline_variable():
        return LlavactlError(
            f"not in the hub's cache, and {variable} disables downloads",
            hint=f"unset {variable}, or use a local folder; {fill}",
        )
    from huggingface_hub import constants

    return LlavactlError(
        f"not in the hub's cache, and {constants.ENDPOINT} can't be reached",
        hint=f"check the network, or use a local folder; {fill}; with HF_HUB_OFFLINE=1 it is loaded from there",
    )


_NOT_DOWNLOADED = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError"}
"""Classes of huggingface_hub and of its HTTP library."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and the exceptions that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
