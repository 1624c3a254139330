"""Questions about images: VQAv2, OK-VQA, GQA, A-OKVQA, OCR-VQA and TextCaps."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from llavactl import DataError, RecipePath
from llavactl_sources.academic import (
    FAULTS,
    SHORT_ANSWER,
    AcademicOptions,
    AcademicSource,
    Entry,
    UnusableError,
    capitalized,
    list_in,
    named_by_id,
    problem_entry,
    read_json,
    seeded,
    text_of,
)

_COCO = "{:012d}.jpg"


class VqaOptions(AcademicOptions):
    """Options of the source ``vqa``."""

    questions: RecipePath = Field(description="VQAv2's or OK-VQA's questions (JSON)")
    annotations: RecipePath = Field(description="VQAv2's or OK-VQA's annotations (JSON)")
    image: str = Field(_COCO, description="file name of an image; {} stands for its image_id")


class Vqa(AcademicSource):
    """VQAv2 and OK-VQA. The answer is VQAv2's ``multiple_choice_answer``, else the most frequent of the answers."""

    instruction = SHORT_ANSWER

    def __init__(self, options: VqaOptions) -> None:
        super().__init__(options, options.questions, options.annotations)
        self.options = options

    def entries(self) -> Iterator[Entry]:
        annotations = {}
        for row in list_in(self.options.annotations, "annotations"):
            if isinstance(row, Mapping) and "question_id" in row:
                annotations[row["question_id"]] = row
        for number, row in enumerate(list_in(self.options.questions, "questions")):
            try:
                if row["question_id"] not in annotations:
                    raise ValueError("no annotation")
                answer = _answer(annotations[row["question_id"]])
                image = named_by_id(self.options.image, row["image_id"])
                yield Entry(str(row["image_id"]), image, text_of(row["question"], "question"), capitalized(answer))
            except FAULTS as error:
                yield problem_entry(row, "question_id", number, error)


def _answer(annotation: Mapping[str, Any]) -> str:
    """The first of equally frequent answers, so that it doesn't depend on anything else."""
    if annotation.get("multiple_choice_answer"):
        return text_of(annotation["multiple_choice_answer"], "multiple_choice_answer")
    answers = Counter(text_of(answer["answer"], "answer") for answer in annotation["answers"])
    if not answers:
        raise UnusableError("no answers")
    return answers.most_common(1)[0][0]


class GqaOptions(AcademicOptions):
    """Options of the source ``gqa``."""

    questions: RecipePath = Field(description="train_balanced_questions.json")


class Gqa(AcademicSource):
    """GQA's questions with their short answers."""

    instruction = SHORT_ANSWER

    def __init__(self, options: GqaOptions) -> None:
        super().__init__(options, options.questions)

    def entries(self) -> Iterator[Entry]:
        document = read_json(self.files[0])
        if not isinstance(document, dict):
            raise DataError(f"{self.files[0]}: expected an object with a question per key")
        for number, (key, row) in enumerate(document.items()):
            try:
                image = text_of(row["imageId"], "imageId")
                answer = capitalized(text_of(row["answer"], "answer"))
                yield Entry(image, f"{image}.jpg", text_of(row["question"], "question"), answer)
            except FAULTS as error:
                yield problem_entry({"question": key}, "question", number, error)


class AOkvqaOptions(AcademicOptions):
    """Options of the source ``a-okvqa``."""

    questions: RecipePath = Field(description="aokvqa_v1p0_train.json")
    image: str = Field(_COCO, description="file name of an image; {} stands for its image_id")
    rotate: bool = Field(True, description="true: as many copies of a question as choices, each in another order")


