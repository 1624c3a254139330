"""Parts of one extract: disjoint, together what one process makes, and none needs the others to live."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl import FeatureShape, ImageFile, StoreError
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key, stage_fingerprint
from llavactl.features.manifest import read_manifest, store_dir
from llavactl.features.parts import Part, device_of, part_of_this_process
from llavactl.features.writer import exclusive
from llavactl.recipe.frame import Recipe
from llavactl.verbs.cache import verify
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]
MADE_WITH = Fingerprint({"backbone": "toy"})
SHAPE = FeatureShape((1, 2), 3)


def rows(count: int) -> np.ndarray:
    return np.arange(count * 6, dtype=np.float16).reshape(count, 2, 3)


@given(st.text(), st.integers(1, 9))
def test_every_key_is_one_parts(key: str, count: int) -> None:
    assert sum(Part(index, count).owns(key) for index in range(count)) == 1


def test_the_launcher_says_which_part_it_is() -> None:
    assert part_of_this_process({}) == Part() == Part(0, 1)
    assert part_of_this_process({"RANK": "2", "WORLD_SIZE": "3"}) == Part(2, 3)
    assert part_of_this_process({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}) == Part(1, 4)
    assert part_of_this_process({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).alone, "the batch script itself"
    assert device_of(Part(1, 2), "cpu", {"LOCAL_RANK": "1"}) == "cpu"


def contents(made_with: Fingerprint) -> dict[bytes, bytes]:
    store = FeatureStore.open(made_with)
    assert len(set(store.keys)) == len(store), "nothing is there twice"
    return {key: store.read(key.decode()).tobytes() for key in store.keys}


@pytest.mark.parametrize("count", [2, 3])
def test_parts_make_what_one_makes(
    recipe: Load, images: list[ImageFile], count: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images[0].file.write_bytes(images[1].file.read_bytes())
    images[3].file.write_bytes(b"no image")
    images[5].file.unlink()
    reports = [extract(recipe(), part=Part(index, count)) for index in range(count)]
    assert [report.part for report in reports] == list(range(count))
    assert sum(report.encoded for report in reports) == len(images) - 3
    assert sum(report.images for report in reports) == len(images)
    listed = [path.read_text().splitlines() for path in sorted(recipe().run_dir.glob(f"skipped-*-of-{count}.jsonl"))]
    assert len(listed) == count
    names = [json.loads(line)["image"] for lines in listed for line in lines]
    assert sorted(names) == [images[3].name, images[5].name]
    made_with = stage_fingerprint(recipe(), 1)
    shared = contents(made_with)
    assert verify().sound
    whole = extract(recipe())
    assert (whole.encoded, whole.stored_before, whole.skipped) == (0, len(images) - 2, 2)
    monkeypatch.setenv("LLAVACTL_HOME", str(home / "alone"))
    extract(recipe())
    assert contents(made_with) == shared


def test_parts_write_at_once_and_alone_is_refused_meanwhile() -> None:
    keys = [content_key(b"%d" % index) for index in range(8)]
    folder = store_dir(MADE_WITH)
    with StoreWriter(MADE_WITH, SHAPE, 2, Part(0, 2)) as first, StoreWriter(MADE_WITH, SHAPE, 2, Part(1, 2)) as second:
        first.append(keys[:3], rows(8)[:3])
        second.append(keys[3:4], rows(8)[3:4])
        with pytest.raises(StoreError, match="another process is writing"), exclusive(folder):
            pass
        with (
            pytest.raises(StoreError, match="another process is writing"),
            StoreWriter(MADE_WITH, SHAPE, 2, Part(0, 2)),
        ):
            pass
        second.append(keys[4:], rows(8)[4:])
        second.skip("f" * 64, "truncated")
        assert len(list(folder.glob("part-*.partial"))) == 2
    assert not list(folder.glob("*.partial"))
    store = FeatureStore.open(MADE_WITH)
    assert {key.decode() for key in store.keys} == set(keys)
    assert store.skipped == {"f" * 64: "truncated"}
    for index, key in enumerate(keys):
        assert np.array_equal(store.read(key), rows(8)[index])
    with exclusive(folder):
        pass


def test_what_a_dead_part_left_goes_and_what_a_living_one_writes_stays() -> None:
    folder = store_dir(MADE_WITH)
    with StoreWriter(MADE_WITH, SHAPE, 4, Part(1, 3)) as living:
        living.append([content_key(b"1")], rows(1))
        (folder / "part-2.h5.partial").write_bytes(b"of a dead one")
        (folder / "short.part-2.h5.partial").write_bytes(b"of a dead one")
        with StoreWriter(MADE_WITH, SHAPE, 4, Part(0, 3)):
            assert [path.name for path in folder.glob("*.partial")] == ["part-1.h5.partial"]
    assert len(FeatureStore.open(MADE_WITH)) == 1


def start(toy: Path, index: int, count: int, *more: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(index), "WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "llavactl", "extract", "-r", str(toy / "recipe.yaml"), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=toy)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_part_that_dies_is_made_up_for_by_another_number(
    toy: Path, recipe: Load, home: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    made_with = stage_fingerprint(recipe(), 1)
    processes = [start(toy, index, count, "-o", "features.shard_images=1") for index in range(count)]
    victim = processes[-1]
    while victim.poll() is None and read_manifest(store_dir(made_with)) is None:
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes[:-1]] == [0] * (count - 1), ended
    again = [start(toy, index, count - 1) for index in range(count - 1)]
    ended = [process.communicate() for process in again]
    assert [process.returncode for process in again] == [0] * (count - 1), ended
    shared = contents(made_with)
    assert verify().sound
    monkeypatch.setenv("LLAVACTL_HOME", str(home / "alone"))
    extract(recipe())
    assert contents(made_with) == shared
