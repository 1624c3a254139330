"""``llavactl chat``: answers one question, a file of questions, or the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.chat.conversation import Conversation
<<<<<<< HEAD
from llavactl.chat.inputs import BatchRecord, user_content
from llavactl.chat.loading import load_assistant
from llavactl.core.schema import ImageRef, Turn
=======
from llavactl.chat.opening import open_assistant
from llavactl.components.sources.llava_record import image_names, names_images, place_images, unread_media
from llavactl.core.errors import DataError
from llavactl.core.locations import shortened
from llavactl.core.schema import Content, ImageRef, Turn
from llavactl.features.keys import error_reason
from llavactl.files.json_stream import JsonEntry, read_stream
from llavactl.images.decode import ImageError, decode
from llavactl.images.references import named_image
>>>>>>> main
from llavactl.model.folder import of_run
from llavactl.model.foreign import resolve
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.recipe.frame import Outline

BATCH_SIZE = 8


@dataclass(frozen=True)
class ChatReport:
    """One answer."""

    answer: str
    prompt: str
    images: tuple[str, ...]
    model: str


def open_chat(recipe: Outline | None, model: str | None = None, template: str | None = None) -> Conversation:
    """A conversation with ``model`` (in any format), else with the recipe's last finished stage."""
    if model is None:
        assert recipe is not None
        return Conversation(load_assistant(of_run(recipe.run_dir), template=template))
    return Conversation(load_assistant(resolve(model, recipe), template=template))


<<<<<<< HEAD
def answer_prompt(
    conversation: Conversation, prompt: str, images: Sequence[str | ImageRef], sampling: Sampling
) -> ChatReport:
    """Asks one question and returns the complete answer."""
    pieces = conversation.ask(*user_content(prompt, images), sampling=sampling)
=======
WANTED = "expected an image file (PNG, JPEG, WebP, …), its URL, or base64"


def open_images(names: Sequence[str], base: Path | None = None) -> list[ImageRef]:
    """The images that the user names: files relative to ``base`` (default: the working directory), URLs or base64.

    Raises:
        DataError: an image can't be read; raised before a model is loaded.
    """
    images = []
    for name in names:
        try:
            image = named_image(name, base)
            decode(image.read())
        except OSError as error:
            raise DataError(f"image {shortened(name)}: {error_reason(error)}", hint=WANTED) from error
        except ImageError as error:
            raise DataError(f"image {shortened(name)}: {error.reason}", hint=WANTED) from error
        images.append(image)
    return images


def content(
    prompt: str, images: Sequence[str | ImageRef], base: Path | None = None, *, named: bool = False
) -> tuple[Content, ...]:
    """The user's turn: the images, already opened or by name as in ``open_images``, then ``prompt``.

    ``<image>`` in ``prompt`` is an image's position, as in records: see ``place_images``.

    Raises:
        DataError: an image can't be read, or the tags don't fit the images.
    """
    opened = [ref for each in images for ref in (open_images([each], base) if isinstance(each, str) else [each])]
    return place_images([prompt], opened, named=named)[0]


def say(conversation: Conversation, prompt: str, images: Sequence[str | ImageRef], sampling: Sampling) -> ChatReport:
    """One question and its whole answer."""
    pieces = conversation.ask(*content(prompt, images), sampling=sampling)
>>>>>>> main
    answer = "".join(pieces).strip()
    names = tuple(image if isinstance(image, str) else image.name for image in images)
    return ChatReport(answer, prompt, names, conversation.assistant.name)


def answer_batch(assistant: Assistant, records: Sequence[BatchRecord], sampling: Sampling) -> list[dict[str, Any]]:
    """``records`` in order, each with its ``answer``."""
    answers: list[str] = []
    for start in range(0, len(records), BATCH_SIZE):
        conversations = [(Turn("user", content),) for _, content in records[start : start + BATCH_SIZE]]
        answers += assistant.answer(conversations, sampling)
    return [{**record, "answer": answer} for (record, _), answer in zip(records, answers, strict=True)]
