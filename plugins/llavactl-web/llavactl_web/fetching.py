"""Downloads of images from public addresses, with limits."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from llavactl import DataError

TIMEOUT_S = 10.0
MAX_REDIRECTS = 3

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(url: str, max_bytes: int) -> bytes:
    """The content at the http(s) ``url``, directly and not through a proxy.

    Raises:
        DataError: an address that isn't public, also in a redirect; a network error; a limit.
    """
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for _ in range(MAX_REDIRECTS + 1):
            content, target = _get(url, deadline, max_bytes)
            if target is None:
                return content
            url = urljoin(url, target)
    except TimeoutError:
        raise DataError(f"{url:.200}: no answer within {TIMEOUT_S:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url:.200}: {getattr(error, 'strerror', None) or error}") from None
    raise DataError(f"more than {MAX_REDIRECTS} redirects")


def _get(url: str, deadline: float, max_bytes: int) -> tuple[bytes, str | None]:
    """The content at ``url``, or the location that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http(s) URL")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(parts.hostname, port)
    sock = connection.sock = _connected(parts.hostname, port, deadline)
    try:
        if parts.scheme == "https":
            sock = connection.sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        host = parts.netloc.rpartition("@")[2]
        connection.request("GET", path, headers={"Host": host, "User-Agent": "llavactl", "Connection": "close"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and (target := response.getheader("Location")):
            return b"", target
        if response.status != http.client.OK:
            raise ValueError(f"HTTP {response.status}")
        return _body(response, sock, deadline, max_bytes), None
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse, sock: socket.socket, deadline: float, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        sock.settimeout(_remaining(deadline))
        piece = response.read1(_CHUNK)
        if not piece:
            return bytes(body)
        body += piece
        if len(body) > max_bytes:
            raise ValueError(f"larger than {max_bytes >> 20} MiB")


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to an address of ``host`` that was checked: a second resolution may give another one."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(map(is_public, addresses)):
        raise ValueError("not a public address")
    return socket.create_connection((addresses[0], port), timeout=_remaining(deadline))


def is_public(address: str) -> bool:
    """Whether ``address`` is outside private, local and reserved networks, also if IPv6 embeds an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in _NAT64):
        return False
    return ip.is_global and not ip.is_multicast


def _remaining(deadline: float) -> float:
    if (remaining := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return remaining
