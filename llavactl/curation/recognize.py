"""Recognizes training data: which source reads a file or folder, and what its samples are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavactl.components.sources.captioned import is_captioned
from llavactl.components.sources.image_folder.listing import is_image, listing
from llavactl.core.component_calls import samples_of
from llavactl.core.errors import DataError, LlavactlError, RecipeError
from llavactl.core.locations import is_url
from llavactl.core.paths import expand_user
from llavactl.core.protocols import RecordSource, Source, check_component
from llavactl.core.registry import registry
from llavactl.core.schema import Sample
from llavactl.files.json_stream import read_stream
from llavactl.files.records import image_names
from llavactl.images.references import ImageRoot, image_in

FIRST_SAMPLES = 1000
"""Samples that are read to recognize data; a file of records may have millions."""

MAX_SAMPLES = 100_000
"""Samples that are counted, for sources without a file whose size tells their number."""

_CAPTION_WORDS = 3
_MAX_QUESTIONS = 20
"""LLaVA-Pretrain asks for captions in 11 ways, ``llavactl data expand`` in 14."""

_FEW_IMAGES = 50

Content = Literal["captions", "conversations"]


@dataclass(frozen=True)
class RecognizedData:
    """Data that the source ``spec`` reads; paths in it are absolute.

    ``content``: captions (for stage 1) or conversations (for stage 2). ``samples``: their number, estimated from the
    first ones if not ``exact``. ``first``: the first usable samples; ``unusable``: records among them that can't be
    used. ``captions_per_image``: the mean, if ``spec`` reads several captions of an image as one sample each.
    """

    spec: Mapping[str, Any]
    content: Content
    samples: int
    exact: bool
    first: Sequence[Sample]
    unusable: int = 0
    captions_per_image: float = 1.0


class MissingAnswerError(RecipeError):
    """A value that can't be recognized: the user must give the ``option``."""

    def __init__(self, message: str, option: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.option = option


def recognize(data: str, images: str | None = None, options: Mapping[str, Any] | None = None) -> RecognizedData:
    """The data that ``data`` names: the path of a file or folder, or a registered source with ``options``.

    ``images`` is the root of image paths in a file; None: recognized.

    Raises:
        DataError: there is no such data, or it can't be read or recognized.
        MissingAnswerError: the root of the images can't be recognized.
        RecipeError: invalid options.
    """
    spec = {**_spec(data, images), **(options or {})}
    try:
        parsed = {"name": spec["name"], **registry().options("sources", spec).model_dump(mode="json")}
    except RecipeError as error:
        if spec["name"] == data and expand_user(data).exists():
            hint = f"to read the file or folder of this name instead of the source, write ./{data}"
            raise RecipeError(error.message, hint=f"{error.hint}; {hint}" if error.hint else hint) from error
        raise
    spec = {key: parsed[key] for key in spec}  # with absolute paths
    first, unusable, count, exact = _checked(data, spec)
    per_image = 1.0
    if spec["name"] == "image-folder" and "every_caption" not in spec:
        per_image = sum(len(sample.captions) for sample in first) / len(first)
        if per_image > 1:  # otherwise only the first caption of each image would be trained
            spec["every_caption"] = True
            first, unusable, count, exact = _checked(data, spec)
    return RecognizedData(spec, _content(first), count, exact, first, unusable, per_image)


def _checked(data: str, spec: Mapping[str, Any]) -> tuple[list[Sample], int, int, bool]:
    """As ``_read``, of the source ``spec``, which reads at least one usable sample."""
    source = registry().create("sources", spec)
    check_component(source)
    first, unusable, count, exact = _read(source, samples_of(source, registry().get("sources", spec["name"])))
    if not first:
        raise DataError(f"{data}: no usable records", hint="`llavactl data check` lists the problems of each record")
    return first, unusable, count, exact


def _spec(data: str, images: str | None) -> dict[str, Any]:
    names = registry().names("sources")
    if not data.strip():
        raise DataError("the name of the data is empty", hint="name a file or folder, or a source")
    if data in names:
        return {"name": data, **({} if images is None else {"images": _place(images)})}
    path = expand_user(data).absolute()
    if path.is_dir():
        return _folder_spec(path, images)
    if not path.is_file():
        raise DataError(
            f"{data}: no such file or folder, nor a source",
            hint=f"name a file or folder of records or images, or one of the sources {', '.join(names)}",
        )
    if is_image(path.name):
        raise DataError(f"{data} is an image", hint="name the folder of the images and their captions")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table_spec(path, images)
    return _records_spec(path, images)


def _place(images: str) -> str:
    return images if is_url(images) else str(expand_user(images).absolute())


def _folder_spec(folder: Path, images: str | None) -> dict[str, Any]:
    """The source of a folder: LLaVA's records in a file at its top, or images with captions."""
    records = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in (".json", ".jsonl")]
    found = [file for file in records if "conversations" in _first_record(file)]
    if len(found) == 1:
        return _records_spec(found[0], images)
    if found:
        listed = ", ".join(file.name for file in found)
        raise DataError(
            f"{folder}: several files of records: {listed}", hint="name one of these files, or each of them"
        )
    if any(listing(folder).images) or not any(map(_is_archive_name, folder.iterdir())):
        if images is not None:
            raise DataError(
                f"--images {images}: the images of {folder} are in this folder", hint="leave out `--images`"
            )
        return {"name": "image-folder", "path": str(folder)}
    raise DataError(
        f"{folder}: no images and no records, only archives",
        hint="name the file of the records, and the archives with `images`, such as 'shards/*.tar'",
    )


