"""The HTTP server: its socket, connections and shutdown."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llavactl import RecipeError

from .app import application
from .service import Service

STALL_TIMEOUT_S = 30.0
"""A client that accepts no data, or doesn't complete the headers of its first request, is disconnected after this."""

_SHUTDOWN_TIMEOUT_S = 5
_SEND_BUFFER_BYTES = 1 << 16
_HOST_HINT = "use an address of this machine, for example 127.0.0.1"


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port``; port 0 chooses a free one.

    Raises:
        RecipeError: the address is unknown, in use or not allowed.
    """
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise RecipeError(f"--host {host}: {why}", hint=_HOST_HINT) from None
    family, kind, protocol, _, address = min(entries, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Per connection: otherwise the kernel buffers megabytes for a client that stopped reading.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        sock.bind(address)
    except OSError as error:
        sock.close()
        hints = {
            errno.EADDRINUSE: "choose another --port, or --port 0 for a free one",
            errno.EACCES: "choose a --port of at least 1024",
            errno.EADDRNOTAVAIL: _HOST_HINT,
        }
        message = f"can't listen on {host} port {port}: {error.strerror or error}"
        raise RecipeError(message, hint=hints.get(error.errno or 0, "")) from None
    return sock


def is_loopback(sock: socket.socket) -> bool:
    """Whether only programs on this machine can connect to ``sock``."""
    return ipaddress.ip_address(str(sock.getsockname()[0]).partition("%")[0]).is_loopback


def url_of(host: str, sock: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/v1"


def run(service: Service, sock: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM, which then take effect as usual."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # AccessLog logs errors
    config = uvicorn.Config(
        application(service),
        http=_Connection,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
    )
    _Server(config, service).run(sockets=[sock])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.stop()
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """Disconnects clients that stall."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.flow.write_paused:
            self._stop_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
