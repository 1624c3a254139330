"""The store returns the features that were written, in any process, and refuses damaged or foreign data."""

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

FINGERPRINT = Fingerprint({"backbone": "toy", "image": "pad"})
SHAPE = FeatureShape((2, 3), 4, prefix=1)


def keys(count: int, start: int = 0) -> list[str]:
    return [content_key(b"%d" % index) for index in range(start, start + count)]


def rows(count: int, start: int = 0) -> np.ndarray:
    """Distinct features for each image index."""
    first = np.arange(SHAPE.patches * SHAPE.width, dtype=np.float32).reshape(SHAPE.patches, SHAPE.width)
    return (first + 100 * np.arange(start, start + count)[:, None, None]).astype(np.float16)


def fill(count: int, *, start: int = 0, shard_images: int = 4, fingerprint: Fingerprint = FINGERPRINT) -> FeatureStore:
    with StoreWriter(fingerprint, SHAPE, shard_images) as writer:
        writer.append(keys(count, start), rows(count, start))
    return FeatureStore.open(fingerprint)


def assert_holds(store: FeatureStore, count: int) -> None:
    assert len(store) == count
    for index, key in enumerate(keys(count)):
        assert np.array_equal(store.read(key), rows(1, index)[0])


@settings(max_examples=12)
@given(batches=st.lists(st.integers(0, 9), max_size=5), shard_images=st.integers(1, 6))
def test_written_features_are_read_back(batches: list[int], shard_images: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", folder)
        with StoreWriter(FINGERPRINT, SHAPE, shard_images) as writer:
            written = 0
            for size in batches:
                writer.append(keys(size, written), rows(size, written))
                written += size
        store = FeatureStore.open(FINGERPRINT)
        assert_holds(store, written)
        listed = read_manifest(store.folder)
        assert listed
        full, rest = divmod(written, shard_images)
        assert [shard.images for shard in listed.shards] == [shard_images] * full + [rest] * bool(rest)
        assert writer.bytes_written == listed.bytes == sum(path.stat().st_size for path in store.folder.glob("*.h5"))


def test_lookup_of_stored_and_missing_keys() -> None:
    store = fill(9)
    assert keys(1)[0] in store
    assert keys(1, 9)[0] not in store
    assert list(store.holds(keys(12))) == [True] * 9 + [False] * 3
    assert not store.holds([]).size
    assert store.shape == SHAPE
    with pytest.raises(StoreError, match="f" * 64):
        store.read("f" * 64)
    with pytest.raises(StoreError):
        store.read("0" * 64)


def test_read_returns_a_copy() -> None:
    store = fill(2)
    store.read(keys(1)[0])[:] = 0
    assert_holds(store, 2)


def test_empty_store() -> None:
    store = fill(0)
    assert len(store) == 0
    assert keys(1)[0] not in store


def test_second_writer_appends() -> None:
    fill(6)
    assert_holds(fill(5, start=6), 11)


def test_shard_is_readable_with_plain_h5py_and_as_a_memory_map() -> None:
    folder = fill(3).folder
    with h5py.File(next(folder.glob("*.h5"))) as file:
        assert set(file) == {"features", "keys"}
        assert file["features"].dtype == np.float16
        assert file["features"].chunks is None
        assert file["features"].compression is None
        assert np.array_equal(file["features"][:], rows(3))
        assert [key.decode("ascii") for key in file["keys"]] == keys(3)
        assert json.loads(file.attrs["fingerprint"]) == FINGERPRINT.fields
        assert (tuple(file.attrs["grid"]), file.attrs["prefix"], file.attrs["format"]) == ((2, 3), 1, 1)
        offset = file["features"].id.get_offset()
        path = file.filename
    mapped = np.memmap(path, np.float16, "r", offset, (3, SHAPE.patches, SHAPE.width))
    assert np.array_equal(mapped, rows(3))


def test_equal_features_give_byte_identical_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(7)
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other"))
    fill(7)
    for path in (home / "cache" / "features" / FINGERPRINT.id).glob("*.*"):
        other = tmp_path / "other" / "cache" / "features" / FINGERPRINT.id / path.name
        assert path.read_bytes() == other.read_bytes()


def test_skipped_content_is_recorded() -> None:
    with StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
        writer.skip("a" * 64, "truncated")
    with StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
        writer.append(keys(1), rows(1))
        writer.skip("b" * 64, "empty")
    assert FeatureStore.open(FINGERPRINT).skipped == {"a" * 64: "truncated", "b" * 64: "empty"}


# --- refused stores


def test_missing_store_error_names_the_closest_store_and_the_differences() -> None:
    with pytest.raises(StoreError) as caught:
        FeatureStore.open(FINGERPRINT)
    assert "closest store" not in caught.value.message
    assert "llavactl extract" in caught.value.hint
    fill(1, fingerprint=Fingerprint({"backbone": "toy", "image": "square"}))
    fill(1, fingerprint=Fingerprint({"backbone": "other", "image": "square"}))
    with pytest.raises(StoreError, match=r'closest store \w+ .* image: .*"pad".*"square"$'):
        FeatureStore.open(FINGERPRINT)


def test_store_with_another_fingerprint_is_refused_with_the_differences() -> None:
    other = Fingerprint({"backbone": "toy", "image": "square", "layer": -1})
    fill(3, fingerprint=other)
    shutil.copytree(store_dir(other), store_dir(FINGERPRINT))
    for attempt in (lambda: FeatureStore.open(FINGERPRINT), lambda: fill(1)):
        with pytest.raises(StoreError, match=r'image: .*"pad".*"square"; layer: .*-1'):
            attempt()


def test_shard_with_another_fingerprint_is_refused_with_the_differences() -> None:
    other = Fingerprint({"backbone": "toy", "image": "square"})
    fill(3, fingerprint=other)
    fill(3)
    shutil.copy(store_dir(other) / "shard-00000.h5", store_dir(FINGERPRINT) / "shard-00000.h5")
    with pytest.raises(StoreError, match=r'shard-00000\.h5 .*fingerprint: image: .*"pad".*"square"'):
        FeatureStore.open(FINGERPRINT)


def test_another_shape_is_refused() -> None:
    fill(3)
    with pytest.raises(StoreError, match="FeatureShape"), StoreWriter(FINGERPRINT, FeatureShape((1, 1), 4), 4):
        pass


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _overwrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("damage", [_truncate, _overwrite, Path.unlink])
def test_damaged_shard_is_named(damage: object) -> None:
    folder = fill(9).folder
    damage(folder / "shard-00001.h5")  # type: ignore[operator]
    with pytest.raises(StoreError, match=r"shard-00001\.h5 is damaged") as caught:
        FeatureStore.open(FINGERPRINT)
    assert "cache verify" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 3}', '{"shards": [], "skipped": {}}'])
