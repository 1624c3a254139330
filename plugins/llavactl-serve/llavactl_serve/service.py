"""The model behind the endpoint: admits requests, prepares prompts, starts answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llavactl import Batcher, ConversationError, DataError, Sampling

from .answers import Answer
from .errors import RATE_LIMIT, ApiError, shutting_down
from .parsing import ChatRequest, parse

log = logging.getLogger("llavactl.serve")

RETRY_AFTER_S = 1
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Settings:
    """Options of the command ``llavactl serve``.

    ``model`` is the model's name in requests; ``local``: only programs on this machine can connect.
    """

    model: str
    token: str | None = None
    cors: tuple[str, ...] = ()
    max_queue: int = 32
    max_body_bytes: int = 32 << 20
    max_new_tokens: int = 512
    timeout_s: float = 600.0
    allow_urls: bool = False
    local: bool = False


@dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the model."""

    chat: ChatRequest
    prompt: Any
    sampling: Sampling


class Service:
    """Answers with ``batcher``. Its methods run in the event loop, except ``prepare``."""

    def __init__(self, batcher: Batcher, settings: Settings) -> None:
        self.batcher, self.settings = batcher, settings
        self.created = int(time.time())
        self.answers: set[Answer] = set()
        self.stopping = False
        # Two threads: one long request doesn't delay all others, and few images are decoded at once.
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")

    def admit(self) -> Answer:
        """A slot for a new answer; there are ``max_batch`` for running and ``max_queue`` for waiting requests.

        Raises:
            ApiError: no slot is free, or the server is shutting down.
        """
        if self.stopping:
            raise shutting_down()
        if len(self.answers) >= self.batcher.max_batch + self.settings.max_queue:
            raise ApiError(
                429,
                f"{len(self.answers)} requests are being answered or waiting; try again later",
                code="queue_full",
                kind=RATE_LIMIT,
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        answer = Answer(self.answers.discard)
        self.answers.add(answer)
        return answer

    def stop(self) -> None:
        """Ends all answers, and refuses further requests."""
        self.stopping = True
        for answer in tuple(self.answers):
            answer.cancel(shutting_down())
        self.batcher.close(wait=False)
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def health(self) -> dict[str, Any]:
        """The state of the queue; requests that are being prepared count as waiting."""
        running = self.batcher.running
        return {
            "status": "stopping" if self.stopping else "ok",
            "model": self.settings.model,
            "queue_length": max(len(self.answers) - running, 0),
            "running": running,
        }

    async def prepared(self, body: bytes) -> PreparedRequest:
        """The request in ``body``, parsed and tokenized in another thread.

        Raises:
            ApiError: it is invalid.
        """
        return await asyncio.get_running_loop().run_in_executor(self._preparing, self.prepare, body)

    def prepare(self, body: bytes) -> PreparedRequest:
        settings, assistant = self.settings, self.batcher.assistant
        chat = parse(body, allow_urls=settings.allow_urls, check_images=self._check_images)
        if chat.model is not None and chat.model != settings.model:
            raise model_not_found(chat.model)
        context = self.batcher.context_length
        try:
            if context is not None and (tokens := assistant.min_tokens(chat.turns)) >= context:
                raise context_exceeded(context, tokens, "at least, in the messages")
            prompt = assistant.prompt(chat.turns)
        except (ConversationError, DataError) as error:
            raise ApiError(400, f"messages: {error.message}", param="messages", code="invalid_conversation") from None
        own = assistant.sampling
        return PreparedRequest(
            chat,
            prompt,
            Sampling(
                self._limit(len(prompt), chat.max_tokens),
                _temperature(own.temperature if chat.temperature is None else chat.temperature),
                own.top_p if chat.top_p is None else chat.top_p,
                secrets.randbits(63) if chat.seed is None else chat.seed,
            ),
        )

    def _check_images(self, images: int) -> None:
        context, tokens = self.batcher.context_length, images * self.batcher.assistant.encoding.image_tokens
        if context is not None and tokens >= context:
            raise context_exceeded(context, tokens, f"{images} images")

    def _limit(self, prompt: int, wanted: int | None) -> int:
        """The most tokens of an answer to a prompt of ``prompt`` tokens."""
        context = self.batcher.context_length
        if context is None:
            return wanted or self.settings.max_new_tokens
        if prompt + (wanted or 1) > context:
            detail = f"{prompt} in the messages" + (f", {wanted} in the answer" if wanted else "")
            raise context_exceeded(context, prompt + (wanted or 0), detail)
        return wanted or min(self.settings.max_new_tokens, context - prompt)


def _temperature(value: float) -> float:
    """``value``, or 0 (greedy decoding) if logits divided by it could overflow."""
    return value if value >= MIN_TEMPERATURE else 0.0


def context_exceeded(context: int, tokens: int, detail: str) -> ApiError:
    return ApiError(
        400,
        f"the model's context is {context} tokens, but the request has {tokens} ({detail}); "
        "shorten the messages or reduce max_tokens",
        param="messages",
        code="context_length_exceeded",
    )


def model_not_found(model: str) -> ApiError:
    return ApiError(
        404, f"model {model[:200]!r} not found; GET /v1/models lists it", param="model", code="model_not_found"
    )
