"""Parquet: kinds of columns, bytes read on demand, damaged files."""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import ParquetFile, write_table

from llavactl import DataError, ImageFile
from llavactl.testing import check_source

QUESTIONS = ["What?", "Where?", "Who?", "When?"]
ANSWERS = ["A dog.", "Here.", "A cat.", "Now."]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def source_of(create: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function that writes columns to a file of two rows per group, and returns its source."""

    def source(columns: dict[str, Any], file: str = "rows.parquet", **options: Any) -> Any:
        write_table(pa.table({"question": QUESTIONS, "answer": ANSWERS, **columns}), tmp_path / file, row_group_size=2)
        return create("parquet", **{"path": tmp_path / file, **options})

    return source


def structs(photos: Sequence[Path]) -> pa.Array:
    return pa.array([{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos], STRUCT)


def columns_of_images(photos: Sequence[Path]) -> dict[str, Any]:
    data = [photo.read_bytes() for photo in photos]
    return {
        "structs": structs(photos),
        "structs without paths": pa.array([{"bytes": each, "path": None} for each in data], STRUCT),
        "structs of bytes only": pa.array([{"bytes": each} for each in data]),
        "binary": pa.array(data),
        "lists of structs": pa.array([[{"bytes": each, "path": None}] for each in data], pa.list_(STRUCT)),
        "lists of binary": pa.array([[each] for each in data]),
        "large binary": pa.array(data, pa.large_binary()),
    }


@pytest.mark.parametrize("kind", columns_of_images([]))
@pytest.mark.parametrize("name", ["image", "images", "picture"])
def test_images_in_every_kind_of_column(
    source_of: Any, kinds: Any, photos: Sequence[Path], kind: str, name: str
) -> None:
    options = {} if name.startswith("image") else {"image_column": name}
    source = source_of({name: columns_of_images(photos)[kind]}, **options)
    assert check_source(source) == []
    assert [set(each) for each in kinds(source)] == [{"no-id", "no-tag"}] * 4
    samples = list(source)
    assert [image.read() for sample in samples for image in sample.images] == [each.read_bytes() for each in photos]
    assert [sample.turns[1].text for sample in samples] == ANSWERS
    assert len({image.stamp() for sample in samples for image in sample.images}) == 4
    for sample in samples:
        assert pickle.loads(pickle.dumps(sample.images)) == sample.images
        json.dumps(next(iter(source.records())).value)


def test_paths_embedded_images_and_rows_without_one(source_of: Any, photos: Sequence[Path], tmp_path: Path) -> None:
    """In one row group, an image may be embedded, and another a path."""
    embedded = {"bytes": photos[0].read_bytes(), "path": "a.jpg"}
    rows = [embedded, {"bytes": None, "path": photos[1].name}, None, {"bytes": None, "path": photos[2].name}]
    folder = photos[0].parent
    samples = list(source_of({"image": pa.array(rows, STRUCT)}, images=folder))
    assert samples[0].images[0].read() == photos[0].read_bytes()
    assert [sample.images for sample in samples[1:]] == [
        (ImageFile(str(folder), photos[1].name),),
        (),
        (ImageFile(str(folder), photos[2].name),),
    ]
    names = pa.array([photo.name for photo in photos])
    assert [sample.images[0].read() for sample in source_of({"image": names}, images=folder)] == [
        photo.read_bytes() for photo in photos
    ]


def test_several_images_of_a_row(source_of: Any, photos: Sequence[Path]) -> None:
    both = [{"bytes": photo.read_bytes(), "path": "same.jpg"} for photo in photos[:2]]
    images = pa.array([both, [], None, both[:1]], pa.list_(STRUCT))
    source = source_of({"images": images})
    assert check_source(source) == []
    contents = [[image.read() for image in sample.images] for sample in source]
    first, second = (photo.read_bytes() for photo in photos[:2])
    assert contents == [[first, second], [], [], [first]]


def test_the_bytes_of_images_are_not_read_for_records(source_of: Any, photos: Sequence[Path], monkeypatch: Any) -> None:
    source = source_of({"image": structs(photos)})
    read: list[str] = []
    original = ParquetFile.read_row_group

    def spy(self: Any, group: int, columns: Sequence[str], **options: Any) -> Any:
        read.extend(columns)
        return original(self, group, columns=columns, **options)

    monkeypatch.setattr(ParquetFile, "read_row_group", spy)
    samples = list(source)
    assert "image.path" in read
    assert "image.bytes" not in read
    read.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda sample: sample.images[0].read(), samples))
    assert read == ["image.bytes"] * 2, "each of two row groups is decoded once"


def test_conversations_and_other_columns(source_of: Any, photos: Sequence[Path], create: Any, tmp_path: Path) -> None:
    """LLaVA-OneVision's columns; `<image>` and the row's other columns are kept."""
    dialogs = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}] for answer in ANSWERS]
    table = pa.table({"id": list("abcd"), "image": structs(photos), "conversations": dialogs, "data_source": ["x"] * 4})
    write_table(table, tmp_path / "one.parquet")
    source = create("parquet", path=tmp_path / "one.parquet")
    assert check_source(source) == []
    samples = list(source)
    assert [(sample.id, sample.extra) for sample in samples] == [(each, {"data_source": "x"}) for each in "abcd"]
    assert [part if isinstance(part, str) else part.name for part in samples[0].turns[0].content] == [
        photos[0].name,
        "\nWhat?",
    ]


def test_columns_can_be_named(source_of: Any, photos: Sequence[Path]) -> None:
    columns = {"picture": structs(photos), "q": QUESTIONS, "a": ANSWERS[::-1], "key": [1, 2, 3, 4]}
    names = {"image_column": "picture", "question_column": "q", "answer_column": "a", "id_column": "key"}
    samples = list(source_of(columns, **names))
    assert [(sample.id, sample.turns[1].text) for sample in samples] == list(zip("1234", ANSWERS[::-1], strict=True))
    captioned = list(source_of({"image": structs(photos), "text": ANSWERS}, caption_column="text"))
    assert [sample.captions for sample in captioned] == [(answer,) for answer in ANSWERS]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({}, {"image_column": "picture"}),
        ({}, {"question_column": "q"}),
        ({"image": ["a"] * 4, "images": ["a"] * 4}, {}),
    ],
)
def test_wrong_columns_stop_before_the_first_record(source_of: Any, columns: Any, options: Any) -> None:
    source = source_of(columns, **options)
    with pytest.raises(DataError):
        source.check()
    with pytest.raises(DataError):
        next(iter(source))


@pytest.mark.parametrize("kind", columns_of_images([]))
def test_an_unknown_column_of_bytes_is_not_ignored(source_of: Any, photos: Sequence[Path], kind: str) -> None:
    """Otherwise, `<image>` in the texts would be trained as text."""
    with pytest.raises(DataError) as error:
        source_of({"photo": columns_of_images(photos)[kind]}).check()
    assert "photo" in error.value.message
    assert "image_column" in error.value.hint


def test_no_column_to_train(create: Any, tmp_path: Path) -> None:
    write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as error:
        create("parquet", path=tmp_path / "a.parquet").check()
    assert "label" in error.value.hint


@pytest.mark.parametrize("column", ["image_column", "caption_column"])
def test_a_later_file_without_a_column_is_a_problem(source_of: Any, kinds: Any, tmp_path: Path, column: str) -> None:
    source_of({"x": ANSWERS}, "b.parquet")
    source_of({"y": ANSWERS}, "c.parquet")
    source = source_of({"x": ANSWERS}, "a.parquet", path=tmp_path, **{column: "x"})
    assert [each == ["json"] for each in kinds(source)] == [False] * 8 + [True]
    assert [record.index for record in source.records()] == list(range(9))


def test_a_path_outside_the_folder_is_refused(source_of: Any, kinds: Any) -> None:
    paths = [{"bytes": None, "path": f"{up}a.jpg"} for up in ("", "../", "/", "https://example.org/")]
    source = source_of({"image": pa.array(paths, STRUCT)})
    assert ["image-path" in each for each in kinds(source)] == [False, True, True, True]
    assert check_source(source) == []
    with pytest.raises(DataError, match=r"row 1: "):
        list(source)


def test_damaged_files_are_located_and_the_others_are_read(
    source_of: Any, kinds: Any, photos: Sequence[Path], tmp_path: Path
) -> None:
    source_of({"image": structs(photos)}, "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"<html>")
    source = source_of({"image": structs(photos)}, "d.parquet", path=tmp_path)
    assert [each == ["json"] for each in kinds(source)] == [False] * 4 + [True, True] + [False] * 4
    problems = [record for record in source.records() if record.problem]
    assert ["b.parquet" in problems[0].where, "c.parquet" in problems[1].where] == [True, True]
    with pytest.raises(DataError, match=r"b\.parquet"):
        list(source)


def test_a_damaged_page_is_a_problem_of_its_row_group(source_of: Any, kinds: Any, photos: Sequence[Path]) -> None:
    source = source_of({"image": structs(photos)})
    with ParquetFile(source.options.path) as opened:
        metadata = opened.metadata.row_group(1).column(0)
        start = min(filter(None, (metadata.dictionary_page_offset, metadata.data_page_offset)))
    data = bytearray(source.options.path.read_bytes())
    data[start : start + metadata.total_compressed_size] = b"\xff" * metadata.total_compressed_size
    source.options.path.write_bytes(data)
    found = list(source.records())
    assert [bool(record.problem) for record in found] == [False, False, True]
    assert found[2].where.endswith("row 2")


@pytest.mark.parametrize("name", ["parquet", "hf-datasets"])
def test_text_that_is_not_utf8_is_a_problem(create: Any, kinds: Any, tmp_path: Path, name: str) -> None:
    answers = pa.array([b"A dog.", b"\xff\xfe"]).view(pa.string())
    write_table(pa.table({"question": ["What?", "Who?"], "answer": answers}), tmp_path / "a.parquet")
    source = create(name, path=tmp_path / "a.parquet")
    assert kinds(source) == [["json"]]
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(source)


def test_a_folder_with_the_suffix_is_not_a_file(create: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    for path in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(DataError):
            create("parquet", path=path).check()


def test_a_file_that_has_changed_is_not_read(source_of: Any, photos: Sequence[Path]) -> None:
    source = source_of({"image": structs(photos)})
    image, before = next(iter(source)).images[0], source.identity()
    stamp = image.stamp()
    os.utime(source.options.path, (1, 1))
    with pytest.raises(OSError, match="changed"):
        image.read()
    assert image.stamp() != stamp
    assert source.identity() != before


def test_a_missing_image_is_skipped_by_its_reader(source_of: Any, photos: Sequence[Path]) -> None:
    source = source_of({"image": structs(photos)})
    image = next(iter(source)).images[0]
    source.options.path.unlink()
    with pytest.raises(OSError, match="rows"):
        image.read()


@pytest.mark.parametrize("pattern", ["*.parquet", "{0..1}.parquet", ".", "sub/../*.parquet"])
def test_several_files(source_of: Any, photos: Sequence[Path], tmp_path: Path, pattern: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("0", "1"):
        source = source_of({"image": structs(photos)}, f"{name}.parquet", path=tmp_path / pattern)
    assert [record.where.rpartition("/")[2] for record in source.records()] == [
        f"{name}.parquet row {row}" for name in "01" for row in range(4)
    ]
    assert source.path.is_dir()


@pytest.mark.parametrize("pattern", ["none.parquet", "*.arrow", "{0..2}.parquet", "sub"])
def test_files_that_do_not_exist(source_of: Any, photos: Sequence[Path], tmp_path: Path, pattern: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("0", "1"):
        source = source_of({"image": structs(photos)}, f"{name}.parquet", path=tmp_path / pattern)
    with pytest.raises(DataError):
        list(source)
