"""Records of other tools as LLaVA's: ``{"id", "images", "conversations": [{"from", "value"}, …]}``.

Only the form is converted. Roles, turns, tags and media are then checked by llavactl's rules for LLaVA's records, so
``<image>`` means the same in every form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

TAG = "<image>"
CAPTION_QUESTION = "Describe the image briefly."
"""The question whose answer is a caption; llavactl's template of stage 1 omits it."""

Form = Literal["auto", "sharegpt", "ms-swift", "llama-factory", "trl"]

_KEYS: Mapping[str, Sequence[str]] = {
    "auto": ("conversations", "messages", "texts", "query", "prompt", "question", "caption"),
    "sharegpt": ("conversations",),
    "ms-swift": ("messages", "conversations", "query"),
    "llama-factory": ("messages", "conversations"),
    "trl": ("messages", "prompt"),
}
"""The keys of a conversation; the first with a value is read."""

CONVERSATION_KEYS = _KEYS["auto"]
COMPANION_KEYS = ("system", "response", "history", "completion", "answer")
"""Keys that belong to one of ``CONVERSATION_KEYS``."""

_WITH_PARTS = ("auto", "ms-swift", "trl")
_ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "bing": "gpt",
    "bard": "gpt",
    "system": "system",
}
_GROUNDING = ("<bbox>", "<ref-object>")
"""ms-swift replaces these by the record's ``objects``."""

Message = dict[str, Any]


class RecordError(Exception):
    """Why a record can't be converted: a kind of ``llavactl data check`` and a description."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def llava_record(record: Any, form: Form = "auto") -> dict[str, Any]:
    """``record`` in LLaVA's form; keys without a meaning in ``form`` are kept. ``record`` is not modified.

    Raises:
        RecordError: the record isn't in this form.
    """
    if not isinstance(record, Mapping):
        raise RecordError("record", f"expected an object, got {record!r:.60}")
    key = _conversation_key(record, form)
    messages, named = _conversation(record, key, form)
    consumed = {key, *_COMPANIONS.get(key, ()), "system"}
    converted = {name: value for name, value in record.items() if name not in consumed}
    for name in ("image", "images"):
        if name in converted:
            converted[name] = _names(converted[name])
    if named:
        if converted.get("image") or converted.get("images"):
            raise RecordError("record", "images in content parts and in `image` or `images`")
        converted = {**converted, "image": None, "images": named}
    messages = _with_system(messages, record.get("system"))
    if record.get("objects") and (found := _first_in(messages, _GROUNDING)):
        raise RecordError("placeholder", f"{found} stands for one of `objects`, which are not read")
    return {**converted, "conversations": messages}


_COMPANIONS = {"query": ("response", "history"), "prompt": ("completion",), "question": ("answer",)}


def _conversation_key(record: Mapping[str, Any], form: Form) -> str:
    present = [key for key in _KEYS[form] if record.get(key) is not None]
    if len({"conversations", "messages"} & set(present)) > 1:
        raise RecordError("record", "both `conversations` and `messages`")
    if not present:
        keys = ", ".join(map(str, record)) or "none"
        raise RecordError("record", f"missing `{'`, `'.join(_KEYS[form])}`; keys: {keys:.100}")
    return present[0]


def _conversation(record: Mapping[str, Any], key: str, form: Form) -> tuple[list[Message], list[str]]:
    """The messages under ``key``, and the images that content parts name."""
    value = record[key]
    if form == "auto" and isinstance(value, list) and value and all(map(_is_pair, value)):
        return [message for pair in value for message in _pair(pair, "user", "assistant")], []
    if key == "query":
        earlier = [message for pair in _list(record.get("history") or [], "history") for message in _history(pair)]
        return [*earlier, *_pair(record, "query", "response")], []
    if key == "question":
        return _pair(record, "question", "answer"), []
    if key == "caption":
        images = record.get("image") or record.get("images")
        if not images:
            raise RecordError("record", "a caption without an image")
        tags = f"{TAG}\n" * (len(images) if isinstance(images, list) else 1)
        return [_message("human", tags + CAPTION_QUESTION), _message("gpt", _text(value, key))], []
    if key == "prompt":
        if isinstance(value, str):
            return _pair(record, "prompt", "completion"), []
        value = [*_list(value, key), *_list(record.get("completion"), "completion")]
    part_images: list[str | None] = []
    messages = [_converted(message, form, part_images) for message in _list(value, key)]
    if None in part_images and any(part_images):
        raise RecordError("tags", "some image parts name an image, others don't")
    if part_images and not any(part_images) and not (record.get("image") or record.get("images")):
        raise RecordError("tags", f"{len(part_images)} image parts, but no image")
    return messages, [name for name in part_images if name is not None]


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise RecordError("record", f"`{key}` is not a list")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RecordError("message", f"`{key}`: expected a string, got {value!r:.60}")
    return value


def _message(role: str, text: str) -> Message:
    return {"from": role, "value": text}


def _pair(value: Any, question: str, answer: str) -> list[Message]:
    if not isinstance(value, Mapping):
        raise RecordError("message", f"expected an object with `{question}` and `{answer}`, got {value!r:.60}")
    return [_message("human", _text(value.get(question), question)), _message("gpt", _text(value.get(answer), answer))]


def _is_pair(value: Any) -> bool:
    return isinstance(value, Mapping) and "user" in value and "assistant" in value


def _history(pair: Any) -> list[Message]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise RecordError("message", f"`history`: expected a question and an answer, got {pair!r:.60}")
    return _pair({"query": pair[0], "response": pair[1]}, "query", "response")


def _converted(message: Any, form: Form, images: list[str | None]) -> Message:
    """``message`` in LLaVA's form; adds the images of its parts to ``images``, None for one without a name."""
    if not isinstance(message, Mapping):
        raise RecordError("message", f"expected an object, got {message!r:.60}")
    role_key, text_key = ("role", "content") if message.get("role") is not None else ("from", "value")
    role, content = message.get(role_key), message.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError("role", f"unknown `{role_key}` {role!r:.40}, expected one of {', '.join(_ROLES)}")
    if isinstance(content, list) and form in _WITH_PARTS:
        content = "".join(_parts_text(content, _ROLES[role], images))
    others = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "from", "value") and value is not None
    }
    return {**others, **_message(_ROLES[role], _text(content, text_key))}


