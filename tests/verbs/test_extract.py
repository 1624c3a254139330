"""``extract``: every image is either stored or listed once with its reason, and no store is left incomplete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llavactl import DataError, ImageFile, RecipeError, StoreError, hookimpl
from llavactl.components.vision.encoder import VisionEncoder
from llavactl.core import plugins
from llavactl.features import FeatureStore, content_key, fill, open_features, stage_fingerprint
from llavactl.features.backbone import OVERFLOW
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli, toy_records
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On a busy machine, tiny models spend most of their time in thread synchronization."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(toy: Path) -> Load:
    return lambda *overrides: load_recipe(toy / "recipe.yaml", overrides)


@pytest.fixture
def images(toy: Path) -> list[Path]:
    return sorted((toy / "images").iterdir())


@pytest.fixture
def reports() -> Iterator[list[dict[str, Any]]]:
    """The reports that ``extract_finished`` observers received."""
    received: list[dict[str, Any]] = []

    class Observer:
        @hookimpl
        def extract_finished(self, report: dict[str, Any]) -> None:
            received.append(report)

    observer = Observer()
    plugins.manager().register(observer, "observer")
    yield received
    plugins.manager().unregister(observer)


def skipped(recipe: Recipe) -> dict[str, str]:
    lines = [json.loads(line) for line in (recipe.run_dir / "skipped.jsonl").read_text().splitlines()]
    assert all(set(line) == {"image", "reason"} for line in lines)
    assert len({line["image"] for line in lines}) == len(lines)
    return {line["image"]: line["reason"] for line in lines}


def store(recipe: Recipe, stage: Any = 1) -> FeatureStore:
    return FeatureStore.open(stage_fingerprint(recipe, stage))


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file, except locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


# --- normal runs


def test_every_image_is_stored_once(recipe: Load, images: list[Path], reports: list[dict[str, Any]]) -> None:
    report = extract(recipe())
    assert (report.images, report.unique, report.encoded, report.stored_before, report.skipped) == (12, 12, 12, 0, 0)
    assert all(content_key(path.read_bytes()) in store(recipe()) for path in images)
    assert report.bytes == sum(path.stat().st_size for path in store(recipe()).folder.glob("*.h5"))
    assert [(each.stages, each.image, each.path) for each in report.stores] == [
        ((1, 2), "pad", str(store(recipe()).folder))
    ]
    assert skipped(recipe()) == {}
    assert report.images_per_s > 0
    assert len(reports) == 1
    assert json.loads(json.dumps(reports[0]))["stores"][0]["fingerprint"] == store(recipe()).fingerprint.id


def test_second_run_has_nothing_to_do(recipe: Load, home: Path) -> None:
    extract(recipe())
    before = file_states(home)
    report = extract(recipe())
    assert (report.encoded, report.stored_before, report.to_encode, report.bytes) == (0, 12, 0, 0)
    assert file_states(home) == before


def test_new_images_are_added_without_touching_stored_shards(recipe: Load, toy: Path, images: list[Path]) -> None:
    extract(recipe())
    folder = store(recipe()).folder
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.h5")}
    Image.new("RGB", (40, 30), (1, 2, 3)).save(toy / "images" / "new.png")
    toy_records(toy / "records.json", [*images, toy / "images" / "new.png"])
    report = extract(recipe())
    assert (report.images, report.encoded, report.stored_before) == (13, 1, 12)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before


def test_equal_content_under_several_names_is_encoded_once(recipe: Load, toy: Path, images: list[Path]) -> None:
    for path in images[1:5]:
        path.write_bytes(images[0].read_bytes())
    report = extract(recipe())
    assert (report.images, report.unique, report.encoded) == (12, 8, 8)
    refs = [ImageFile(str(toy / "images"), path.name) for path in images]
    assert open_features(recipe(), 1).contents(refs).unreadable == {}


def test_stages_with_different_preprocessing_have_separate_stores(recipe: Load) -> None:
    report = extract(recipe("stage1.image=square"))
    assert [(each.image, each.stages, each.unique) for each in report.stores] == [
        ("square", (1,), 12),
        ("pad", (2,), 12),
    ]
    assert (report.images, report.unique, report.encoded) == (12, 12, 24)
    assert len(store(recipe("stage1.image=square"), 1)) == len(store(recipe("stage1.image=square"), 2)) == 12


def test_images_of_both_stages_are_extracted(recipe: Load, toy: Path, images: list[Path]) -> None:
    toy_records(toy / "first.json", images[:3])
    report = extract(recipe("data.stage1.0.path=" + str(toy / "first.json")))
    assert report.images == 12
    report = extract(recipe("data.stage1.0.path=" + str(toy / "first.json"), "data.stage2=[]", "vision.layer=-3"))
    assert (report.images, report.encoded) == (3, 3)


def test_batch_size_and_workers_do_not_change_the_files(
    recipe: Load, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(recipe())
    first = {path.name: path.read_bytes() for path in store(recipe()).folder.glob("*.h5")}
    monkeypatch.setenv("LLAVACTL_HOME", str(home / "other"))
    extract(recipe("features.batch_size=5", "features.workers=4"))
    assert {path.name: path.read_bytes() for path in store(recipe()).folder.glob("*.h5")} == first


# --- invalid input


def test_unreadable_images_are_listed_and_unusual_formats_stored(recipe: Load, toy: Path, images: list[Path]) -> None:
    red = Image.new("RGB", (30, 20), (200, 10, 10))
    images[0].write_bytes(b"not an image")
    images[1].write_bytes(images[1].read_bytes()[:-200])
    images[2].write_bytes(b"")
    images[3].unlink()
    images[4].unlink()
    images[4].mkdir()
    red.convert("CMYK").save(images[5], "JPEG")
    red.quantize().save(images[6], "PNG")
    red.convert("LA").save(images[7], "PNG")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(images[8], "PNG")
    red.save(images[9], "GIF", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(images[10], "JPEG", exif=exif)
    red.save(images[11], "BMP")
    report = extract(recipe())
    reasons = skipped(recipe())
    assert list(reasons) == [path.name for path in images[:5]]
    keywords = ["text", "truncated", "empty", "No such file or directory", "Is a directory"]
    assert all(keyword in reason for keyword, reason in zip(keywords, reasons.values(), strict=True))
    assert (report.skipped, report.encoded, report.images) == (5, 7, 12)
    features = open_features(recipe(), 1)
    refs = [ImageFile(str(toy / "images"), path.name) for path in images]
    assert {ref.name: reason for ref, reason in features.contents(refs).unreadable.items()} == reasons


def test_undecodable_content_is_recorded_and_listed_again(recipe: Load, images: list[Path]) -> None:
    images[0].write_bytes(b"not an image")
    images[1].unlink()
    extract(recipe())
    first = skipped(recipe())
    assert list(store(recipe()).skipped) == [content_key(b"not an image")]
    report = extract(recipe())
    assert (report.encoded, report.to_encode, report.skipped) == (0, 0, 2)
    assert skipped(recipe()) == first


def test_restored_image_is_stored(recipe: Load, images: list[Path]) -> None:
    data = images[1].read_bytes()
    images[1].unlink()
    assert extract(recipe()).skipped == 1
    images[1].write_bytes(data)
    report = extract(recipe())
    assert (report.encoded, report.skipped) == (1, 0)
    assert skipped(recipe()) == {}


def test_max_skipped_is_an_error_after_all_other_images_are_stored(
    recipe: Load, images: list[Path], reports: list[dict[str, Any]]
) -> None:
    for path in images[:3]:
        path.write_bytes(b"not an image %d" % path.stat().st_size)
    assert extract(recipe(), max_skipped=3).encoded == 9
    with pytest.raises(DataError, match=r"3 images .* 2") as caught:
        extract(recipe(), max_skipped=2)
    assert "skipped.jsonl" in caught.value.hint
    assert len(store(recipe())) == 9
    assert len(skipped(recipe())) == 3
    assert len(reports) == 1


def test_unreadable_image_of_two_stores_is_listed_once(recipe: Load, images: list[Path]) -> None:
    images[0].write_bytes(b"not an image")
    report = extract(recipe("stage1.image=square"))
    assert (report.skipped, len(skipped(recipe()))) == (1, 1)


def test_invalid_record_stops_the_run_before_anything_is_written(recipe: Load, toy: Path, home: Path) -> None:
    records = json.loads((toy / "records.json").read_text())
    records[-1]["image"] = "../outside.jpg"
    (toy / "bad.json").write_text(json.dumps(records))
    for stage in ("stage1", "stage2"):
        with pytest.raises(DataError, match=r"\.\./outside\.jpg"):
            extract(recipe(f"data.{stage}.0.path={toy / 'bad.json'}"))
    assert not home.exists()
    assert not recipe().run_dir.exists()


def test_recipe_without_sources_is_refused(recipe: Load) -> None:
    with pytest.raises(RecipeError, match=r"data\.stage1"):
        extract(recipe("data.stage1=[]", "data.stage2=[]"))


def test_features_beyond_float16_are_not_stored(
    recipe: Load, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = VisionEncoder.encode

    def overflowing(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
        features = real(encoder, pixels).clone()
        features[pixels.mean(dim=(1, 2, 3)) > 0, 0, 0] = 1e5
        return features

    monkeypatch.setattr(VisionEncoder, "encode", overflowing)
    report = extract(recipe())
    reasons = skipped(recipe())
    assert 0 < len(reasons) < 12
    assert set(reasons.values()) == {OVERFLOW}
    assert report.encoded == len(store(recipe())) == 12 - len(reasons)
    features = open_features(recipe(), 1)
    for path in images:
        if path.name not in reasons:
            assert np.isfinite(features.load(ImageFile(str(path.parent), path.name))).all()


def test_image_that_changes_during_extraction_is_listed_and_not_stored_under_the_old_key(
    recipe: Load, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fill.fill_store

    def changing(*arguments: Any) -> Any:
        images[0].write_bytes(images[1].read_bytes() + b"changed")
        return real(*arguments)

    monkeypatch.setattr(fill, "fill_store", changing)
    extract(recipe())
    (reason,) = skipped(recipe()).values()
    assert list(skipped(recipe())) == [images[0].name]
    assert "changed" in reason
    assert store(recipe()).skipped == {}


@settings(max_examples=6)
@given(
    damages=st.dictionaries(
        st.integers(0, 11), st.tuples(st.integers(0, 400), st.integers(0, 255), st.integers(0, 400)), max_size=12
    )
)
def test_every_damaged_image_is_stored_or_listed(toys: Path, damages: dict[int, tuple[int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        toy = Path(folder, "toy")
        shutil.copytree(toys, toy)
        patch.setenv("LLAVACTL_HOME", str(Path(folder, "home")))
        paths = sorted((toy / "images").iterdir())
        for index, (position, value, cut) in damages.items():
            data = bytearray(paths[index].read_bytes())
            data[position % len(data)] = value
            paths[index].write_bytes(data[: max(0, len(data) - cut)])
        recipe = load_recipe(toy / "recipe.yaml")
        report = extract(recipe)
        reasons = skipped(recipe)
        keys = {path.name: content_key(path.read_bytes()) for path in paths}
        assert report.skipped == len(reasons)
        stored = store(recipe)
        assert all((key in stored) != (name in reasons) for name, key in keys.items())
        assert report.encoded == len(stored) == len({keys[name] for name in keys if name not in reasons})


# --- dry runs


def test_dry_run_reports_the_work_and_writes_nothing(
    recipe: Load, images: list[Path], home: Path, toy: Path, reports: list[dict[str, Any]]
) -> None:
    images[3].unlink()
    before = file_states(toy)
    report = extract(recipe(), dry_run=True)
    assert not home.exists()
    assert file_states(toy) == before
    assert not recipe().run_dir.exists()
    assert (report.images, report.unique, report.to_encode, report.encoded, report.skipped) == (12, 11, 11, 0, 1)
    assert report.dry_run
    assert report.skipped_file is None
    assert report.estimated_seconds is not None
    assert report.images_per_s > 0
    assert report.free_bytes == pytest.approx(shutil.disk_usage(toy).free, rel=0.1)
    assert reports == []
    done = extract(recipe())
    assert done.bytes == report.bytes, "the predicted bytes"
    assert done.encoded == report.to_encode


def test_dry_run_of_a_complete_store_has_nothing_to_do(recipe: Load, home: Path) -> None:
    extract(recipe())
    before = file_states(home)
    report = extract(recipe(), dry_run=True)
    assert (report.to_encode, report.stored_before, report.bytes, report.estimated_seconds) == (0, 12, 0, 0)
    assert file_states(home) == before


def test_command_line(toy: Path) -> None:
    result = run_cli("extract", "-r", str(toy / "recipe.yaml"), "--json", cwd=toy)
    assert result.exit_code == 0
    assert result.json()["encoded"] == 12
    (toy / "images" / "photo-000.jpg").write_bytes(b"not an image")
    result = run_cli("extract", "-r", str(toy / "recipe.yaml"), "--max-skipped", "0", cwd=toy)
    assert result.exit_code == 1
    assert "skipped.jsonl" in result.stderr
    assert "Traceback" not in result.stderr


# --- disk and concurrency errors


def test_too_little_disk_space_stops_before_any_work(recipe: Load, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=5000))
    assert extract(recipe(), dry_run=True).free_bytes == 5000
    with pytest.raises(StoreError, match="GB are free") as caught:
        extract(recipe())
    assert "LLAVACTL_HOME" in caught.value.hint
    assert not (home / "cache" / "features").exists()


def test_finished_shards_are_kept_when_the_disk_fills_up(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.features import shards

    real = shards._write

    def write_until_full(file: FileIO, data: memoryview, offset: int) -> None:
        if Path(file.name).name.startswith("shard-00001"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", write_until_full)
        with pytest.raises(StoreError, match="No space left on device"):
            extract(recipe())
    assert len(store(recipe())) == 5
    assert extract(recipe()).stored_before == 5
    assert len(store(recipe())) == 12


def test_interrupt_keeps_encoded_features(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shard = recipe("features.shard_images=100")
    real = VisionEncoder.encode
    calls = 0

    def interrupted(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return real(encoder, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(one_shard)
    kept = len(store(one_shard))
    assert 0 < kept < 12
    assert kept % 4 == 0
    assert extract(one_shard).encoded == 12 - kept
    assert len(store(one_shard)) == 12


def test_concurrent_extract_is_refused(recipe: Load) -> None:
    from llavactl.features import StoreWriter
    from llavactl.features.manifest import Manifest, read_manifest

    extract(recipe())
    manifest = read_manifest(store(recipe()).folder)
    assert isinstance(manifest, Manifest)
    other = recipe("vision.layer=-3")
    with (
        StoreWriter(stage_fingerprint(other, 1), manifest.shape, 4),
        pytest.raises(StoreError, match="another process"),
    ):
        extract(other)
    assert extract(other).encoded == 12
