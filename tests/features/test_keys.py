"""Content keys: the sha256 of an image's bytes, cached by stamp, never stale, and working without the cache."""

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
class CountingImage:
    """An image that counts its reads."""

    name: str
    data: bytes = b"image"
    version: str | None = "1"
    reads: list[str] = field(default_factory=list, compare=False)

    def read(self) -> bytes:
        self.reads.append(self.name)
        return self.data

    def stamp(self) -> str | None:
        return None if self.version is None else self.name + self.version


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image_files(folder: Path, count: int) -> list[ImageFile]:
    """``count`` files with seven distinct contents."""
    for index in range(count):
        (folder / f"{index}.jpg").write_bytes(b"image %d" % (index % 7))
    return [ImageFile(str(folder), f"{index}.jpg") for index in range(count)]


def test_key_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    images = image_files(tmp_path, 20)
    assert ContentKeys().keys_of(images) == [sha256(b"image %d" % (index % 7)) for index in range(20)]
    assert ContentKeys().key(images[3]) == sha256(b"image 3")


def test_cached_image_is_not_read_again() -> None:
    image = CountingImage("a")
    assert ContentKeys().key(image) == ContentKeys().key(image) == sha256(b"image")
    assert image.reads == ["a"]


def test_other_stamp_or_image_class_is_read_again() -> None:
    class OtherImage(CountingImage):
        pass

    ContentKeys().key(CountingImage("a", b"old"))
    assert ContentKeys().key(CountingImage("a", b"new", "2")) == sha256(b"new")
    assert ContentKeys().key(OtherImage("a", b"other")) == sha256(b"other")


def test_image_without_stamp_is_read_every_time() -> None:
    image = CountingImage("a", version=None)
    keys = ContentKeys()
    assert keys.key(image) == keys.key(image) == sha256(b"image")
    assert len(image.reads) == 2


def test_content_that_changes_while_being_read_is_not_cached() -> None:
    @dataclass
    class RewrittenImage:
        """An image that another process overwrites right after the first read."""

        name: str = "a"
        version: int = 1

        def read(self) -> bytes:
            data, self.version = b"version %d" % self.version, 2
            return data

        def stamp(self) -> str:
            return str(self.version)

    image = RewrittenImage()
    assert ContentKeys().key(image) == sha256(b"version 1")
    assert ContentKeys().key(image) == sha256(b"version 2")


def test_changed_file_has_a_new_key(tmp_path: Path) -> None:
    image = image_files(tmp_path, 1)[0]
    before = ContentKeys().key(image)
    image.file.write_bytes(b"other bytes")
    assert ContentKeys().key(image) == sha256(b"other bytes") != before


def test_errors_are_returned_in_the_position_of_the_image(tmp_path: Path) -> None:
    images = image_files(tmp_path, 5)
    images[2].file.unlink()
    images[4].file.unlink()
    images[4].file.mkdir()
    keys = ContentKeys().keys_of(images)
    assert [isinstance(key, OSError) for key in keys] == [False, False, True, False, True]
    assert keys[3] == sha256(b"image 3")
    with pytest.raises(FileNotFoundError):
        ContentKeys().key(images[2])


def test_progress_counts_add_up_to_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.features.keys._CHUNK", 4)
    counts: list[int] = []
    ContentKeys().keys_of(image_files(tmp_path, 10), counts.append)
    assert counts == [4, 4, 2]


@pytest.mark.parametrize("broken", ["garbage", "folder", "other table"])
def test_broken_cache_file_is_ignored_with_one_warning(
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
    images = image_files(tmp_path, 20)
    keys = ContentKeys()
    assert keys.keys_of(images) == keys.keys_of(images) == [sha256(b"image %d" % (index % 7)) for index in range(20)]
    assert sum(str(file) in record.message for record in caplog.records) == 1


def test_invalid_cache_file_is_replaced_by_the_next_instance(home: Path) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "keys.sqlite").write_bytes(b"not a database at all " * 100)
    image = CountingImage("a")
    for _ in range(3):
        ContentKeys().key(image)
    assert len(image.reads) == 2


def test_read_only_cache_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_files(tmp_path, 3)
    ContentKeys().keys_of(images[:2])
    keys = ContentKeys()
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **more: real(name.replace("mode=rwc", "mode=ro"), **more))
    assert keys.keys_of(images) == [sha256(b"image %d" % index) for index in range(3)]


def test_remember_false_writes_nothing(home: Path, tmp_path: Path) -> None:
    images = image_files(tmp_path, 3)
    assert ContentKeys(remember=False).keys_of(images) == [sha256(b"image %d" % index) for index in range(3)]
    assert not home.exists()
    ContentKeys().keys_of(images[:1])
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    ContentKeys(remember=False).keys_of(images)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def _hash_in_process(folder: str, home: str) -> list[object]:
    os.environ["LLAVACTL_HOME"] = home
    return list(ContentKeys().keys_of([ImageFile(folder, f"{index}.jpg") for index in range(200)]))


def test_several_processes_share_one_cache_file(home: Path, tmp_path: Path) -> None:
    images = image_files(tmp_path, 200)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        keys = pool.starmap(_hash_in_process, [(str(tmp_path), str(home))] * 3)
    assert keys == [[sha256(b"image %d" % (index % 7)) for index in range(200)]] * 3
    with sqlite3.connect(home / "cache" / "keys.sqlite") as database:
        assert database.execute("SELECT count(*) FROM keys").fetchone() == (len(images),)


def test_preloaded_keys_need_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, keys = image_files(tmp_path, 5), ContentKeys()
    assert keys.preload(images) == [sha256(image.read()) for image in images]
    unpickled = pickle.loads(pickle.dumps(keys))

    def fail(*_: object) -> None:
        raise AssertionError("the database was queried")

    with monkeypatch.context() as patch:
        patch.setattr(HashCache, "_query", fail)
        assert [unpickled.key(image) for image in images] == [sha256(image.read()) for image in images]
    images[0].file.write_bytes(b"other")
    assert unpickled.key(images[0]) == sha256(b"other")
    images[1].file.unlink()
    with pytest.raises(FileNotFoundError):
        unpickled.key(images[1])


@given(
    st.dictionaries(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)),
    st.binary(min_size=16, max_size=16),
)
def test_stamp_index_agrees_with_a_dict(keys: dict[bytes, bytes], other: bytes) -> None:
    # Adds stamps with equal first halves: the binary search compares only those.
    keys |= {stamp[:8] + stamp[8:][::-1]: digest for stamp, digest in keys.items()}
    index = StampIndex({stamp: digest.hex() for stamp, digest in keys.items()})
    assert len(index) == len(keys)
    assert {stamp: index.find(stamp) for stamp in keys} == {stamp: digest.hex() for stamp, digest in keys.items()}
    assert other in keys or index.find(other) is None
