"""What an OpenAI-style endpoint sends back, right or wrong: a reply, or what its absence means for the rest.

Nothing in an answer is trusted: neither its status, its types nor its text.
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
SHOWN = 300

_TOO_LONG = re.compile(r"context|too (long|large|many tokens)|maximum .{0,40}(tokens|length)|prompt length", re.I)
_NO_MONEY = re.compile(r"insufficient_quota|insufficient (quota|credit|balance|fund)|billing|payment required", re.I)
_KEY_HINT = "the key is read from the environment variable that `teacher.key_env` names"


def read(status: int, body: bytes, retry_after: str | None = None) -> Reply:
    """The reply in the ``body`` of an answer to ``/chat/completions``.

    Raises:
        TeacherError: there is none; ``then`` says what it means.
    """
    document = _json(body)
    error = document.get("error") if isinstance(document, dict) else None
    if status == 200 and error:
        raise refusal(_meant(error), *_told(error, document, body), retry_after, paid=True)
    if status != 200:
        raise refusal(status, *_told(error, document, body), retry_after)
    return _reply(document, body)


def refusal(
    status: int, message: str, code: str, retry_after: str | None = None, *, paid: bool = False
) -> TeacherError:
    """What an answer that holds no reply means."""
    said = f"the endpoint answers {status}: {message}"
    if status == 402 or _NO_MONEY.search(f"{code} {message}"):
        return TeacherError(said, hint="what was answered is kept; pay, then run this again", then="stop")
    if status in (400, 413, 422) and _TOO_LONG.search(f"{code} {message}"):
        return TeacherError(f"too long for the model: {message}", hint="shorter prompts, or a model with more context")
    if status in BUSY or status >= 500:
        return TeacherError(said, then="again", wait_s=seconds(retry_after), paid=paid)
    if status in (401, 403):
        return TeacherError(said, hint=_KEY_HINT, then="stop")
    if status < 400 or status in (404, 405):
        return TeacherError(said, hint="`base_url` ends where /chat/completions begins; is `model` right?", then="stop")
    return TeacherError(said)


def seconds(retry_after: str | None) -> float | None:
    """A ``Retry-After`` header, seconds or a date, as seconds from now; None when it says nothing."""
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


def _meant(error: Any) -> int:
    """The status that an endpoint should have answered in place of 200: some say it in the body."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 503


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError, as are numbers of 5,000 digits
        return None


def _told(error: Any, document: Any, body: bytes) -> tuple[str, str]:
    """(message, code) of an answer that says what is wrong, in one of the ways that endpoints have."""
    told = error if error else document
    if isinstance(told, dict):
        message = told.get("message") or told.get("detail") or told.get("error") or told
        return _short(str(message)), _short(f"{told.get('code') or ''} {told.get('type') or ''}")
    return _short(str(told) if told else body[:SHOWN].decode("utf-8", "replace") or "nothing"), ""


def _short(text: str) -> str:
    """One line of printable text."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text[: 2 * SHOWN]).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _reply(document: Any, body: bytes) -> Reply:
    try:
        choice = document["choices"][0]
        text = _text(choice["message"]["content"])
    except (KeyError, IndexError, TypeError):
        # It may have been paid for, but there is nothing to keep.
        shown = _short(body[:SHOWN].decode("utf-8", "replace"))
        raise TeacherError(f"the endpoint answers 200 without a reply: {shown}", then="again", paid=True) from None
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    finish = choice.get("finish_reason")
    return Reply(
        text=text.encode("utf-8", "replace").decode(),  # half a surrogate can't be written to any file
        # No prompt has no tokens, and no text: an endpoint that says so doesn't count, and would look free.
        tokens_in=_count(usage.get("prompt_tokens")) or None,
        tokens_out=_count(usage.get("completion_tokens")) or (None if text else 0),
        finish=_short(finish)[:40] if isinstance(finish, str) else "stop",
    )


def _text(content: Any) -> str:
    """Text, or the texts of its parts; nothing (null) is a reply too: an empty one, that was paid for."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part["text"]) for part in content if isinstance(part, Mapping) and part.get("type") == "text")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 10**9 else None
