"""CHAIR: hallucinated objects in image descriptions (Rohrbach et al. 2018, arXiv 1809.02156)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from llavactl.components.tasks.coco_synonyms import CATEGORIES, mentioned_objects
from llavactl.components.tasks.image_questions import image_of, user_turn
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_document, read_records, unique
from llavactl.images.references import ImageRoot


class ChairOptions(Options):
    """Options of the task ``chair``."""

    instances: RecipePath = Field(description="COCO's instances_*.json")
    captions: RecipePath | None = Field(
        None, description="COCO's captions_*.json: objects mentioned in captions also count as present"
    )
    only: RecipePath | None = Field(None, description="JSONL of image_id: use these images only; null: all")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the images; null: the folder of `instances`"
    )
    follow_links: FollowLinks = False
    prompt: str = Field("Please describe this image in detail.", description="prompt for each image")


class Chair:
    """The task ``chair``; see ``llavactl.core.protocols.Task``. A question's id is the image's id."""

    protocols = ("words",)

    def __init__(self, options: ChairOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        root = ImageRoot(str(self.options.images or self.options.instances.parent), self.options.follow_links)
        for image_id, record in self._images.items():
            image = image_of(Record(record.where, {"image": record.text("file_name")}), root)
            reference = ", ".join(category for category in CATEGORIES if category in self._objects[image_id])
            yield Question(image_id, user_turn(image, self.options.prompt), reference)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """In percent: ``chair_s`` of descriptions with a hallucinated object, ``chair_i`` of mentioned objects.

        ``recall``: share of the objects in the images that are mentioned. ``named``: number of mentioned objects. A
        description's grade is the share of its mentioned objects that are in the image.
        """
        mentioned = {
            image_id: mentioned_objects(answers[image_id].text) for image_id in self._images if image_id in answers
        }
        hallucinated = {
            image_id: [category for category in categories if category not in self._objects[image_id]]
            for image_id, categories in mentioned.items()
        }
        present = {image_id: self._objects[image_id] for image_id in mentioned}
        mentioned_present = sum(len(present[image_id] & set(mentioned[image_id])) for image_id in mentioned)
        total = sum(map(len, mentioned.values()))
        scores: dict[str, Json] = {
            "chair_s": _percent(sum(map(bool, hallucinated.values())), len(mentioned)),
            "chair_i": _percent(sum(map(len, hallucinated.values())), total),
            "recall": _percent(mentioned_present, sum(map(len, present.values()))),
            "named": total,
        }
        grades = {
            image_id: 1 - len(hallucinated[image_id]) / len(mentioned[image_id]) if mentioned[image_id] else 1.0
            for image_id in mentioned
        }
        failed = sum(not answers[image_id].text.strip() for image_id in mentioned)
        return Scores(scores, failed, grades=grades)

    @cached_property
    def _images(self) -> Mapping[str, Record]:
        images = unique(_list(self.options.instances, "images"), "id", what="image")
        if self.options.only is None:
            return images
        selected = unique(read_records(self.options.only), "image_id", "question_id", "id", what="image")
        if missing := [image_id for image_id in selected if image_id not in images]:
            raise DataError(f"{selected[missing[0]].where}: image {missing[0]!r} is not in {self.options.instances}")
        return {image_id: images[image_id] for image_id in selected}

    @cached_property
    def _objects(self) -> Mapping[str, set[str]]:
        """The categories of the objects in each image, from boxes and human captions."""
        names = {record.name("id"): record.text("name") for record in _list(self.options.instances, "categories")}
        objects: dict[str, set[str]] = {image_id: set() for image_id in self._images}
        for box in _list(self.options.instances, "annotations"):
            category = names.get(box.name("category_id"))
            if category is None:
                raise DataError(f"{box.where}: unknown category {box.name('category_id')!r}")
            if (image_id := box.name("image_id")) in objects:
                objects[image_id].add(category)
        if self.options.captions is not None:
            for caption in _list(self.options.captions, "annotations"):
                if (image_id := caption.name("image_id")) in objects:
                    objects[image_id].update(mentioned_objects(caption.text("caption")))
        return objects


def _list(path: Path, key: str) -> list[Record]:
    document: Any = read_document(path)
    items = document.get(key) if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{path}: expected a list of objects in {key!r}", hint="use the file as published by COCO")
    return [Record(f"{path} {key} {index}", item) for index, item in enumerate(items)]


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