def _parts_text(parts: Sequence[Any], role: str, images: list[str | None]) -> Iterator[str]:
    """The text of ``parts``, with a tag and a line break for each image, as in LLaVA's data."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text = _text(part.get("text"), "text")
            if role == "human" and TAG in text:
                raise RecordError("tags", f"{TAG} in the text of a content part")
            yield text
        elif kind in ("image", "image_url"):
            if role != "human":
                raise RecordError("message", "an image in a message that isn't the user's")
            images.append(_part_image(part))
            yield f"{TAG}\n"
        elif isinstance(kind, str):
            raise RecordError("media", f"a content part of type {kind!r:.40}")
        else:
            raise RecordError("message", f"a content part without `type`: {part!r:.60}")


def _part_image(part: Mapping[str, Any]) -> str | None:
    """The path, URL or base64 that an image part names; None if it stands for the next of the record's images."""
    for key in ("image", "path", "url", "image_url", "base64"):
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("url") or value.get("path")
        if value is not None:
            return _text(value, key)
    return None


def _names(value: Any) -> Any:
    """The images of ``image`` or ``images``; objects with a path, or with bytes as base64, become strings."""
    if isinstance(value, list):
        return [_name(item) for item in value]
    return _name(value)


def _name(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    name = value.get("bytes") or value.get("path") or value.get("url")
    return name if isinstance(name, str) else value


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if system is None or system == "":
        return messages
    prompt = _message("system", _text(system, "system"))
    if messages and messages[0]["from"] == "system":
        if messages[0]["value"] != system:
            raise RecordError("message", "`system` differs from the first message")
        return messages
    return [prompt, *messages]


def _first_in(messages: Sequence[Message], texts: Sequence[str]) -> str:
    return next((text for message in messages for text in texts if text in message["value"]), "")
