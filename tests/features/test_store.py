"""The store: what goes in comes out, in any process, and nobody is given what isn't sound."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl import FeatureShape, StoreError
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key, manifest, shards
from llavactl.features.manifest import read_manifest, store_dir

MADE_WITH = Fingerprint({"backbone": "toy", "image": "pad"})
SHAPE = FeatureShape((2, 3), 4, prefix=1)


def keys(count: int, start: int = 0) -> list[str]:
    return [content_key(b"%d" % index) for index in range(start, start + count)]


def rows(count: int, start: int = 0) -> np.ndarray:
    """Features that tell which image they are of."""
    made = np.arange(SHAPE.patches * SHAPE.width, dtype=np.float32).reshape(SHAPE.patches, SHAPE.width)
    return (made + 100 * np.arange(start, start + count)[:, None, None]).astype(np.float16)


def fill(count: int, *, start: int = 0, shard_images: int = 4, made_with: Fingerprint = MADE_WITH) -> FeatureStore:
    with StoreWriter(made_with, SHAPE, shard_images) as writer:
        writer.append(keys(count, start), rows(count, start))
    return FeatureStore.open(made_with)


def check(store: FeatureStore, count: int) -> None:
    assert len(store) == count
    for index, key in enumerate(keys(count)):
        assert np.array_equal(store.read(key), rows(1, index)[0])


@settings(max_examples=12)
@given(batches=st.lists(st.integers(0, 9), max_size=5), shard_images=st.integers(1, 6))
def test_what_goes_in_comes_out(batches: list[int], shard_images: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", folder)
        with StoreWriter(MADE_WITH, SHAPE, shard_images) as writer:
            done = 0
            for size in batches:
                writer.append(keys(size, done), rows(size, done))
                done += size
        store = FeatureStore.open(MADE_WITH)
        check(store, done)
        listed = read_manifest(store.folder)
        assert listed is not None
        full, rest = divmod(done, shard_images)
        assert [shard.images for shard in listed.shards] == [shard_images] * full + [rest] * bool(rest)
        assert writer.bytes_written == listed.bytes == sum(path.stat().st_size for path in store.folder.glob("*.h5"))


def test_it_knows_what_it_holds() -> None:
    store = fill(9)
    assert keys(1)[0] in store
    assert keys(1, 9)[0] not in store
    assert list(store.holds(keys(12))) == [True] * 9 + [False] * 3
    assert not store.holds([]).size
    assert store.shape == SHAPE
    with pytest.raises(StoreError, match="has no features of image"):
        store.read("f" * 64)
    with pytest.raises(StoreError):
        store.read("0" * 64)


def test_what_is_read_is_the_readers_own() -> None:
    store = fill(2)
    store.read(keys(1)[0])[:] = 0
    check(store, 2)


def test_an_empty_store_is_a_store() -> None:
    store = fill(0)
    assert len(store) == 0
    assert keys(1)[0] not in store


def test_a_second_writer_appends() -> None:
    fill(6)
    check(fill(5, start=6), 11)


def test_plain_h5py_reads_a_shard() -> None:
    folder = fill(3).folder
    with h5py.File(next(folder.glob("*.h5"))) as file:
        assert set(file) == {"features", "keys"}
        assert file["features"].dtype == np.float16
        assert file["features"].chunks is None
        assert file["features"].compression is None
        assert np.array_equal(file["features"][:], rows(3))
        assert [key.decode("ascii") for key in file["keys"]] == keys(3)
        assert json.loads(file.attrs["fingerprint"]) == MADE_WITH.fields
        assert (tuple(file.attrs["grid"]), file.attrs["prefix"], file.attrs["format"]) == ((2, 3), 1, 1)
        offset = file["features"].id.get_offset()
        path = file.filename
    mapped = np.memmap(path, np.float16, "r", offset, (3, SHAPE.patches, SHAPE.width))
    assert np.array_equal(mapped, rows(3))


def test_the_same_features_make_the_same_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(7)
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other"))
    fill(7)
    for path in (home / "cache" / "features" / MADE_WITH.id).glob("*.*"):
        other = tmp_path / "other" / "cache" / "features" / MADE_WITH.id / path.name
        assert path.read_bytes() == other.read_bytes()


def test_undecodable_content_is_remembered() -> None:
    with StoreWriter(MADE_WITH, SHAPE, 4) as writer:
        writer.skip("a" * 64, "truncated")
    with StoreWriter(MADE_WITH, SHAPE, 4) as writer:
        writer.append(keys(1), rows(1))
        writer.skip("b" * 64, "empty")
    assert FeatureStore.open(MADE_WITH).skipped == {"a" * 64: "truncated", "b" * 64: "empty"}


# --- what must be refused


def test_a_missing_store_names_the_nearest_and_what_differs() -> None:
    with pytest.raises(StoreError, match=r"there are no features for this recipe yet$") as caught:
        FeatureStore.open(MADE_WITH)
    assert "llavactl extract" in caught.value.hint
    fill(1, made_with=Fingerprint({"backbone": "toy", "image": "square"}))
    fill(1, made_with=Fingerprint({"backbone": "other", "image": "square"}))
    with pytest.raises(StoreError, match=r'nearest store \w+ differs: image: "pad", not "square"$'):
        FeatureStore.open(MADE_WITH)


def test_a_store_of_another_fingerprint_is_refused_with_the_fields() -> None:
    other = Fingerprint({"backbone": "toy", "image": "square", "layer": -1})
    fill(3, made_with=other)
    shutil.copytree(store_dir(other), store_dir(MADE_WITH))
    for attempt in (lambda: FeatureStore.open(MADE_WITH), lambda: fill(1)):
        with pytest.raises(StoreError, match='image: "pad", not "square"; layer: nothing, not -1'):
            attempt()


def test_a_shard_of_another_fingerprint_is_refused_with_the_fields() -> None:
    other = Fingerprint({"backbone": "toy", "image": "square"})
    fill(3, made_with=other)
    fill(3)
    shutil.copy(store_dir(other) / "shard-00000.h5", store_dir(MADE_WITH) / "shard-00000.h5")
    with pytest.raises(StoreError, match='another fingerprint: image: "pad", not "square"'):
        FeatureStore.open(MADE_WITH)


def test_another_shape_is_not_mixed_in() -> None:
    fill(3)
    with pytest.raises(StoreError, match="the backbone makes"), StoreWriter(MADE_WITH, FeatureShape((1, 1), 4), 4):
        pass


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _scribble(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("harm", [_truncate, _scribble, Path.unlink])
def test_a_shard_that_is_not_whole_is_named(harm: object) -> None:
    folder = fill(9).folder
    harm(folder / "shard-00001.h5")  # type: ignore[operator]
    with pytest.raises(StoreError, match=r"shard-00001\.h5 is damaged") as caught:
        FeatureStore.open(MADE_WITH)
    assert "cache verify" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 3}', '{"shards": [], "skipped": {}}'])
def test_a_broken_manifest_is_an_error_and_without_it_the_shards_are_listed_again(text: str) -> None:
    folder = fill(9).folder
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged") as caught:
        FeatureStore.open(MADE_WITH)
    assert "remove that file" in caught.value.hint
    (folder / "manifest.json").unlink()
    check(fill(1, start=9), 10)


# --- several processes


def test_a_second_writer_at_once_is_refused_in_words() -> None:
    with StoreWriter(MADE_WITH, SHAPE, 4) as writer:
        with pytest.raises(StoreError, match="another process is writing"):
            fill(1)
        writer.append(keys(2), rows(2))
    check(fill(1, start=2), 3)


def test_a_reader_sees_what_was_finished_while_another_writes() -> None:
    with StoreWriter(MADE_WITH, SHAPE, 4) as writer:
        writer.append(keys(6), rows(6))
        check(FeatureStore.open(MADE_WITH), 4)


def _read(store: FeatureStore, wanted: Sequence[str]) -> list[np.ndarray]:
    return [store.read(key) for key in wanted]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_right(method: str) -> None:
    """A reader that was used before the fork: nothing of it may be inherited."""
    store = fill(24)
    check(store, 24)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap(_read, [(store, keys(24))] * 4)
    for each in found:
        assert np.array_equal(np.stack(each), rows(24))


def test_maps_are_not_inherited_across_a_fork() -> None:
    store = fill(8)
    check(store, 8)
    assert len(store._maps) == 2
    reading, writing = os.pipe()
    if not (child := os.fork()):
        store.read(keys(1)[0])
        os.write(writing, bytes([len(store._maps)]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"\x01"
    assert not pickle.loads(pickle.dumps(store))._maps


def test_few_files_are_open_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.features.store._MAX_MAPS", 3)
    store = fill(20, shard_images=1)
    for _ in range(2):
        check(store, 20)
        assert len(store._maps) <= 3


# --- what can't be written


def test_a_full_disk_loses_only_the_shard_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = shards._write, 0

    def full(handle: int, data: memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, data, offset)

    fill(2)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", full)
        with pytest.raises(StoreError, match="No space left on device") as caught:
            fill(20, start=2)
    assert "free disk space" in caught.value.hint
    folder = store_dir(MADE_WITH)
    kept = len(FeatureStore.open(MADE_WITH))
    assert 2 < kept < 22
    check(FeatureStore.open(MADE_WITH), kept)
    assert not list(folder.glob("*.partial"))
    check(fill(22 - kept, start=kept), 22)


@pytest.mark.parametrize("step", ["fsync", "rename", "open", "manifest"])
def test_an_error_at_any_step_lists_nothing_half_written(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(4)

    def fails(*_args: object, **_more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    where: dict[str, tuple[object, str]] = {
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
        "open": (shards, "FileIO"),
    }

    def write() -> None:
        with monkeypatch.context() as patch, StoreWriter(MADE_WITH, SHAPE, 4) as writer:
            patch.setattr(*where.get(step, (manifest, "write_json")), fails)
            writer.append(keys(4, 4), rows(4, 4))

    with pytest.raises(StoreError, match="Input/output error"):
        write()
    check(FeatureStore.open(MADE_WITH), 4)
    check(fill(4, start=4) if step != "manifest" else fill(0), 8)


def test_after_a_failed_write_nothing_more_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with StoreWriter(MADE_WITH, SHAPE, 4) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_write", fails)
            with pytest.raises(StoreError, match="full"):
                writer.append(keys(2), rows(2))
        with pytest.raises(StoreError, match="an earlier write failed"):
            writer.append(keys(2), rows(2))
    check(FeatureStore.open(MADE_WITH), 0)


def test_a_place_that_cannot_be_written_is_a_store_error(home: Path) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "features").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="can't be written") as caught:
        fill(1)
    assert "LLAVACTL_HOME" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_a_store_error(home: Path) -> None:
    fill(1)
    store_dir(MADE_WITH).chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        fill(1, start=1)


def test_an_exception_outside_stores_what_was_made() -> None:
    def interrupted() -> None:
        with StoreWriter(MADE_WITH, SHAPE, 4) as writer:
            writer.append(keys(6), rows(6))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    check(FeatureStore.open(MADE_WITH), 6)
