"""The teacher ``openai``: OpenAI, vLLM, llama.cpp's server, Ollama, ``transformers serve`` and other endpoints.

One call is one HTTP request with a total time-out and a maximum size; the caller decides about retries. Time-outs of
httpx apply to single reads, so a slow response could take hours: requests run in an event loop with one time-out each.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from llavactl.components.teachers import completions
from llavactl.core.errors import TeacherError
from llavactl.core.network import proxy_error
from llavactl.core.protocols import Json, Limits, Reply, Request
from llavactl.core.registry import Options

if TYPE_CHECKING:
    import httpx2

_SECRET = re.compile(r"api_?key|authorization|password|secret|bearer|^token$|auth_?token|access_?token", re.I)
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
RESERVED = frozenset(["messages", "model", "stream", "n"])


class OpenAIOptions(Options):
    """Options of the teacher ``openai``."""

    model: str = Field(min_length=1, description="name of the model at the endpoint")
    base_url: str = Field("https://api.openai.com/v1", description="URL without /chat/completions")
    key_env: str = Field("OPENAI_API_KEY", description="environment variable with the API key")
    temperature: float | None = Field(0.7, ge=0, le=2, description="null: the default of the endpoint")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling; null: the default of the endpoint")
    max_tokens: int | None = Field(
        1024, ge=1, description="maximum length of a reply; null: the default of the endpoint, excludes --max-cost"
    )
    extra: dict[str, Any] = Field({}, description="more keys of the request body, such as max_completion_tokens")
    timeout_s: float = Field(120, gt=0, allow_inf_nan=False, description="total time of a request")
    max_bytes: int = Field(4_000_000, ge=1000, description="maximum size of a response")
    concurrency: int = Field(8, ge=1, le=1024, description="concurrent requests")
    requests_per_minute: int | None = Field(None, ge=1, description="rate limit; null: none")
    tokens_per_minute: int | None = Field(None, ge=1, description="rate limit of input and output tokens; null: none")
    retries: int = Field(5, ge=0, description="retries of a request that fails temporarily")

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("expected http:// or https://")
        if "@" in url or "?" in url:
            raise ValueError("must not contain credentials, as the recipe is saved with the run; see `key_env`")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(RESERVED & extra.keys()):
            raise ValueError(f"reserved keys: {', '.join(reserved)}")
        if secret := [key for key in extra if _SECRET.search(key)]:
            raise ValueError(
                f"{secret[0]} looks like a credential, and the recipe is saved with the run; see `key_env`"
            )
        return extra


class OpenAI:
    """The teacher ``openai``."""

    batch_url = "/v1/chat/completions"

    def __init__(self, options: OpenAIOptions) -> None:
        self.options = options
        bounds = [options.max_tokens, options.extra.get("max_tokens"), options.extra.get("max_completion_tokens")]
        self.limits = Limits(
            concurrency=options.concurrency,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            retries=options.retries,
            model=options.model,
            max_tokens=max((bound for bound in bounds if type(bound) is int), default=None),
        )
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx2.AsyncClient | None = None
        self._key = ""

    def content(self, request: Request) -> Mapping[str, Json]:
        """The body of the request."""
        options = {key: getattr(self.options, key) for key in ("temperature", "top_p", "max_tokens")}
        messages: Json = [dict(message) for message in request.messages]
        body: dict[str, Json] = {"model": self.options.model, "messages": messages}
        return body | {key: value for key, value in options.items() if value is not None} | self.options.extra

    def read(self, status: int, body: bytes) -> Reply:
        """The reply in a response of the endpoint or in a batch result."""
        return completions.read(status, body)

    def reply(self, request: Request) -> Reply:
        """Sends one request.

        Raises:
            TeacherError: no reply.
        """
        with self._lock:
            if self._loop is None:
                self._loop = self._start()
        future = asyncio.run_coroutine_threadsafe(self._post(self.content(request)), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise TeacherError("the request was canceled", then="again", paid=True) from None

    def close(self) -> None:
        """Cancels the requests in flight."""
        with self._lock:
            if (loop := self._loop) is not None:
                self._loop = None
                asyncio.run_coroutine_threadsafe(self._shut_down(), loop)

    def _start(self) -> asyncio.AbstractEventLoop:
        import httpx2

        self._key = os.environ.get(self.options.key_env, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise TeacherError(f"the API key in {self.options.key_env} contains invalid characters", then="stop")
        # A small compressed response could be huge when decompressed.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limits = httpx2.Limits(max_connections=self.options.concurrency)
        invalid_proxy = proxy_error()
        if (
            invalid_proxy and urlsplit(self.options.base_url).hostname not in _LOCAL_HOSTS
        ):  # a local server needs no proxy
            raise TeacherError(invalid_proxy.message, hint=invalid_proxy.hint, then="stop")
        self._client = httpx2.AsyncClient(
            headers=headers, timeout=self.options.timeout_s, limits=limits, trust_env=invalid_proxy is None
        )
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="openai teacher", daemon=True).start()
        return loop

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
        asyncio.get_running_loop().stop()

    async def _post(self, body: Mapping[str, Json]) -> Reply:
        import httpx2

        try:
            async with asyncio.timeout(self.options.timeout_s):
                status, response, retry_after = await self._send(body)
        except (TimeoutError, httpx2.TimeoutException):
            raise TeacherError(f"no response within {self.options.timeout_s:g} s", then="again", paid=True) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            hint = f"check that a server is running at {self.options.base_url}"
            raise TeacherError(self._message("no connection", error), hint=hint, then="again") from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
            raise TeacherError(self._message(f"invalid base_url {self.options.base_url}", error), then="stop") from None
        except httpx2.HTTPError as error:
            raise TeacherError(self._message("the response was interrupted", error), then="again", paid=True) from None
        return completions.read(status, response, retry_after)

    async def _send(self, body: Mapping[str, Json]) -> tuple[int, bytes, str | None]:
        assert self._client is not None
        url = f"{self.options.base_url}/chat/completions"
        async with self._client.stream("POST", url, json=body) as response:
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > self.options.max_bytes:
                    if response.status_code != 200:
                        break
                    raise TeacherError(f"the response is larger than {self.options.max_bytes} bytes", paid=True)
        content = bytes(received)
        if self._key:  # an endpoint may quote the key, and responses are stored and logged
            content = content.replace(self._key.encode(), b"***")
        return response.status_code, content, response.headers.get("retry-after")

    def _message(self, context: str, error: Exception) -> str:
        text = f"{context}: {type(error).__name__} {error}".strip()
        return text.replace(self._key, "***") if self._key else text
