"""Downloads for untrusted users."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from llavactl.core.errors import DataError
from llavactl.images import public_urls
from llavactl.images.public_urls import download_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        *((address, False) for address in (
            "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
            "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "::ffff:93.184.216.34",
            "64:ff9b::7f00:1", "2002:7f00:1::1", "fe80::1%eth0", "::ffff:10.0.0.1", "ff02::1", "fc00::1",
        )),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert public_urls.is_public(address) is public


class Served:
    """A local server that answers every request with ``reply``."""

    def __init__(self, reply: bytes) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.requests: list[bytes] = []

        def run() -> None:
            while True:
                try:
                    peer = self.listening.accept()[0]
                except OSError:
                    return
                with peer:
                    self.requests.append(peer.recv(65536))
                    peer.sendall(reply)

        threading.Thread(target=run, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}/a.png"


def test_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Served(b"HTTP/1.1 200 OK\r\n\r\nsecret")
    outer = Served(b"HTTP/1.1 302 Found\r\nLocation: http://[::1]/\r\n\r\n")
    with pytest.raises(DataError, match="public"):
        download_public(inner.url, 100)
    assert inner.requests == []
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
    assert download_public(inner.url, 100) == b"secret"
    with pytest.raises(DataError, match="larger"):
        download_public(inner.url, 3)
    with pytest.raises(DataError):
        download_public(outer.url, 100)  # a redirect to an address that isn't public
    for url in ("ftp://127.0.0.1/a", "file:///etc/passwd", "http://", "http://127.0.0.1:99999/", "x"):
        with pytest.raises(DataError):
            download_public(url, 100)
    for served in (inner, outer):
        served.listening.shutdown(socket.SHUT_RDWR)
        served.listening.close()


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: addresses)
    with pytest.raises(DataError, match="public"):
        download_public("http://mixed.example/", 100)


def test_a_server_that_sends_byte_by_byte_is_left_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_urls, "is_public", lambda _address: True)
    monkeypatch.setattr(public_urls, "TIMEOUT_S", 0.3)
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            with listening.accept()[0] as peer:
                peer.recv(65536)
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                try:
                    while not ended.is_set():
                        peer.sendall(b"x")
                        time.sleep(0.02)
                except OSError:
                    pass

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with pytest.raises(DataError, match="within"):
                download_public(f"http://127.0.0.1:{listening.getsockname()[1]}/", 1 << 20)
        finally:
            ended.set()
            thread.join()
