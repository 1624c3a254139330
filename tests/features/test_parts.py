"""Parts of one extraction are disjoint, complete, and independent of each other's failures."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl import FeatureShape, ImageFile, StoreError
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key, stage_fingerprint
from llavactl.features.device import device_of
from llavactl.features.manifest import read_manifest, store_dir
from llavactl.features.parts import Part, part_of_this_process
from llavactl.features.writer import exclusive
from llavactl.recipe.frame import Recipe
from llavactl.verbs.cache import verify
from llavactl.verbs.extract import extract

from ..preloaded import Interpreters, Process

Load = Callable[..., Recipe]
FINGERPRINT = Fingerprint({"backbone": "toy"})
SHAPE = FeatureShape((1, 2), 3)


def rows(count: int) -> np.ndarray:
    return np.arange(count * 6, dtype=np.float16).reshape(count, 2, 3)


@given(st.text(), st.integers(1, 9))
def test_every_key_belongs_to_one_part(key: str, count: int) -> None:
    assert sum(Part(index, count).owns(key) for index in range(count)) == 1


def test_part_is_assigned_by_the_launcher() -> None:
    assert part_of_this_process({}) == Part() == Part(0, 1)
    assert part_of_this_process({"RANK": "2", "WORLD_SIZE": "3"}) == Part(2, 3)
    assert part_of_this_process({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}) == Part(1, 4)
    assert part_of_this_process({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).whole, "only set for the batch script"
    assert device_of(Part(1, 2), "cpu", {"LOCAL_RANK": "1"}) == "cpu"


def stored_features(fingerprint: Fingerprint) -> dict[bytes, bytes]:
    store = FeatureStore.open(fingerprint)
    assert len(set(store.keys)) == len(store), "duplicate keys"
    return {key: store.read(key.decode()).tobytes() for key in store.keys}


@pytest.mark.parametrize("count", [2, 3])
def test_parts_store_the_same_features_as_one_process(
    recipe: Load, images: list[ImageFile], count: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images[0].file.write_bytes(images[1].file.read_bytes())
    images[3].file.write_bytes(b"not an image")
    images[5].file.unlink()
    reports = [extract(recipe(), part=Part(index, count)) for index in range(count)]
    assert [report.part for report in reports] == list(range(count))
    assert sum(report.encoded for report in reports) == len(images) - 3
    assert sum(report.images for report in reports) == len(images)
    skipped_lists = [
        path.read_text().splitlines() for path in sorted(recipe().run_dir.glob(f"skipped-*-of-{count}.jsonl"))
    ]
    assert len(skipped_lists) == count
    names = [json.loads(line)["image"] for lines in skipped_lists for line in lines]
    assert sorted(names) == [images[3].name, images[5].name]
    fingerprint = stage_fingerprint(recipe(), 1)
    by_parts = stored_features(fingerprint)
    assert verify().sound
    rerun = extract(recipe())
    assert (rerun.encoded, rerun.stored_before, rerun.skipped) == (0, len(images) - 2, 2)
    monkeypatch.setenv("LLAVACTL_HOME", str(home / "one-process"))
    extract(recipe())
    assert stored_features(fingerprint) == by_parts


def test_parts_write_concurrently_and_exclude_other_writers() -> None:
    keys = [content_key(b"%d" % index) for index in range(8)]
    folder = store_dir(FINGERPRINT)
    with (
        StoreWriter(FINGERPRINT, SHAPE, 2, Part(0, 2)) as first,
        StoreWriter(FINGERPRINT, SHAPE, 2, Part(1, 2)) as second,
    ):
        first.append(keys[:3], rows(8)[:3])
        second.append(keys[3:4], rows(8)[3:4])
        with pytest.raises(StoreError, match="another process"), exclusive(folder):
            pass
        with (
            pytest.raises(StoreError, match="another process"),
            StoreWriter(FINGERPRINT, SHAPE, 2, Part(0, 2)),
        ):
            pass
        second.append(keys[4:], rows(8)[4:])
        second.skip("f" * 64, "truncated")
        assert len(list(folder.glob("part-*.partial"))) == 2
    assert not list(folder.glob("*.partial"))
    store = FeatureStore.open(FINGERPRINT)
    assert {key.decode() for key in store.keys} == set(keys)
    assert store.skipped == {"f" * 64: "truncated"}
    for index, key in enumerate(keys):
        assert np.array_equal(store.read(key), rows(8)[index])
    with exclusive(folder):
        pass


def test_files_of_dead_parts_are_removed_and_active_ones_kept() -> None:
    folder = store_dir(FINGERPRINT)
    with StoreWriter(FINGERPRINT, SHAPE, 4, Part(1, 3)) as active:
        active.append([content_key(b"1")], rows(1))
        (folder / "part-2.h5.partial").write_bytes(b"left by a killed process")
        (folder / "short.part-2.h5.partial").write_bytes(b"left by a killed process")
        with StoreWriter(FINGERPRINT, SHAPE, 4, Part(0, 3)):
            assert [path.name for path in folder.glob("*.partial")] == ["part-1.h5.partial"]
    assert len(FeatureStore.open(FINGERPRINT)) == 1


PROGRAM = "from llavactl.cli import main; main()"
Start = Callable[..., Process]


@pytest.fixture
def start(toy: Path, interpreters: Interpreters) -> Start:
    """Starts a part of the extraction of the recipe in ``toy``; its output goes to ``toy/output``."""

    def start(index: int, count: int, *options: str) -> Process:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(index), "WORLD_SIZE": str(count)}
        arguments = ("extract", "-r", str(toy / "recipe.yaml"), *options)
        return interpreters.start(PROGRAM, *arguments, cwd=toy, env=env, output=toy / "output")

    return start


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_after_a_killed_part_another_number_of_parts_completes_the_store(
    toy: Path, start: Start, recipe: Load, home: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    fingerprint = stage_fingerprint(recipe(), 1)
    processes = [start(index, count, "-o", "features.shard_images=1") for index in range(count)]
    killed = processes[-1]
    while killed.poll() is None and read_manifest(store_dir(fingerprint)) is None:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in processes]
    assert codes[:-1] == [0] * (count - 1), (toy / "output").read_text()
    if count == 2:
        extract(recipe())
    else:
        restarted = [start(index, count - 1) for index in range(count - 1)]
        assert [process.wait() for process in restarted] == [0] * (count - 1), (toy / "output").read_text()
    by_parts = stored_features(fingerprint)
    assert verify().sound
    monkeypatch.setenv("LLAVACTL_HOME", str(home / "one-process"))
    extract(recipe())
    assert stored_features(fingerprint) == by_parts
