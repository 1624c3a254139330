"""Hugging Face datasets: saved, from data files and streamed."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image

from llavactl import DataError, Identifiable, ImageFile
from llavactl.testing import check_source

ANSWERS = ["A dog.", "Here.", "A cat.", "Now."]


@pytest.fixture
def rows(photos: Sequence[Path]) -> Dataset:
    images = [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos]
    columns = {"image": images, "question": ["What?"] * 4, "answer": ANSWERS, "label": [0, 1, 2, 3]}
    return Dataset.from_dict(columns).cast_column("image", Image())


Save = Callable[[Dataset, Path], Path]


def saved(rows: Dataset, folder: Path) -> Path:
    rows.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def splits(rows: Dataset, folder: Path) -> Path:
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(folder / "splits"))
    return folder / "splits"


def folder_of_files(rows: Dataset, folder: Path) -> Path:
    (folder / "data").mkdir()
    rows.to_parquet(str(folder / "data/train.parquet"))
    return folder / "data"


def file(rows: Dataset, folder: Path) -> Path:
    return folder_of_files(rows, folder) / "train.parquet"


SAVED = [saved, splits, folder_of_files, file]


@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_data_set(
    create: Any, rows: Dataset, photos: Sequence[Path], tmp_path: Path, save: Save, *, streaming: bool
) -> None:
    source = create("hf-datasets", path=save(rows, tmp_path), streaming=streaming)
    assert check_source(source) == []
    samples = list(source)
    assert [image.read() for sample in samples for image in sample.images] == [photo.read_bytes() for photo in photos]
    assert [sample.turns[1].text for sample in samples] == ANSWERS
    assert [sample.extra["label"] for sample in samples] == [0, 1, 2, 3]
    assert len({image.stamp() for sample in samples for image in sample.images}) == 4
    assert all(pickle.loads(pickle.dumps(sample.images)) == sample.images for sample in samples)
    assert isinstance(source, Identifiable) is not streaming
    assert [sample.where.rpartition(" ")[2] for sample in samples] == list("0123")


def test_streamed_images_are_files_in_the_cache_folder(create: Any, rows: Dataset, tmp_path: Path, home: Path) -> None:
    source = create("hf-datasets", path=saved(rows, tmp_path), streaming=True, limit=3)
    images = [image for sample in source for image in sample.images]
    assert [type(image) for image in images] == [ImageFile] * 3
    assert [image for sample in source for image in sample.images] == images
    assert len(list(home.rglob("streamed-images/*/*"))) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_images_paths_and_rows_without_one(
    create: Any, photos: Sequence[Path], tmp_path: Path, *, streaming: bool
) -> None:
    """Paths are relative to ``images``; arrow files may hold both."""
    folder = photos[0].parent
    embedded = {"bytes": photos[0].read_bytes(), "path": "x.jpg"}
    images = [[embedded, {"bytes": None, "path": photos[1].name}], [], [embedded]]
    pq.write_table(pa.table({"images": images, "caption": ["A.", "B.", "C."]}), tmp_path / "rows.parquet")
    source = create("hf-datasets", path=tmp_path / "rows.parquet", images=folder, streaming=streaming)
    findings = [[finding.kind for finding in source.examine(record)[0]] for record in source.records()]
    assert ["record" in each for each in findings] == [False, True, False], "a caption without an image"
    first = source.sample(next(source.records()))
    assert [image.read() for image in first.images] == [photo.read_bytes() for photo in photos[:2]]


def test_conversations_without_images(create: Any, tmp_path: Path) -> None:
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    path = tmp_path / "train.jsonl"
    Dataset.from_dict({"id": ["a"], "messages": [dialog]}).to_json(str(path))
    for streaming in (False, True):
        source = create("hf-datasets", path=path, streaming=streaming)
        assert check_source(source) == []
        assert [(sample.id, sample.turns[1].text) for sample in source] == [("a", "Hello.")]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_and_limit(create: Any, rows: Dataset, tmp_path: Path, *, streaming: bool) -> None:
    path = splits(rows, tmp_path)
    options = {"path": path, "streaming": streaming}
    assert len(list(create("hf-datasets", **options, split="test"))) == 1
    assert len(list(create("hf-datasets", **options, limit=2))) == 2
    with pytest.raises(DataError) as error:
        list(create("hf-datasets", **options, split="validation"))
    assert "train, test" in error.value.hint
    with pytest.raises(DataError):
        list(create("hf-datasets", path=saved(rows, tmp_path), streaming=streaming, split="test"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("options", [{"image_column": "photo"}, {"question_column": "q"}, {"answer_column": "a"}])
def test_wrong_columns(create: Any, rows: Dataset, tmp_path: Path, options: Any, *, streaming: bool) -> None:
    with pytest.raises(DataError) as error:
        list(create("hf-datasets", path=saved(rows, tmp_path), streaming=streaming, **options))
    assert "question" in error.value.hint


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_can_not_be_read(create: Any, tmp_path: Path, *, streaming: bool) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_bytes(b"PAR1 damaged")
    (tmp_path / "empty").mkdir()
    for path in ("broken", "empty", "none", "none.parquet", "broken/train.parquet"):
        source = create("hf-datasets", path=tmp_path / path, streaming=streaming)
        problems: list[str] = []
        try:
            problems = [record.problem for record in source.records()]
        except DataError as error:
            problems = [error.message]
        assert any(problems), path
        with pytest.raises(DataError, match=str(tmp_path / path)):
            list(source)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_column_of_bytes_is_not_ignored(
    create: Any, rows: Dataset, tmp_path: Path, *, streaming: bool
) -> None:
    source = create("hf-datasets", path=saved(rows.rename_column("image", "photo"), tmp_path), streaming=streaming)
    with pytest.raises(DataError, match="photo"):
        next(iter(source))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images(create: Any, photos: Sequence[Path], tmp_path: Path, *, streaming: bool) -> None:
    """The library's imagefolder: images are files, whose paths must be inside the folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = [
        json.dumps({"file_name": photo.name, "text": answer}) for photo, answer in zip(photos, ANSWERS, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for photo in photos:
        (folder / photo.name).write_bytes(photo.read_bytes())
    source = create("hf-datasets", path=folder, streaming=streaming)
    assert check_source(source) == []
    assert [(sample.captions, sample.images[0].read()) for sample in source] == [
        ((answer,), photo.read_bytes()) for photo, answer in zip(photos, ANSWERS, strict=True)
    ]


def test_the_identity_changes_with_the_data(create: Any, rows: Dataset, tmp_path: Path) -> None:
    first = create("hf-datasets", path=saved(rows, tmp_path)).identity()
    assert create("hf-datasets", path=tmp_path / "saved").identity() == first
    other = tmp_path / "other"
    rows.select([1, 2]).save_to_disk(str(other))
    assert create("hf-datasets", path=other).identity() != first


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_outside_the_folder_are_refused(create: Any, tmp_path: Path, *, streaming: bool) -> None:
    images = [{"bytes": None, "path": path} for path in ("../a.jpg", "/etc/a.jpg", "https://example.org/a.jpg")]
    pq.write_table(pa.table({"image": images, "caption": ["A."] * 3}), tmp_path / "rows.parquet")
    source = create("hf-datasets", path=tmp_path / "rows.parquet", streaming=streaming)
    assert [[finding.kind for finding in source.examine(record)[0]] for record in source.records()] == [
        ["image-path"]
    ] * 3
