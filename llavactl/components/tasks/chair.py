"""Objects that a description names and the picture doesn't have, in the manner of CHAIR (Rohrbach et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from llavactl.components.tasks.coco_words import CATEGORIES, objects_in
from llavactl.components.tasks.image_questions import asked, picture
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
    captions: RecipePath | None = Field(None, description="COCO's captions_*.json: what people name is there, too")
    only: RecipePath | None = Field(None, description="JSONL of image_id: these pictures alone; null: all")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of `instances`"
    )
    follow_links: FollowLinks = False
    prompt: str = Field("Please describe this image in detail.", description="what is asked about each picture")


class Chair:
    """The task ``chair``; see ``llavactl.core.protocols.Task``. A question's id is the picture's."""

    protocols = ("words",)

    def __init__(self, options: ChairOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        root = ImageRoot(str(self.options.images or self.options.instances.parent), self.options.follow_links)
        for name, record in self._pictures.items():
            image = picture(Record(record.where, {"image": record.text("file_name")}), root)
            there = ", ".join(each for each in CATEGORIES if each in self._objects[name])
            yield Question(name, asked(image, self.options.prompt), there)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """In percent: ``chair_s`` of descriptions with an object that isn't there, ``chair_i`` of objects named.

        ``recall`` is the share of the objects there that are named, ``named`` counts all that are. A description's
        grade is the share of its objects that are there.
        """
        named = {name: objects_in(answers[name].text) for name in self._pictures if name in answers}
        wrong = {name: [each for each in said if each not in self._objects[name]] for name, said in named.items()}
        there = {name: self._objects[name] for name in named}
        total = sum(map(len, named.values()))
        scores: dict[str, Json] = {
            "chair_s": _share(sum(map(bool, wrong.values())), len(named)),
            "chair_i": _share(sum(map(len, wrong.values())), total),
            "recall": _share(sum(len(there[name] & set(named[name])) for name in named), sum(map(len, there.values()))),
            "named": total,
        }
        grades = {name: 1 - len(wrong[name]) / len(named[name]) if named[name] else 1.0 for name in named}
        failed = sum(not answers[name].text.strip() for name in named)
        return Scores(scores, failed, grades=grades)

    @cached_property
    def _pictures(self) -> Mapping[str, Record]:
        known = unique(_list(self.options.instances, "images"), "id", what="picture")
        if self.options.only is None:
            return known
        wanted = unique(read_records(self.options.only), "image_id", "question_id", "id", what="picture")
        if missing := [name for name in wanted if name not in known]:
            raise DataError(f"{wanted[missing[0]].where}: picture {missing[0]!r} is not in {self.options.instances}")
        return {name: known[name] for name in wanted}

    @cached_property
    def _objects(self) -> Mapping[str, set[str]]:
        """What is in each picture, as the boxes and the people who described it say."""
        names = {each.name("id"): each.text("name") for each in _list(self.options.instances, "categories")}
        found: dict[str, set[str]] = {name: set() for name in self._pictures}
        for note in _list(self.options.instances, "annotations"):
            category = names.get(note.name("category_id"))
            if category is None:
                raise DataError(f"{note.where}: there is no category {note.name('category_id')!r}")
            if (image := note.name("image_id")) in found:
                found[image].add(category)
        if self.options.captions is not None:
            for note in _list(self.options.captions, "annotations"):
                if (image := note.name("image_id")) in found:
                    found[image].update(objects_in(note.text("caption")))
        return found


def _list(path: Path, key: str) -> list[Record]:
    document: Any = read_document(path)
    listed = document.get(key) if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise DataError(f"{path}: there is no list {key!r}", hint="is it COCO's file?")
    return [Record(f"{path} {key} {at}", each) for at, each in enumerate(listed)]


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
