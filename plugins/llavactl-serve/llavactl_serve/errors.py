"""Errors of requests in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

INVALID, AUTHENTICATION, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
"""Values of ``type``."""


class ApiError(Exception):
    """A request that is answered with ``status`` and an error; ``param`` is the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> Response:
        return json_response({"error": self.error}, self.status, self.headers)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", kind=SERVER)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers, "application/json")


def json_bytes(value: Any) -> bytes:
    """``value`` as ASCII, which can represent any string of a request, even invalid Unicode."""
    return json.dumps(value).encode()
