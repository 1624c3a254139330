"""Downloads for untrusted users: from public addresses only, with limits of size and time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

from llavactl.core.errors import DataError

TIMEOUT_S = 10.0
MAX_REDIRECTS = 3

_REDIRECTS = (301, 302, 303, 307, 308)


def download_public(url: str, max_bytes: int) -> bytes:
    """The content at the http(s) ``url``, which an untrusted user has named; directly and not through a proxy.

    Addresses of this machine and of private networks are refused, also if a redirect or a second resolution of the
    name leads there.

    Raises:
        DataError: such an address; a network error; more than ``max_bytes``, TIMEOUT_S or MAX_REDIRECTS.
    """
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for _ in range(MAX_REDIRECTS + 1):
            content, target = _get(url, deadline, max_bytes)
            if target is None:
                return content
            url = urljoin(url, target)
        raise DataError(f"more than {MAX_REDIRECTS} redirects")
    except TimeoutError:
        raise DataError(f"no answer within {TIMEOUT_S:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(str(getattr(error, "strerror", None) or error) or type(error).__name__) from None


def _get(url: str, deadline: float, max_bytes: int) -> tuple[bytes, str | None]:
    """The content at ``url``, or the location that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError("not an http(s) URL")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = _connected(parts.hostname, port, deadline)
    try:
        with _ended_at(deadline, connection.sock):
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
            path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
            host = parts.netloc.rpartition("@")[2]
            connection.request("GET", path, headers={"Host": host, "User-Agent": "llavactl", "Connection": "close"})
            response = connection.getresponse()
            if response.status in _REDIRECTS and (target := response.getheader("Location")):
                return b"", target
            if response.status != http.client.OK:
                raise DataError(f"HTTP {response.status}")
            content = response.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise DataError(f"larger than {max_bytes >> 20} MiB")
            return content, None
    finally:
        connection.close()


@contextlib.contextmanager
def _ended_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Shuts ``sock`` down at ``deadline``: the timeout of a socket begins again with each byte.

    Raises:
        TimeoutError: the deadline has passed.
    """
    descriptor = sock.dup()  # TLS takes over the original

    def end() -> None:
        with contextlib.suppress(OSError):
            descriptor.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_remaining(deadline), end)
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        _remaining(deadline)
        raise
    finally:
        timer.cancel()
        descriptor.close()
    _remaining(deadline)


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to ``host``, whose addresses must all be public.

    The connection is to an address that was checked: a name that is resolved again may have another one.
    """
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(map(is_public, addresses)):
        raise DataError("not a public address")
    return socket.create_connection((addresses[0], port), timeout=_remaining(deadline))


def is_public(address: str) -> bool:
    """Whether ``address`` is outside private, local and reserved networks."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if embedded is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _remaining(deadline: float) -> float:
    if (remaining := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return remaining
