"""Samples read from a table equal those written to it; a table is read from the cache until its source changes."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.errors import DataError
from llavactl.core.hashes import read_only_cache
from llavactl.core.schema import Box, Content, Sample, Turn
from llavactl.data import array_cache, tables
from llavactl.data.sample_table import SampleTable
from llavactl.data.table_view import TableView
from llavactl.data.tables import sample_table
from llavactl.images.image_file import ImageFile
from llavactl.images.references import ImageAtUrl, ImageMember, image_in
from llavactl.recipe.specs import SourceSpec


@dataclass(frozen=True)
class Member:
    """A reference to an image as a plugin defines it."""

    shared_fields: ClassVar[tuple[str, ...]] = ("shard",)

    shard: str
    name: str
    offset: int
    checked: bool | None = None

    def read(self) -> bytes:
        return b""

    def stamp(self) -> str | None:
        return None


PLUGIN: Any = ModuleType("a_plugin_with_shards")
PLUGIN.Member, Member.__module__ = Member, PLUGIN.__name__
sys.modules[PLUGIN.__name__] = PLUGIN

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["", "\0", "user\0", "é\0\n"])
IMAGES = st.sampled_from(
    [ImageFile("/a", "x.jpg"), ImageFile("/a", "x.jpg", True), ImageFile("/b", "é.jpg"), ImageMember("/a.zip", "x.jpg"),
     ImageAtUrl("s3://b", "x.jpg"), Member("/a.tar", "x.jpg", 1), Member("/a.tar", "é", 2, True)]
)  # fmt: skip
TURNS = st.builds(
    Turn, st.sampled_from(["system", "user", "assistant"]), st.lists(TEXT | IMAGES, max_size=4).map(tuple)
)
SAMPLES = st.builds(
    Sample,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.lists(TURNS, max_size=4).map(tuple),
    TEXT,
    boxes=st.lists(st.builds(Box, TEXT, st.just((0.0, 0.1, 0.5, 1.0)), st.booleans()), max_size=2).map(tuple),
)


def digest_parts(sample: Sample, keys: dict[Any, bytes]) -> bytes:
    """The bytes of a sample in a stage's digest, which must not change."""

    def part_bytes(part: Content) -> bytes:
        return part.encode() if isinstance(part, str) else b"\0" + keys[part]

    return b"".join(b"\0".join([turn.role.encode(), *map(part_bytes, turn.content)]) for turn in sample.turns)


@given(st.lists(SAMPLES, max_size=5), st.lists(SAMPLES, max_size=3))
def test_tables_return_their_samples(first: list[Sample], second: list[Sample]) -> None:
    built = [SampleTable.of(first), SampleTable.of(second)]
    arrays = [table.arrays or {} for table in built]
    read = [SampleTable(each) for each in arrays]
    assert [list(table) for table in built] == [list(table) for table in read] == [first, second]
    assert [table.digest for table in built] == [table.digest for table in read]
    assert [table[-1] for table in read if len(table)] == [samples[-1] for samples in (first, second) if samples]

    view, samples = TableView.of(read), [*first, *second]
    joined = SampleTable.joined([*read, SampleTable.of([])])
    assert list(joined) == samples
    assert joined.digest == SampleTable.of(samples).digest
    for start in range(len(samples)):
        part = pickle.loads(pickle.dumps(joined.part(start, start + 2)))
        assert list(part) == samples[start : start + 2]
    assert list(view) == samples
    assert list(view.images) == list(dict.fromkeys(image for each in samples for image in each.images))
    keys = [hashlib.sha256(repr(image).encode()).digest() for image in view.images]
    by_image = dict(zip(view.images, keys, strict=True))
    firsts = view.first_images().tolist()
    for index, sample in enumerate(samples):
        assert b"".join(view.digest_bytes(index, keys)) == digest_parts(sample, by_image)
        assert [view.images[image] for image in view.images_of(index)] == list(sample.images)
        assert firsts[index] == (view.images.index(sample.images[0]) if sample.images else -1)
        assert (view.id(index), view.where(index)) == (sample.id, sample.where)


@given(SAMPLES, SAMPLES)
def test_only_equal_samples_have_equal_digests(one: Sample, other: Sample) -> None:
    assert (SampleTable.of([one]).digest == SampleTable.of([other]).digest) == (one == other)
    if not one.images and not other.images:
        one_content, other_content = (TableView.of([SampleTable.of([each])]).content(0) for each in (one, other))
        assert (one_content == other_content) == (one.turns == other.turns)


