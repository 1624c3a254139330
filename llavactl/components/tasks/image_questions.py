"""User turns with an image and a question, and a check that stored answers belong to these questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from llavactl.components.sources.llava_record import place_images
from llavactl.core.errors import DataError
from llavactl.core.schema import Answer, ImageRef, Turn
from llavactl.files.records import Record
from llavactl.images.references import ImageRoot, image_in

IMAGES_HELP = "folder, .zip, .tar or URL of the images; null: the folder of the questions"
"""Description of the option ``images``."""

UNKNOWN = "Unknown"
"""The prompt that LLaVA's ``eval_science_qa.py`` stores for a missing answer."""


def image_of(record: Record, root: ImageRoot) -> ImageRef:
    """The record's ``image``: a path in ``root`` (a folder, archive or URL), or the image itself as base64."""
    try:
        return image_in(root, record.text("image"))
    except DataError as error:
        raise DataError(f"{record.where}: {error.message}", hint=error.hint) from error


def user_turn(image: ImageRef | None, text: str) -> tuple[Turn, ...]:
    """A user turn: the image, then the question. An ``<image>`` tag in the text sets another position."""
    images = [] if image is None else [image]
    return (Turn("user", place_images([text], images, named=False)[0]),)


def contains_question(prompt: str, question: str) -> bool:
    """Whether ``prompt`` contains ``question``, ignoring case and whitespace."""
    return _normalized(question) in _normalized(prompt)


def contains_words(prompt: str, question: str) -> bool:
    """Whether ``prompt`` contains all words of ``question`` in any order, such as the context after the question."""
    return set(_words(question)) <= set(_words(prompt))


def check_prompts(
    questions: Mapping[str, str],
    answers: Mapping[str, Answer],
    matches: Callable[[str, str], bool] = contains_question,
) -> None:
    """Compares stored prompts of ``answers`` with ``questions`` (texts by id): equal ids don't prove that they match.

    Raises:
        DataError: the prompt of an answer doesn't match its question.
    """
    prompts = {name: stored_prompt(answers[name]) for name in questions if name in answers}
    mismatched = [
        name
        for name, prompt in prompts.items()
        if isinstance(prompt, str) and prompt != UNKNOWN and not matches(prompt, questions[name])
    ]
    if mismatched:
        first = mismatched[0]
        raise DataError(
            f"{len(mismatched)} of {len(prompts)} answers have the prompt of another question; the first is "
            f"{first!r}: its prompt is {prompts[first]!r:.60}, the question is {questions[first]!r:.60}",
            hint="use the question file that the answers were generated for",
        )


def stored_prompt(answer: Answer) -> object:
    """The prompt stored with an answer; None if there is none."""
    return answer.extra.get("prompt", answer.extra.get("question"))


def unmatched_id(answer: Answer, prompt: str) -> str:
    """An id for an answer to an unknown question, in files where ``question_id`` is the image's name.

    It is unique per prompt: two such answers about one image are not duplicates.
    """
    return f"{answer.id}: {prompt}"


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
