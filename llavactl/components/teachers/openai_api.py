"""Any OpenAI-style chat endpoint as a teacher: OpenAI, vLLM, llama.cpp's server, Ollama, ``transformers serve``.

One call is one HTTP request, bounded in time from the first byte to the last and in size; when to ask again is
decided by whoever calls. httpx bounds single reads, which a server that trickles can string together for hours:
so requests run in an event loop, where one time-out holds for the whole.
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
from llavactl.core.network import proxy_fault
from llavactl.core.protocols import Json, Limits, Reply, Request
from llavactl.core.registry import Options

if TYPE_CHECKING:
    import httpx2

_SECRET = re.compile(r"api_?key|authorization|password|secret|bearer|^token$|auth_?token|access_?token", re.I)
_HERE = ("localhost", "127.0.0.1", "::1")
RESERVED = frozenset(["messages", "model", "stream", "n"])


class OpenAIOptions(Options):
    """Options of the teacher ``openai``."""

    model: str = Field(min_length=1, description="as the endpoint calls it")
    base_url: str = Field("https://api.openai.com/v1", description="up to, and without, /chat/completions")
    key_env: str = Field("OPENAI_API_KEY", description="the environment variable that holds the key, if one is needed")
    temperature: float | None = Field(0.7, ge=0, le=2, description="null: the endpoint's own")
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(
        1024, ge=1, description="of one reply; null: the endpoint's own, unknown to --max-cost"
    )
    extra: dict[str, Any] = Field({}, description="more keys of the request's body, such as max_completion_tokens")
    timeout_s: float = Field(120, gt=0, allow_inf_nan=False, description="for one request as a whole")
    max_bytes: int = Field(4_000_000, ge=1000, description="a larger answer is cut off and refused")
    concurrency: int = Field(8, ge=1, le=1024, description="requests at a time")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1, description="read and written together")
    retries: int = Field(5, ge=0, description="of a request that fails for a while")

    @field_validator("base_url")
    @classmethod
    def _address(cls, given: str) -> str:
        if not given.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        if "@" in given or "?" in given:
            raise ValueError("must hold no key or password: a recipe is saved with its run; see `key_env`")
        return given.rstrip("/").removesuffix("/chat/completions")

    @field_validator("extra")
    @classmethod
    def _others(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & given.keys()):
            raise ValueError(f"can't hold {', '.join(taken)}")
        if secret := [key for key in given if _SECRET.search(key)]:
            raise ValueError(f"{secret[0]} looks like a key or password: a recipe is saved with its run; see `key_env`")
        return given


class OpenAI:
    """The teacher ``openai``."""

    batch_url = "/v1/chat/completions"

    def __init__(self, options: OpenAIOptions) -> None:
        self.options = options
        most = [options.max_tokens, options.extra.get("max_tokens"), options.extra.get("max_completion_tokens")]
        self.limits = Limits(
            concurrency=options.concurrency,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            retries=options.retries,
            model=options.model,
            max_tokens=max((each for each in most if type(each) is int), default=None),
        )
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx2.AsyncClient | None = None
        self._key = ""

    def content(self, request: Request) -> Mapping[str, Json]:
        """The body of the request."""
        given = {key: getattr(self.options, key) for key in ("temperature", "top_p", "max_tokens")}
        body: dict[str, Json] = {"model": self.options.model, "messages": [dict(each) for each in request.messages]}
        return body | {key: value for key, value in given.items() if value is not None} | self.options.extra

    def read(self, status: int, body: bytes) -> Reply:
        """The reply in an answer, from the network or from a file of results."""
        return completions.read(status, body)

    def reply(self, request: Request) -> Reply:
        """One request, one reply.

        Raises:
            TeacherError: there is none.
        """
        with self._lock:
            if self._loop is None:
                self._loop = self._start()
        future = asyncio.run_coroutine_threadsafe(self._ask(self.content(request)), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise TeacherError("the request was cut off", then="again", paid=True) from None

    def close(self) -> None:
        """Cuts off what is in flight."""
        with self._lock:
            if (loop := self._loop) is not None:
                self._loop = None
                asyncio.run_coroutine_threadsafe(self._end(), loop)

    def _start(self) -> asyncio.AbstractEventLoop:
        import httpx2

        self._key = os.environ.get(self.options.key_env, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise TeacherError(f"the key in {self.options.key_env} holds signs that no key has", then="stop")
        # Compressed answers could be small on the wire and enormous here.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        most = httpx2.Limits(max_connections=self.options.concurrency)
        fault = proxy_fault()
        if fault and urlsplit(self.options.base_url).hostname not in _HERE:  # a local server needs no proxy
            raise TeacherError(fault.message, hint=fault.hint, then="stop")
        self._client = httpx2.AsyncClient(
            headers=headers, timeout=self.options.timeout_s, limits=most, trust_env=fault is None
        )
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="openai teacher", daemon=True).start()
        return loop

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
        asyncio.get_running_loop().stop()

    async def _ask(self, body: Mapping[str, Json]) -> Reply:
        import httpx2

        try:
            async with asyncio.timeout(self.options.timeout_s):
                status, answer, retry_after = await self._send(body)
        except (TimeoutError, httpx2.TimeoutException):
            raise TeacherError(f"no answer within {self.options.timeout_s:g} s", then="again", paid=True) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            hint = f"is anything listening at {self.options.base_url}?"
            raise TeacherError(self._said("no connection", error), hint=hint, then="again") from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
            raise TeacherError(self._said(f"{self.options.base_url} can't be asked", error), then="stop") from None
        except httpx2.HTTPError as error:
            raise TeacherError(self._said("the answer broke off", error), then="again", paid=True) from None
        return completions.read(status, answer, retry_after)

    async def _send(self, body: Mapping[str, Json]) -> tuple[int, bytes, str | None]:
        assert self._client is not None
        address = f"{self.options.base_url}/chat/completions"
        async with self._client.stream("POST", address, json=body) as response:
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > self.options.max_bytes:
                    if response.status_code != 200:
                        break
                    raise TeacherError(f"the answer is larger than {self.options.max_bytes} bytes", paid=True)
        found = bytes(answer)
        if self._key:  # an endpoint may quote the key; what it says is kept and logged
            found = found.replace(self._key.encode(), b"***")
        return response.status_code, found, response.headers.get("retry-after")

    def _said(self, what: str, error: Exception) -> str:
        text = f"{what}: {type(error).__name__} {error}".strip()
        return text.replace(self._key, "***") if self._key else text
