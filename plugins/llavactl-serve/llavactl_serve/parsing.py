"""Validates the body of a chat-completion request and converts its messages to a conversation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from llavactl import Content, DataError, Role, Turn

from .errors import ApiError
from .images import image_at

IGNORED = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "store",
    "service_tier",
    "parallel_tool_calls",
)
"""Accepted parameters without effect on the answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Unsupported parameters with the values that have no effect, besides null."""

ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
_MAX_VALUES = 1_000_000
"""In a JSON document: millions of empty lists need far more memory than their text."""

T = TypeVar("T")


@dataclass(frozen=True)
class ChatRequest:
    """A valid request; None stands for the model's default."""

    turns: tuple[Turn, ...]
    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(data: bytes, *, allow_urls: bool, check_images: Callable[[int], object]) -> ChatRequest:
    """The request in the JSON ``data``; ``check_images`` gets the number of images before the first one is decoded.

    Raises:
        ApiError: the request is invalid, or needs a feature that is not supported.
    """
    body = Fields(_document(data))
    limits = [body.integer(name, 1) for name in ("max_completion_tokens", "max_tokens")]
    stream = bool(body.boolean("stream"))
    options = body.mapping("stream_options")
    if options is not None and not stream:
        _refuse("stream_options", "stream_options requires stream: true", "invalid_value")
    include_usage = options is not None and bool(options.boolean("include_usage"))
    if options is not None:
        options.refuse_others({"include_obfuscation": (False,)})
    request = ChatRequest(
        (),
        body.string("model"),
        next((limit for limit in limits if limit is not None), None),
        body.number("temperature", 0, MAX_TEMPERATURE),
        body.number("top_p", 0, 1, above=True),
        body.integer("seed", -MAX_SEED - 1, MAX_SEED),
        _stops(body),
        stream,
        include_usage,
    )
    messages = body.list("messages")
    body.refuse_others(NEUTRAL, IGNORED)
    turns = _turns(messages, allow_urls, check_images)
    return replace(request, turns=turns)