def test_broken_manifest_is_an_error_and_removing_it_lists_the_shards_again(text: str) -> None:
    folder = fill(9).folder
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged") as caught:
        FeatureStore.open(FINGERPRINT)
    assert "remove" in caught.value.hint
    (folder / "manifest.json").unlink()
    assert_holds(fill(1, start=9), 10)


# --- several processes


def test_concurrent_writer_is_refused() -> None:
    with StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
        with pytest.raises(StoreError, match="another process"):
            fill(1)
        writer.append(keys(2), rows(2))
    assert_holds(fill(1, start=2), 3)


def test_reader_sees_finished_shards_during_writing() -> None:
    with StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
        writer.append(keys(6), rows(6))
        assert_holds(FeatureStore.open(FINGERPRINT), 4)


def _read_all(store: FeatureStore, keys: Sequence[str]) -> list[np.ndarray]:
    return [store.read(key) for key in keys]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_correctly(method: str) -> None:
    """The store was read before the fork: its memory maps must not be inherited."""
    store = fill(24)
    assert_holds(store, 24)
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.starmap(_read_all, [(store, keys(24))] * 4)
    for features in results:
        assert np.array_equal(np.stack(features), rows(24))


def test_maps_are_not_inherited_across_a_fork() -> None:
    store = fill(8)
    assert_holds(store, 8)
    assert len(store._maps) == 2
    reading, writing = os.pipe()
    if not (child := os.fork()):
        store.read(keys(1)[0])
        os.write(writing, bytes([len(store._maps)]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"\x01"
    assert not pickle.loads(pickle.dumps(store))._maps


def test_number_of_open_files_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.features.store._MAX_MAPS", 3)
    store = fill(20, shard_images=1)
    for _ in range(2):
        assert_holds(store, 20)
        assert len(store._maps) <= 3


# --- write errors


def test_full_disk_loses_only_the_shard_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = shards._write, 0

    def write_until_full(handle: int, data: memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, data, offset)

    fill(2)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", write_until_full)
        with pytest.raises(StoreError, match="No space left on device") as caught:
            fill(20, start=2)
    assert "free disk space" in caught.value.hint
    folder = store_dir(FINGERPRINT)
    kept = len(FeatureStore.open(FINGERPRINT))
    assert 2 < kept < 22
    assert_holds(FeatureStore.open(FINGERPRINT), kept)
    assert not list(folder.glob("*.partial"))
    assert_holds(fill(22 - kept, start=kept), 22)


@pytest.mark.parametrize("step", ["fsync", "rename", "open", "manifest"])
def test_write_error_at_any_step_lists_no_incomplete_shard(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(4)

    def fails(*_args: object, **_options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    targets: dict[str, tuple[object, str]] = {
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
        "open": (shards, "FileIO"),
    }

    def write() -> None:
        with monkeypatch.context() as patch, StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
            patch.setattr(*targets.get(step, (manifest, "write_json")), fails)
            writer.append(keys(4, 4), rows(4, 4))

    with pytest.raises(StoreError, match="Input/output error"):
        write()
    assert_holds(FeatureStore.open(FINGERPRINT), 4)
    assert_holds(fill(4, start=4) if step != "manifest" else fill(0), 8)


def test_writer_refuses_further_writes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_write", fails)
            with pytest.raises(StoreError, match="full"):
                writer.append(keys(2), rows(2))
        with pytest.raises(StoreError):
            writer.append(keys(2), rows(2))
    assert_holds(FeatureStore.open(FINGERPRINT), 0)


def test_unwritable_location_is_a_store_error(home: Path) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "features").write_text("a file in place of the folder")
    with pytest.raises(StoreError, match=FINGERPRINT.id) as caught:
        fill(1)
    assert "LLAVACTL_HOME" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder_is_a_store_error(home: Path) -> None:
    fill(1)
    store_dir(FINGERPRINT).chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        fill(1, start=1)


def test_exception_in_the_block_keeps_appended_features() -> None:
    def interrupted() -> None:
        with StoreWriter(FINGERPRINT, SHAPE, 4) as writer:
            writer.append(keys(6), rows(6))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_holds(FeatureStore.open(FINGERPRINT), 6)
