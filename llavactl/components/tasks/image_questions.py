"""Questions about one picture each, as tasks ask them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from llavactl.components.sources.llava_record import place_images
from llavactl.core.errors import DataError
from llavactl.core.schema import Answer, ImageRef, Turn
from llavactl.files.records import Record
from llavactl.images.references import ImageRoot, image_in


def picture(record: Record, place: ImageRoot) -> ImageRef:
    """The record's ``image``: a path in ``place`` (a folder, archives or a URL), or the image itself as base64."""
    try:
        return image_in(place, record.text("image"))
    except DataError as error:
        raise DataError(f"{record.where}: {error.message}", hint=error.hint) from error


def asked(image: ImageRef | None, text: str) -> tuple[Turn, ...]:
    """The user's turn: the image, or ``<image>`` in the question as its position, as in records; then the question."""
    images = [] if image is None else [image]
    return (Turn("user", place_images([text], images, named=False)[0]),)


UNKNOWN = "Unknown"
"""What LLaVA's ``eval_science_qa.py`` notes for the prompt of an answer that it doesn't have."""


def holds(prompt: str, question: str) -> bool:
    """Whether ``question`` stands in ``prompt``, whatever its spaces and capitals."""
    return _spaced(question) in _spaced(prompt)


def same_words(prompt: str, question: str) -> bool:
    """Whether all words of ``question`` are in ``prompt``, in whatever order: its parts may have changed places."""
    return set(_words(question)) <= set(_words(prompt))


def refuse_others(
    questions: Mapping[str, str], answers: Mapping[str, Answer], same: Callable[[str, str], bool] = holds
) -> None:
    """Stops where an answer's file says that something else was asked: ids alone may agree by chance.

    Raises:
        DataError: answers whose ``prompt`` isn't the ``same`` as the question, in ``questions`` by id.
    """
    said = {name: prompt_of(answers[name]) for name in questions if name in answers}
    wrong = [
        name
        for name, prompt in said.items()
        if isinstance(prompt, str) and prompt != UNKNOWN and not same(prompt, questions[name])
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(said)} answers are to other questions; the first is {wrong[0]!r}: it answers "
            f"{said[wrong[0]]!r:.60}, the question is {questions[wrong[0]]!r:.60}",
            hint="take the questions that these answers were given to",
        )


def prompt_of(answer: Answer) -> object:
    """What an answer's file says was asked; None where it doesn't."""
    return answer.extra.get("prompt", answer.extra.get("question"))


def beyond(answer: Answer, prompt: str) -> str:
    """An id for an answer to a question that isn't asked here, where its own id is a picture's.

    Two such answers about one picture are two answers, not the same one twice.
    """
    return f"{answer.id}: {prompt}"


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
