"""Parsing of responses of OpenAI-compatible endpoints into replies or errors.

Responses are untrusted: status, types and text are all validated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from llavactl.core.errors import TeacherError
from llavactl.core.protocols import Reply

BUSY = frozenset([408, 409, 425, 429])
MAX_SHOWN = 300

_TOO_LONG = re.compile(r"context|too (long|large|many tokens)|maximum .{0,40}(tokens|length)|prompt length", re.I)
_NO_MONEY = re.compile(r"insufficient_quota|insufficient (quota|credit|balance|fund)|billing|payment required", re.I)
_KEY_HINT = "the API key is read from the environment variable in `teacher.key_env`"


def read(status: int, body: bytes, retry_after: str | None = None) -> Reply:
    """The reply in the ``body`` of a response of ``/chat/completions``.

    Raises:
        TeacherError: the response has no reply; ``then`` is how to continue.
    """
    document = _json(body)
    error = document.get("error") if isinstance(document, dict) else None
    if status == 200 and error:
        raise response_error(_status_in(error), *_message(error, document, body), retry_after, paid=True)
    if status != 200:
        raise response_error(status, *_message(error, document, body), retry_after)
    return _reply(document, body)


def response_error(
    status: int, message: str, code: str, retry_after: str | None = None, *, paid: bool = False
) -> TeacherError:
    """The error for a response without a reply."""
    text = f"HTTP status {status}: {message}"
    if status == 402 or _NO_MONEY.search(f"{code} {message}"):
        return TeacherError(text, hint="add credit, then run the same command to resume", then="stop")
    if status in (400, 413, 422) and _TOO_LONG.search(f"{code} {message}"):
        return TeacherError(f"too long for the model: {message}", hint="use shorter prompts or a longer context")
    if status in BUSY or status >= 500:
        return TeacherError(text, then="again", wait_s=retry_after_s(retry_after), paid=paid)
    if status in (401, 403):
        return TeacherError(text, hint=_KEY_HINT, then="stop")
    if status < 400 or status in (404, 405):
        return TeacherError(text, hint="check `model`, and `base_url`: without /chat/completions", then="stop")
    return TeacherError(text)


def retry_after_s(retry_after: str | None) -> float | None:
    """The ``Retry-After`` header (seconds or a date) as seconds from now; None if it is missing or invalid."""
    if not retry_after:
        return None
    try:
        return max(0.0, min(float(retry_after), 1e9))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError, IndexError):
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _status_in(error: Any) -> int:
    """The status in an error object: some endpoints send errors with HTTP status 200."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 503


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError, as are numbers of 5,000 digits
        return None


def _message(error: Any, document: Any, body: bytes) -> tuple[str, str]:
    """(message, code) of an error response, in one of the common layouts."""
    content = error if error else document
    if isinstance(content, dict):
        message = content.get("message") or content.get("detail") or content.get("error") or content
        return _short(str(message)), _short(f"{content.get('code') or ''} {content.get('type') or ''}")
    return _short(str(content) if content else body[:MAX_SHOWN].decode("utf-8", "replace") or "empty response"), ""


def _short(text: str) -> str:
    """``text`` as one line of printable characters, truncated."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 2 * MAX_SHOWN]).split())
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"


def _reply(document: Any, body: bytes) -> Reply:
    try:
        choice = document["choices"][0]
        text = _text(choice["message"]["content"])
    except (KeyError, IndexError, TypeError):
        # It may have been charged, but contains nothing to store.
        shown = _short(body[:MAX_SHOWN].decode("utf-8", "replace"))
        raise TeacherError(f"HTTP status 200 without a reply: {shown}", then="again", paid=True) from None
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    finish = choice.get("finish_reason")
    return Reply(
        text=text.encode("utf-8", "replace").decode(),  # a lone surrogate can't be written to a file
        # An endpoint that reports 0 tokens for text doesn't count them; the request would look free.
        tokens_in=_count(usage.get("prompt_tokens")) or None,
        tokens_out=_count(usage.get("completion_tokens")) or (None if text else 0),
        finish=_short(finish)[:40] if isinstance(finish, str) else "stop",
    )


def _text(content: Any) -> str:
    """The text, or the joined text parts; null is an empty reply, which was charged, too."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part["text"]) for part in content if isinstance(part, Mapping) and part.get("type") == "text")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 10**9 else None