class AOkvqa(AcademicSource):
    """A-OKVQA's multiple choice. Copy n has the choices rotated by n, so that each letter is the answer equally often.

    Copies of an image's questions are separate conversations.
    """

    instruction = "Answer with the option's letter from the given choices directly."

    def __init__(self, options: AOkvqaOptions) -> None:
        super().__init__(options, options.questions)
        self.options = options

    def entries(self) -> Iterator[Entry]:
        for number, row in enumerate(list_in(self.files[0])):
            try:
                yield from self._copies(row)
            except FAULTS as error:
                yield problem_entry(row, "question_id", number, error)

    def _copies(self, row: Mapping[str, Any]) -> list[Entry]:
        question, right = text_of(row["question"], "question"), row["correct_choice_idx"]
        choices = [text_of(choice, "choices") for choice in row["choices"]]
        if type(right) is not int or not 0 <= right < len(choices) <= len(string.ascii_uppercase):
            raise ValueError(f"`correct_choice_idx`: {right!r:.40} of {len(choices)} choices")
        image = named_by_id(self.options.image, row["image_id"])
        copies = []
        for copy in range(len(choices) if self.options.rotate else 1):
            rotated = choices[copy:] + choices[:copy]
            lines = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, rotated, strict=False)]
            letter = string.ascii_uppercase[(right - copy) % len(choices)]
            copies.append(Entry(f"{row['image_id']}-{copy}", image, "\n".join([question, *lines]), letter))
        return copies


class OcrVqaOptions(AcademicOptions):
    """Options of the source ``ocr-vqa``."""

    questions: RecipePath = Field(description="dataset.json")
    split: int = Field(1, ge=1, le=3, description="1: training, 2: validation, 3: test")
    sample: int | None = Field(None, gt=0, description="books, selected at random; null: all. LLaVA's mix has 80000")
    seed: int = Field(0, description="selects the books")


class OcrVqa(AcademicSource):
    """OCR-VQA: questions about the covers of books. Images are named by the book's id, with the suffix .jpg."""

    instruction = SHORT_ANSWER

    def __init__(self, options: OcrVqaOptions) -> None:
        super().__init__(options, options.questions)
        self.options = options

    def entries(self) -> Iterator[Entry]:
        document = read_json(self.files[0])
        if not isinstance(document, dict):
            raise DataError(f"{self.files[0]}: expected an object with a book per key")
        for number, (key, book) in enumerate(document.items()):
            try:
                if book["split"] != self.options.split:
                    continue
                pairs = list(zip(book["questions"], book["answers"], strict=True))
            except FAULTS as error:
                yield problem_entry({"book": key}, "book", number, error)
                continue
            for question, answer in pairs:
                try:
                    yield Entry(key, f"{key}.jpg", text_of(question, "questions"), text_of(answer, "answers"))
                except FAULTS as error:
                    yield problem_entry({"book": key}, "book", number, error)

    def selected(self, by_key: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
        if self.options.sample is None or self.options.sample >= len(by_key):
            return by_key
        kept = set(seeded(self.options.seed, "ocr-vqa").sample(sorted(by_key), self.options.sample))
        return {key: entries for key, entries in by_key.items() if key in kept}


class TextcapsOptions(AcademicOptions):
    """Options of the source ``textcaps``."""

    captions: RecipePath = Field(description="TextCaps_0.1_train.json")
    ocr: RecipePath = Field(description="TextVQA_Rosetta_OCR_v0.2_train.json")


class Textcaps(AcademicSource):
    """TextCaps: the first caption of each image, with the text that Rosetta read in it."""

    def __init__(self, options: TextcapsOptions) -> None:
        super().__init__(options, options.captions, options.ocr)

    def entries(self) -> Iterator[Entry]:
        tokens = {}
        for row in list_in(self.files[1], "data"):
            if isinstance(row, Mapping) and isinstance(row.get("ocr_tokens"), list):
                tokens[row.get("image_id")] = row["ocr_tokens"]
        seen = set()
        for number, row in enumerate(list_in(self.files[0], "data")):
            try:
                key = text_of(row["image_id"], "image_id")
                if key in seen:
                    continue
                if key not in tokens:
                    raise ValueError(f"no `ocr_tokens` of the image {key}")
                caption = text_of(row["caption_str"], "caption_str")
                read = ", ".join(map(str, tokens[key]))
            except FAULTS as error:
                yield problem_entry(row, "caption_id", number, error)
            else:
                seen.add(key)
                question = f"Provide a one-sentence caption for the provided image.\nReference OCR token: {read}"
                yield Entry(key, f"{key}.jpg", question, caption)
