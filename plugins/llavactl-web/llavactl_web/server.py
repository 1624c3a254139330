"""The HTTP server: the page, the files that it exports, and the guard around both."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from llavactl import LlavactlError, RecipeError

from .guard import LOOPBACK, Access, Guard

if TYPE_CHECKING:
    from .gallery import Gallery
    from .sessions import Sessions

DEFAULT_PORT = 7860
_TRIED_PORTS = 100

_OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@contextmanager
def gradio_settings() -> Iterator[None]:
    """Disables telemetry, and removes the private folder for uploads at the end; enter before importing gradio."""
    os.environ.update(_OFFLINE)
    folder = tempfile.mkdtemp(prefix="llavactl-web-")
    former = tempfile.tempdir
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = former
        shutil.rmtree(folder, ignore_errors=True)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens on ``port``; None: the first free one from ``DEFAULT_PORT`` on.

    Raises:
        LlavactlError: the port is taken, or the address isn't one of this machine.
    """
    candidates = [port] if port is not None else [*range(DEFAULT_PORT, DEFAULT_PORT + _TRIED_PORTS)]
    for candidate in candidates:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, candidate, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            return socket.create_server(address[:2], family=family)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno != errno.EADDRINUSE:
                break
    raise LlavactlError(f"can't listen on {host} port {candidate}: {reason}", hint="choose another --port or --host")


def application(sessions: Sessions, gallery: Gallery | None, access: Access) -> Any:
    """The complete ASGI application."""
    import fastapi
    import gradio
    from fastapi.responses import FileResponse

    from . import page

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/conversations/{id}/{side}.json")
    def conversation(id: str, side: str) -> Any:  # noqa: A002
        try:
            file = sessions.setup.conversations.file(id, side)
        except LlavactlError as error:
            raise fastapi.HTTPException(404, error.message) from None
        return FileResponse(file, media_type="application/json", filename=f"conversation-{id}.json")

    @app.get("/votes.jsonl")
    def votes() -> Any:
        if not sessions.setup.votes.file.is_file():
            raise fastapi.HTTPException(404, "no votes yet")
        return FileResponse(sessions.setup.votes.file, media_type="application/jsonl", filename="votes.jsonl")

    gradio.mount_gradio_app(
        app,
        page.build(sessions, gallery),
        "/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
        max_file_size=page.MAX_FILE,
        theme=page.THEME,
        css=page.CSS,
    )
    return Guard(app, access, page.MAX_UPLOAD)


def configuration(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )


def serve(app: Any, listening: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        uvicorn.Server(configuration(app)).run(sockets=[listening])


def access_for(host: str, token: str | None, names: tuple[str, ...]) -> Access:
    """Loopback needs no token; other hosts get one.

    Raises:
        RecipeError: the token is shorter than 8 characters, or not printable ASCII.
    """
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise RecipeError("--token: expected at least 8 printable ASCII characters without spaces")
    if host in LOOPBACK:
        return Access({*LOOPBACK, *names}, token or "")
    own = {host, socket.gethostname(), socket.getfqdn(), "localhost", *names}
    return Access({name.lower() for name in own}, token or secrets.token_urlsafe(32), addresses=True)


def url(listening: socket.socket, host: str, token: str) -> str:
    """The URL to open, with the machine's host name for wildcard addresses."""
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)  # noqa: S104
    shown = f"[{shown}]" if ":" in shown else shown
    port = listening.getsockname()[1]
    return f"http://{shown}:{port}/{f'?token={token}' if token else ''}"