def _document(data: bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ApiError(400, f"the body has more than {_MAX_VALUES:,} values", code="invalid_json")
    try:
        document = json.loads(data, parse_constant=refuse_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return document


def _refuse(param: str, message: str, code: str) -> NoReturn:
    raise ApiError(400, message, param=param, code=code)


class Fields:
    """The fields of a JSON object at ``where``; null counts as absent."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self.where = f"{where}." if where else ""
        self.values = {name: value for name, value in values.items() if value is not None}
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        self.read.add(name)
        return self.values.get(name)

    def _typed(self, name: str, kind: type[T], expected: str) -> T | None:
        value = self.get(name)
        if value is not None and not isinstance(value, kind):
            self.refuse(name, f"expected {expected}, got {_type_name(value)}", "invalid_type")
        return value

    def refuse(self, name: str, why: str, code: str = "invalid_value") -> NoReturn:
        _refuse(f"{self.where}{name}", f"{self.where}{name}: {why}", code)

    def string(self, name: str) -> str | None:
        return self._typed(name, str, "a string")

    def boolean(self, name: str) -> bool | None:
        return self._typed(name, bool, "a boolean")

    def list(self, name: str) -> list[Any]:
        """Raises an ApiError if it is absent or empty."""
        values = self._typed(name, list, "a list")
        if not values:
            self.refuse(name, "expected at least one element" if values == [] else "required", "missing_required")
        return values

    def mapping(self, name: str) -> Fields | None:
        values = self._typed(name, dict, "an object")
        return None if values is None else Fields(values, f"{self.where}{name}")

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self.refuse(name, f"expected an integer, got {_type_name(value)}", "invalid_type")
        if value is not None and (value < low or (high is not None and value > high)):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            self.refuse(name, f"expected an integer {bounds}", "invalid_value")
        return value

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number from ``low`` (or, with ``above``, greater than it) to ``high``."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"expected a number, got {_type_name(value)}", "invalid_type")
        if not low <= value <= high or (above and value == low) or not math.isfinite(value):
            self.refuse(name, f"expected a number {'above' if above else 'from'} {low} to {high}", "invalid_value")
        return float(value)

    def refuse_others(self, neutral: Mapping[str, tuple[Any, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Raises an ApiError for a field that wasn't read, unless it is ignored or has a neutral value."""
        for name, value in self.values.items():
            if name in self.read or name in ignored or any(_equal(value, each) for each in neutral.get(name, ())):
                continue
            if name in neutral:
                values = " or ".join(json.dumps(each) for each in neutral[name])
                self.refuse(name, f"only {values} is supported", "unsupported_parameter")
            self.refuse(name, "unknown or unsupported parameter", "unsupported_parameter")


def _equal(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _type_name(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _stops(body: Fields) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        body.refuse("stop", "expected a string or a list of strings", "invalid_type")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        body.refuse(
            "stop", f"expected at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters", "invalid_value"
        )
    return tuple(stops)


def _turns(messages: list[Any], allow_urls: bool, check_images: Callable[[int], object]) -> tuple[Turn, ...]:
    """The conversation of ``messages``; leading system messages are joined."""
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    check_images(sum(isinstance(part, _ImageUrl) for _, parts in parsed for part in parts))
    images: dict[str, Content] = {}
    turns: list[Turn] = []
    system: list[str] = []
    for index, (role, parts) in enumerate(parsed):
        if role == "system":
            if turns:
                why = f"messages[{index}]: a system message must be at the start"
                _refuse(f"messages[{index}].role", why, "invalid_conversation")
            system += [part for part in parts if isinstance(part, str)]
            continue
        for part in parts:
            if isinstance(part, _ImageUrl) and part.url not in images:
                images[part.url] = image_at(part.url, part.where, allow_urls=allow_urls)
        content = [images[part.url] if isinstance(part, _ImageUrl) else part for part in parts]
        turns.append(_turn(role, tuple(content), index))
    if not turns or turns[-1].role != "user":
        _refuse("messages", "messages: the last message must be from the user", "invalid_conversation")
    return (*([_turn("system", ("\n\n".join(system),), 0)] if system else []), *turns)


def _turn(role: Role, content: tuple[Content, ...], index: int) -> Turn:
    """A turn with one part per line, like images and questions in training."""
    separated = tuple(part for item in content for part in ("\n", item))[1:]
    try:
        return Turn(role, separated)
    except DataError as error:
        _refuse(f"messages[{index}].content", f"messages[{index}]: {error.message}", "invalid_value")


@dataclass(frozen=True)
class _ImageUrl:
    url: str
    where: str


def _message(message: Any, where: str) -> tuple[Role, list[str | _ImageUrl]]:
    if not isinstance(message, dict):
        _refuse(where, f"{where}: expected an object, got {_type_name(message)}", "invalid_type")
    fields = Fields(message, where)
    role, content = fields.string("role"), fields.get("content")
    if role is None or role not in ROLES:
        fields.refuse("role", f"expected one of {', '.join(ROLES)}", "invalid_value")
    fields.refuse_others({"tool_calls": ([],), "annotations": ([],)}, ("name",))
    if isinstance(content, str):
        return ROLES[role], [content] if content else []
    if not isinstance(content, list):
        fields.refuse("content", "expected a string or a list of parts", "invalid_type")
    parts = [_part(part, f"{where}.content[{index}]", role == "user") for index, part in enumerate(content)]
    return ROLES[role], [part for part in parts if part != ""]


def _part(part: Any, where: str, images: bool) -> str | _ImageUrl:
    if not isinstance(part, dict):
        _refuse(where, f"{where}: expected an object, got {_type_name(part)}", "invalid_type")
    fields = Fields(part, where)
    kind = fields.string("type")
    if kind == "text":
        text = fields.string("text")
        fields.refuse_others({})
        return text if text is not None else fields.refuse("text", "required", "missing_required")
    if kind != "image_url":
        fields.refuse("type", "expected text or image_url", "unsupported_content")
    if not images:
        fields.refuse("type", "images are supported in user messages only", "unsupported_content")
    image = fields.mapping("image_url")
    url = None if image is None else image.string("url")
    if image is None or url is None:
        fields.refuse("image_url", "expected an object with the key url", "missing_required")
    image.refuse_others({}, ("detail",))
    fields.refuse_others({})
    return _ImageUrl(url, where)
