"""Conversations as JSON files, in the ``messages`` format that is also used for training data.

{"messages": [{"role": "user", "content": [{"type": "image", "image": "/photos/cat.jpg"},
                                           {"type": "text", "text": "\\nWhat is this?"}]},
              {"role": "assistant", "content": "A cat."}]}
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavactl.chat.inputs import OpenedImage, open_image
from llavactl.core.errors import DataError
from llavactl.core.locations import is_file_url, is_url, shortened
from llavactl.core.paths import write_json
from llavactl.core.schema import Content, ImageRef, Turn
from llavactl.images.decode import read

MAX_BYTES = 1 << 30
"""The largest conversation file that is loaded: it is read into memory with its images."""

_HINT = "`/save FILE` of chat writes such files"


def save_turns(file: Path, turns: Sequence[Turn], model: str = "") -> None:
    """Writes ``turns`` to ``file`` atomically. Image files are stored as absolute paths, other images as base64.

    Raises:
        OSError: it can't be written, or an image can't be read.
    """
    write_json(file, {"model": model, "messages": [_message(turn) for turn in turns]})


def load_turns(file: Path) -> list[Turn]:
    """The turns in ``file`` with their images, none of which may be a URL; image paths are relative to ``file``.

    Raises:
        DataError: not a conversation, or an image can't be read; names the message.
    """
    try:
        if file.exists() and not file.is_file():
            raise DataError(f"{file}: not a file", hint=_HINT)  # reading a pipe or a device may never end
        if (size := file.stat().st_size) > MAX_BYTES:
            raise DataError(f"{file}: {size:,} bytes, more than {MAX_BYTES:,}", hint=_HINT)
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    except RecursionError as error:
        raise DataError(f"{file}: the JSON is nested too deeply", hint=_HINT) from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}", hint=_HINT) from error
    messages = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(messages, list):
        raise DataError(f"{file}: `messages` is not a list of messages", hint=_HINT)
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        try:
            turns.append(_turn(message, file.parent))
        except DataError as error:
            raise DataError(f"{file}: message {number}: {error.message}", hint=error.hint or _HINT) from error
    check_order(turns, str(file))
    return turns


def check_order(turns: Sequence[Turn], where: str) -> None:
    """Raises a DataError unless ``turns`` are questions with their answers, after an optional system prompt."""
    roles = [turn.role for turn in turns]
    expected = ["system"] * (roles[:1] == ["system"])
    expected += ["user", "assistant"] * ((len(roles) - len(expected) + 1) // 2)
    for number, (role, wanted) in enumerate(zip(roles, expected, strict=False), 1):
        if role != wanted:
            raise DataError(f"{where}: message {number}: expected role {wanted}, got {role}", hint=_HINT)
    if roles[-1:] == ["user"]:
        raise DataError(f"{where}: the last question has no answer", hint="remove it, or add its answer")


def _message(turn: Turn) -> dict[str, Any]:
    if not turn.images:
        return {"role": turn.role, "content": turn.text}
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": _image_name(part)}
        for part in turn.content
    ]
    return {"role": turn.role, "content": parts}


def _image_name(image: ImageRef) -> str:
    if isinstance(image, OpenedImage) and image.file:
        return image.file
    return f"data:;base64,{base64.b64encode(read(image)).decode()}"


def _turn(message: Any, base: Path) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise DataError("expected a mapping with a `role`: system, user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(message["role"], (content,))
    if not isinstance(content, list):
        raise DataError("expected a string or a list of parts as `content`")
    return Turn(message["role"], tuple(_part(part, base) for part in content))


def _part(part: Any, base: Path) -> Content:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "image": str(name)}:
            # A file of somebody else must not make this machine request anything.
            if is_url(name) and not is_file_url(name):
                raise DataError(f"the image is a URL: {shortened(name)}", hint="download it, and name its file")
            return open_image(name, base)
    raise DataError('expected parts {"type": "text", "text": …} or {"type": "image", "image": …}')
