"""The conversations that an export is verified with, and the prompts that its verification script reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.chat_template import render_text
from llavactl.components.formats.processor_text import separator
from llavactl.core.errors import ConversationError
from llavactl.core.schema import Turn
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.images.decode import decode

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef
    from llavactl.images.image_file import ImageFile

Conversation = tuple[Turn, ...]


def verification_conversations(images: Sequence[ImageFile], encoding: Encoding) -> list[Conversation]:
    """One question per image, then several turns, two images, a system turn, no image, and an image without text.

    Conversations that the template refuses (a system turn) or renders as an empty prompt (``plain``) are left out.
    """
    first, last = images[0], images[-1]
    conversations = [
        *((Turn("user", (image, "\n", "What is in this picture?")),) for image in images),
        (
            Turn("user", (first, "\n", "What is this?")),
            Turn("assistant", ("A picture.",)),
            Turn("user", ("Describe it in detail.",)),
        ),
        (Turn("user", (first, "\n", last, "\n", "What is the difference?")),),
        (Turn("system", ("Answer in one word.",)), Turn("user", (last, "\n", "Which color is most of it?"))),
        (Turn("user", ("How are you?",)),),
        (Turn("user", (first,)),),
    ]
    return [turns for turns in conversations if _has_prompt(encoding, turns)]


def _has_prompt(encoding: Encoding, turns: Conversation) -> bool:
    try:
        return bool(encoding.encode(arrange(turns, "first", ""), generate=True).ids)
    except ConversationError:
        return False


def save_images(conversations: Sequence[Conversation], folder: Path) -> dict[ImageRef, str]:
    """Saves every image as PNG in ``folder`` and returns the paths.

    They are saved as llavactl decodes them: how other programs apply an EXIF orientation is not compared.
    """
    paths: dict[ImageRef, str] = {}
    for image in {image for turns in conversations for turn in turns for image in turn.images}:
        paths[image] = str(folder / f"{len(paths)}.png")
        decode(image.read()).save(paths[image])
    return paths


def script_prompt(
    turns: Conversation, encoding: Encoding, processor_tokenizer: Any, image_paths: Mapping[ImageRef, str]
) -> dict[str, Any]:
    """A prompt as the verification script reads it; see ``script``.

    ``processor_tokenizer`` is the tokenizer of ``encoding`` with an image token.
    """
    render = partial(render_text, encoding.template, encoding.tokenizer, turns, True)
    return {
        "messages": [{"role": turn.role, "content": _content_parts(turn)} for turn in turns],
        "images": [image_paths[image] for turn in turns for image in turn.images],
        "text": render("<image>"),
        "processor_text": render(processor_tokenizer.image_token, partial(separator, processor_tokenizer)),
    }


def _content_parts(turn: Turn) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in turn.images), {"type": "text", "text": turn.text.strip()}]
