"""Content keys: sha256 of the bytes, read once, remembered by stamp, never wrong and never in the way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl import ImageFile
from llavactl.core.hashes import HashCache
from llavactl.features import ContentKeys
from llavactl.features.stamp_index import StampIndex


@dataclass(frozen=True)
class Watched:
    """An image that counts how often it is read."""

    name: str
    data: bytes = b"image"
    stamped: str | None = "1"
    reads: list[str] = field(default_factory=list, compare=False)

    def read(self) -> bytes:
        self.reads.append(self.name)
        return self.data

    def stamp(self) -> str | None:
        return None if self.stamped is None else self.name + self.stamped


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path, count: int) -> list[ImageFile]:
    for index in range(count):
        (folder / f"{index}.jpg").write_bytes(b"image %d" % (index % 7))
    return [ImageFile(str(folder), f"{index}.jpg") for index in range(count)]


def test_the_key_is_the_hash_of_the_bytes(tmp_path: Path) -> None:
    images = files(tmp_path, 20)
    assert ContentKeys().many(images) == [sha(b"image %d" % (index % 7)) for index in range(20)]
    assert ContentKeys().key(images[3]) == sha(b"image 3")


def test_what_was_hashed_is_not_read_again() -> None:
    image = Watched("a")
    assert ContentKeys().key(image) == ContentKeys().key(image) == sha(b"image")
    assert image.reads == ["a"]


def test_another_stamp_or_another_kind_of_image_is_read_again() -> None:
    class Other(Watched):
        pass

    ContentKeys().key(Watched("a", b"old"))
    assert ContentKeys().key(Watched("a", b"new", "2")) == sha(b"new")
    assert ContentKeys().key(Other("a", b"other")) == sha(b"other")


def test_without_a_stamp_it_is_read_each_time() -> None:
    image = Watched("a", stamped=None)
    keys = ContentKeys()
    assert keys.key(image) == keys.key(image) == sha(b"image")
    assert len(image.reads) == 2


def test_content_that_changes_while_it_is_read_is_not_remembered() -> None:
    @dataclass
    class Rewritten:
        """Another process rewrites it just after it was read for the first time."""

        name: str = "a"
        version: int = 1

        def read(self) -> bytes:
            data, self.version = b"version %d" % self.version, 2
            return data

        def stamp(self) -> str:
            return str(self.version)

    image = Rewritten()
    assert ContentKeys().key(image) == sha(b"version 1")
    assert ContentKeys().key(image) == sha(b"version 2")


def test_a_changed_file_has_a_new_key(tmp_path: Path) -> None:
    image = files(tmp_path, 1)[0]
    before = ContentKeys().key(image)
    image.file.write_bytes(b"other bytes")
    assert ContentKeys().key(image) == sha(b"other bytes") != before


def test_many_tells_of_what_cannot_be_read_in_its_place(tmp_path: Path) -> None:
    images = files(tmp_path, 5)
    images[2].file.unlink()
    images[4].file.unlink()
    images[4].file.mkdir()
    found = ContentKeys().many(images)
    assert [isinstance(each, OSError) for each in found] == [False, False, True, False, True]
    assert found[3] == sha(b"image 3")
    with pytest.raises(FileNotFoundError):
        ContentKeys().key(images[2])


def test_progress_adds_up_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.features.keys._ROUND", 4)
    told: list[int] = []
    ContentKeys().many(files(tmp_path, 10), told.append)
    assert told == [4, 4, 2]


@pytest.mark.parametrize("broken", ["garbage", "folder", "other table"])
def test_a_broken_file_never_stops_the_work(
    home: Path, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = home / "cache" / "keys.sqlite"
    file.parent.mkdir(parents=True)
    if broken == "garbage":
        file.write_bytes(b"not a database at all " * 100)
    elif broken == "folder":
        file.mkdir()
    else:
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE keys (something TEXT)")
    images = files(tmp_path, 20)
    keys = ContentKeys()
    assert keys.many(images) == keys.many(images) == [sha(b"image %d" % (index % 7)) for index in range(20)]
    assert [record.message for record in caplog.records if "can't be used" in record.message].__len__() == 1


def test_a_file_that_is_no_database_is_made_anew_next_time(home: Path) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "keys.sqlite").write_bytes(b"not a database at all " * 100)
    image = Watched("a")
    for _ in range(3):
        ContentKeys().key(image)
    assert len(image.reads) == 2


def test_a_file_that_cannot_be_written_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = files(tmp_path, 3)
    ContentKeys().many(images[:2])
    keys = ContentKeys()
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **more: real(name.replace("mode=rwc", "mode=ro"), **more))
    assert keys.many(images) == [sha(b"image %d" % index) for index in range(3)]


def test_not_remembering_writes_nothing(home: Path, tmp_path: Path) -> None:
    images = files(tmp_path, 3)
    assert ContentKeys(remember=False).many(images) == [sha(b"image %d" % index) for index in range(3)]
    assert not home.exists()
    ContentKeys().many(images[:1])
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    ContentKeys(remember=False).many(images)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def _hash(folder: str, home: str) -> list[object]:
    os.environ["LLAVACTL_HOME"] = home
    return list(ContentKeys().many([ImageFile(folder, f"{index}.jpg") for index in range(200)]))


def test_several_processes_share_one_file(home: Path, tmp_path: Path) -> None:
    images = files(tmp_path, 200)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_hash, [(str(tmp_path), str(home))] * 3)
    assert found == [[sha(b"image %d" % (index % 7)) for index in range(200)]] * 3
    with sqlite3.connect(home / "cache" / "keys.sqlite") as database:
        assert database.execute("SELECT count(*) FROM keys").fetchone() == (len(images),)


def test_held_keys_need_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, keys = files(tmp_path, 5), ContentKeys()
    assert keys.hold(images) == [sha(image.read()) for image in images]
    again = pickle.loads(pickle.dumps(keys))

    def ask(*_: object) -> None:
        raise AssertionError("the database was asked")

    with monkeypatch.context() as patch:
        patch.setattr(HashCache, "_ask", ask)
        assert [again.key(image) for image in images] == [sha(image.read()) for image in images]
    images[0].file.write_bytes(b"other")
    assert again.key(images[0]) == sha(b"other")
    images[1].file.unlink()
    with pytest.raises(FileNotFoundError):
        again.key(images[1])


@given(
    st.dictionaries(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)),
    st.binary(min_size=16, max_size=16),
)
def test_recall_is_a_dict(keys: dict[bytes, bytes], other: bytes) -> None:
    # Stamps with the same first half, which is what the search goes by.
    keys |= {stamp[:8] + stamp[8:][::-1]: digest for stamp, digest in keys.items()}
    recall = StampIndex({stamp: digest.hex() for stamp, digest in keys.items()})
    assert len(recall) == len(keys)
    assert {stamp: recall.find(stamp) for stamp in keys} == {stamp: digest.hex() for stamp, digest in keys.items()}
    assert other in keys or recall.find(other) is None