@pytest.mark.parametrize(
    "image",
    [
        image_in("/photos", "data:image/png;base64,iVBORw0KGgo="),
        Member("/a.tar", "x", object()),  # type: ignore[arg-type]
        Member("/a.tar", "x", (1, 2)),  # type: ignore[arg-type]
        Member(("/a.tar",), "x", 1),  # type: ignore[arg-type]
    ],
)
def test_images_whose_fields_are_not_plain_are_not_cached(image: Any) -> None:
    images = (Member("/a.tar", "first", 1), image)
    table = SampleTable.of([Sample("a", (Turn("user", images),))])
    assert table.arrays is None
    assert table[0].images == images


@pytest.mark.parametrize("change", ["removed", "other fields", "not an image"])
def test_images_of_a_class_that_has_changed_are_read_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of a plugin may change the class: the table is then none, not one with other images."""
    arrays = SampleTable.of([Sample("a", (Turn("user", (Member("/a.tar", "x", 1),)),))]).arrays
    if change == "removed":
        monkeypatch.delattr(PLUGIN, "Member")
    else:
        fields = [("file", str), ("name", str), ("offset", int), ("checked", bool)]
        methods = {"read": lambda _: b"", "stamp": lambda _: None} if change == "other fields" else {}
        monkeypatch.setattr(PLUGIN, "Member", make_dataclass("Member", fields, namespace=methods, frozen=True))
    with pytest.raises(ValueError):  # noqa: PT011
        SampleTable(arrays or {})


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "MIN_BYTES", 0)
    monkeypatch.setattr("llavactl.core.hashes._SETTLED_S", -1)
    (tmp_path / "photos").mkdir()
    return write(tmp_path / "records.json", "A dog.")


def write(file: Path, answer: str) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}] * 2
    turns[2] = {"from": "human", "value": "And?"}
    file.write_text(json.dumps([{"id": index, "image": "a.jpg", "conversations": turns} for index in range(3)]))
    return file


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each source whose records were read."""
    names: list[str] = []
    real = tables._read

    def counted(spec: SourceSpec, *arguments: Any) -> SampleTable:
        names.append(spec.name)
        return real(spec, *arguments)

    monkeypatch.setattr(tables, "_read", counted)
    return names


def source(records: Path, images: str = "photos", **more: Any) -> SourceSpec:
    folder = str(records.parent / images)
    return SourceSpec.model_validate({"name": "llava-json", "path": str(records), "images": folder, **more})


def test_records_are_read_once(records: Path, read: list[str]) -> None:
    first, second = sample_table(source(records)), sample_table(source(records))
    assert list(first) == list(second)
    assert len(first) == 3
    assert read == ["llava-json"]
    assert list(sample_table(source(records, weight=2.0))) == list(first)
    assert len(read) == 1, "a weight isn't a property of the samples"


def test_a_changed_source_is_read_again(records: Path, read: list[str]) -> None:
    sample_table(source(records))
    (records.parent / "other").mkdir()
    assert len(sample_table(source(records, split_turns=True))) == 6
    assert sample_table(source(records, images="other")).images[0] == ImageFile(str(records.parent / "other"), "a.jpg")
    write(records, "A cat.")
    assert sample_table(source(records))[0].turns[1].text == "A cat."
    assert len(read) == 4


def test_a_cached_source_is_still_checked(records: Path) -> None:
    sample_table(source(records))
    (records.parent / "photos").rmdir()
    with pytest.raises(DataError, match="photos"):
        sample_table(source(records))


def test_a_damaged_table_is_read_again(records: Path, read: list[str], home: Path) -> None:
    sample_table(source(records))
    (file,) = (home / "cache" / "samples").iterdir()
    file.write_bytes(file.read_bytes().replace(b"A dog.", b"A cat."))
    assert sample_table(source(records))[0].turns[1].text == "A dog."
    assert len(read) == 2


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    records: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tables._read

    def changing(spec: SourceSpec, *arguments: Any) -> SampleTable:
        table = real(spec, *arguments)
        write(records, "A cat.")
        return table

    monkeypatch.setattr(tables, "_read", changing)
    sample_table(source(records))
    assert not (home / "cache" / "samples").exists()


def test_a_dry_run_reads_the_cache_but_writes_nothing(records: Path, read: list[str], home: Path) -> None:
    with read_only_cache():
        sample_table(source(records))
        assert not home.exists()
    sample_table(source(records))
    with read_only_cache():
        sample_table(source(records))
    assert len(read) == 2


def test_only_one_process_of_a_run_computes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process waits for the first; here the first holds the lock longer than it waits."""
    monkeypatch.setattr(array_cache, "_LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with array_cache.computing("samples", "key"):
        lock = home / "cache" / "samples" / "key.lock"
        assert lock.exists()
        with array_cache.computing("samples", "key"):
            pass
