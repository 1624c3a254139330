"""``POST /v1/chat/completions``: one answer, as one JSON document or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from llavactl import Finish, LlavactlError

from .answers import Answer
from .errors import SERVER, ApiError, json_bytes, json_response, shutting_down
from .service import PreparedRequest, Service

log = logging.getLogger("llavactl.serve")

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer the events
]


class ChatCompletions:
    """The endpoint, an ASGI application; ``scope["state"]["usage"]`` is set for the access log."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self.service.settings.timeout_s
        answer = self.service.admit()
        watcher = None
        try:
            request = await self._prepared(Request(scope, receive), deadline)
            if self.service.stopping:
                raise shutting_down()
            answer.start(self.service.batcher, request.prompt, request.sampling, request.chat.stop)
            watcher = asyncio.create_task(_cancel_on_disconnect(answer, receive))
            response = _Completion(self.service.settings.model, request, scope)
            if request.chat.stream:
                await response.stream(answer, deadline, send)
            else:
                await response.whole(answer, deadline, scope, receive, send)
        finally:
            answer.cancel(ClientDisconnect())
            if watcher is not None:
                watcher.cancel()

    async def _prepared(self, request: Request, deadline: float) -> PreparedRequest:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.service.prepared(await _body(request, self.service.settings.max_body_bytes))
        except TimeoutError:
            raise ApiError(408, "the request was not received and prepared in time", code="timeout") from None
        except asyncio.CancelledError:
            if self.service.stopping:
                raise shutting_down() from None
            raise


async def _body(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {limit >> 20} MiB", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def _cancel_on_disconnect(answer: Answer, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel(ClientDisconnect())


class _Completion:
    """The response to ``request`` in OpenAI's format."""

    def __init__(self, model: str, request: PreparedRequest, scope: Scope) -> None:
        self.request, self.scope = request, scope
        self.frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, answer: Answer, deadline: float, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = []
        while isinstance(event := await _next(answer, deadline), str):
            pieces.append(event)
        message = {"role": "assistant", "content": "".join(pieces).strip(), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
        document = {**self.frame, "object": "chat.completion", "choices": [choice], "usage": self._usage(event)}
        await json_response(document)(scope, receive, send)

    async def stream(self, answer: Answer, deadline: float, send: Send) -> None:
        """Streams the answer; an error before its first event is raised, a later one ends the stream."""
        event = await _next(answer, deadline)
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        try:
            await self._send(send, self._chunk({"role": "assistant", "content": ""}))
            strip = _Stripper()
            while isinstance(event, str):
                if text := strip(event):
                    await self._send(send, self._chunk({"content": text}))
                event = await _next(answer, deadline)
            await self._send(send, self._chunk({}, event.reason))
            usage = self._usage(event)
            if self.request.chat.include_usage:
                await self._send(send, {**self._chunk({}), "choices": [], "usage": usage})
        except ApiError as error:
            await self._send(send, {"error": error.error})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _chunk(self, delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.request.chat.include_usage else {}
        return {**self.frame, "object": "chat.completion.chunk", "choices": [choice], **usage}

    async def _send(self, send: Send, value: Any) -> None:
        await send({"type": "http.response.body", "body": b"data: %s\n\n" % json_bytes(value), "more_body": True})

    def _usage(self, finish: Finish) -> dict[str, int]:
        prompt = len(self.request.prompt)
        self.scope["state"]["usage"] = (prompt, finish.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": finish.tokens,
            "total_tokens": prompt + finish.tokens,
        }


async def _next(answer: Answer, deadline: float) -> str | Finish:
    """As ``Answer.next``, but errors of the model are ApiErrors."""
    try:
        return await answer.next(deadline)
    except TimeoutError:
        raise ApiError(504, "the answer was not finished in time", code="timeout", kind=SERVER) from None
    except (ApiError, ClientDisconnect):
        raise
    except LlavactlError as error:
        log.error("%s", error.with_hint())
        raise ApiError(500, error.message, code="generation_failed", kind=SERVER) from None
    except Exception as error:
        log.exception("bug while answering a request", exc_info=error)
        raise ApiError(500, "internal error", code="internal_error", kind=SERVER) from None


class _Stripper:
    """Removes whitespace around streamed text, so that the pieces add up to the answer without streaming."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def __call__(self, piece: str) -> str:
        text = self._held + piece
        text = text if self._begun else text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self._begun = self._begun or bool(kept)
        return kept