def _is_archive_name(file: Path) -> bool:
    return file.suffix.lower() in (".tar", ".zip", ".parquet", ".arrow")


def _table_spec(table: Path, images: str | None) -> dict[str, Any]:
    folder = Path(_place(images)) if images else table.parent
    return {"name": "image-folder", "path": str(folder), "captions": str(table)}


def _records_spec(file: Path, images: str | None) -> dict[str, Any]:
    """The source of a JSON file, from the keys of its first record."""
    record = _first_record(file)
    if "conversations" in record:
        spec: dict[str, Any] = {"name": "llava-json", "path": str(file)}
        if (root := _image_root(file, images)) is not None:
            spec["images"] = root
        return spec
    if {"images", "annotations"} <= record.keys():
        spec = {"name": "coco", "captions": str(file)}
    elif {"captions", "instances"} & record.keys() and "image" in record:
        spec = {"name": "caps-boxes", "path": str(file)}
    elif "messages" in record:
        raise DataError(
            f"{file}: records with `messages` are not supported",
            hint="a record is {id, image, conversations: [{from: human, value}, {from: gpt, value}]}",
        )
    else:
        return _table_spec(file, images)
    return {**spec, **({} if images is None else {"images": _place(images)})}


def _first_record(file: Path) -> Mapping[str, Any]:
    """The first object of a JSON list, JSONL, or a file with a single object; empty if there is none."""
    try:
        for entry in itertools.islice(read_stream(file), 1):
            if isinstance(entry.value, dict):
                return entry.value
            if entry.problem and file.stat().st_size < 1 << 30:
                from llavactl.files.records import read_document

                document = read_document(file)
                return document if isinstance(document, dict) else {}
    except (LlavactlError, OSError):
        pass
    return {}


def _image_root(file: Path, images: str | None) -> str | None:
    """The root of the image paths in LLaVA's records; None if the records have no images.

    Raises:
        MissingAnswerError: the images are in none of the usual places.
    """
    if images is not None:
        return _place(images)
    names = [name for name in itertools.islice(_image_names(file), _FEW_IMAGES) if not name.startswith("data:")]
    if not names:
        return None
    folder = file.parent
    folders = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    archives = [each for each in sorted(folder.iterdir()) if each.suffix.lower() in (".zip", ".tar")]
    places = dict.fromkeys((folder, folder / "images", *folders, *archives, folder.parent, Path.cwd()))
    found = {place: sum(_exists(place, name) for name in names) for place in places if place.exists()}
    best = max(found, key=lambda place: found[place])
    if not found[best]:
        raise MissingAnswerError(
            f"{file}: the images are neither beside it nor in a folder or archive beside it, such as {names[0]}",
            "images",
            hint="name the folder that image paths are relative to",
        )
    return str(best)


def _image_names(file: Path) -> Iterator[str]:
    for entry in itertools.islice(read_stream(file), FIRST_SAMPLES):
        if isinstance(entry.value, dict):
            try:
                yield from image_names(entry.value)
            except DataError:
                continue


def _exists(place: Path, name: str) -> bool:
    try:
        image_in(ImageRoot(str(place), follow_links=True), name).stamp()
    except (LlavactlError, OSError):
        return False
    return True


def _read(source: Source, samples: Iterator[Sample]) -> tuple[list[Sample], int, int, bool]:
    """The first usable samples, the number of unusable ones among them, the number of all, and whether it is exact."""
    if not isinstance(source, RecordSource):
        read = list(itertools.islice(samples, MAX_SAMPLES))
        return read[:FIRST_SAMPLES], 0, len(read), len(read) < MAX_SAMPLES
    first: list[Sample] = []
    unusable = position = 0
    if source.path.is_dir():
        records = list(source.records())
        usable = [record for record in records if not record.problem]
        list(itertools.islice(samples, 1))  # raises if the run would be refused
        return [source.sample(record) for record in usable[:FIRST_SAMPLES]], 0, len(records), True
    remaining = source.records()
    for record in itertools.islice(remaining, FIRST_SAMPLES):
        position = record.position
        try:
            if record.problem:
                raise DataError(record.problem)
            first.append(source.sample(record))
        except DataError:
            unusable += 1
    if next(remaining, None) is None:
        return first, unusable, len(first), True
    return first, unusable, round(len(first) * source.path.stat().st_size / max(position, 1)), False


def _content(samples: Sequence[Sample]) -> Content:
    """Captions, if the source reads captions; other samples, such as LLaVA's records, are judged by their text.

    They are captions if nearly all are an answer of several words to one of few questions.
    """
    if all(map(is_captioned, samples)):
        return "captions"
    answers = [sample for sample in samples if _is_answer(sample)]
    questions = {"".join(turn.text for turn in sample.turns if turn.role == "user").strip() for sample in answers}
    words = sum(len(sample.turns[-1].text.split()) for sample in answers) / max(len(answers), 1)
    few = len(questions) <= min(_MAX_QUESTIONS, max(1, len(answers) // 2))
    return "captions" if len(answers) >= 0.9 * len(samples) and few and words >= _CAPTION_WORDS else "conversations"


def _is_answer(sample: Sample) -> bool:
    """Whether ``sample`` is one question about an image and its answer."""
    roles = [turn.role for turn in sample.turns]
    return bool(sample.images) and roles == ["user", "assistant"]
