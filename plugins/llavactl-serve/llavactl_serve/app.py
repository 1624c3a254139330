"""The ASGI application: routes, errors, authorization, access log."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .completions import ChatCompletions
from .errors import AUTHENTICATION, SERVER, ApiError, json_response
from .service import Service, model_not_found

log = logging.getLogger("llavactl.serve")


def application(service: Service) -> Starlette:
    settings = service.settings

    async def health(_request: Request) -> Response:
        return json_response(service.health(), 503 if service.stopping else 200)

    def description() -> dict[str, Any]:
        return {"id": settings.model, "object": "model", "created": service.created, "owned_by": "llavactl"}

    async def models(_request: Request) -> Response:
        return json_response({"object": "list", "data": [description()]})

    async def model(request: Request) -> Response:
        if request.path_params["model"] != settings.model:
            raise model_not_found(request.path_params["model"])
        return json_response(description())

    routes = [
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/health", health),
    ]
    middleware = [Middleware(AccessLog)]
    if settings.cors:
        methods, headers = ["GET", "POST"], ["*"]
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=methods, allow_headers=headers)
        )
    if settings.token is not None:
        middleware.append(Middleware(BearerToken, token=settings.token))
    elif settings.local:
        middleware.append(Middleware(LocalOnly, origins=settings.cors))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False
    return app


async def _api_error(_request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    """An unknown path or a wrong method."""
    messages = {
        404: f"unknown path {request.url.path[:200]}",
        405: f"{request.method} is not allowed for {request.url.path[:200]}",
    }
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code)
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


class BearerToken:
    """Refuses requests without the header ``Authorization: Bearer TOKEN``."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if hmac.compare_digest(scheme.title() + b" " + token.strip(), self.expected):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "missing or wrong token: expected the header `Authorization: Bearer TOKEN`",
            code="invalid_api_key",
            kind=AUTHENTICATION,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)


class LocalOnly:
    """Refuses requests for host names other than localhost, and of web pages whose origin is not in ``origins``.

    IP addresses are accepted as the host. Otherwise a web page could reach this machine by a host name that resolves
    to 127.0.0.1 (DNS rebinding), or start answers it can't read: a POST of plain text needs no CORS preflight.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        host, origin = headers.get(b"host", "").lower(), headers.get(b"origin")
        if not _LOCAL_HOST.fullmatch(host):
            why, code = f"host {host[:200]!r} is not this machine: use 127.0.0.1, or start with --token", "unknown_host"
        elif origin is not None and not {origin, "*"} & {*self.origins}:
            why, code = f"web pages of {origin[:200]!r} may not use this endpoint: see --cors", "unknown_origin"
        else:
            await self.app(scope, receive, send)
            return
        await ApiError(403, why, code=code).response()(scope, receive, send)


_LOCAL_HOST = re.compile(r"((|localhost|[^/]+\.localhost|[0-9.]+|\[[0-9a-f:.]+\])(:\d+)?)")


class AccessLog:
    """Logs one line per request. An unexpected exception is logged with its traceback and answered with status 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, end = time.monotonic(), 0, ""

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.app(scope, receive, observed)
        except ClientDisconnect:
            end = ", disconnected"
        except Exception as error:
            log.exception("bug while answering a request", exc_info=error)
            if not status:
                failure = ApiError(500, "internal error", code="internal_error", kind=SERVER)
                await failure.response()(scope, receive, observed)
        finally:
            if usage := scope["state"].get("usage"):
                end = f", {usage[0]} + {usage[1]} tokens"
            log.log(
                logging.DEBUG if scope["path"] == "/health" else logging.INFO,
                "%s %s %s %s in %.2f s%s",
                (scope["client"] or ("-",))[0],
                scope["method"],
                scope["raw_path"].decode("ascii", "replace")[:200],
                status or "-",
                time.monotonic() - start,
                end,
            )
