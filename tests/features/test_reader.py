"""Cached and live features are bit-identical and treat unreadable images alike."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llavactl import DataError, FeatureShape, ImageFile, PluginError, StoreError, TransformersVision
from llavactl.features import (
    FeatureStore,
    Fingerprint,
    LiveFeatures,
    fill,
    open_features,
    stage_fingerprint,
    stage_vision,
)
from llavactl.features.backbone import Backbone, BatchFeatures
from llavactl.features.fill import encode_images
from llavactl.features.prepare import prepare
from llavactl.recipe.frame import Recipe
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_cached_and_live_features_are_bit_identical(
    recipe: Load, images: list[ImageFile], compute: str, stage: int
) -> None:
    settings = (f"features.compute={compute}", "stage1.image=square")
    extract(recipe(*settings))
    cached = open_features(recipe(*settings), stage)
    live = open_features(recipe(*settings, "features.mode=live"), stage, "cpu")
    assert cached.shape == live.shape
    assert cached.fingerprint == live.fingerprint == stage_fingerprint(recipe(*settings), stage)
    for image in images:
        stored, encoded = cached.load(image), live.load(image)
        assert stored.dtype == encoded.dtype == np.float16
        assert np.array_equal(stored, encoded)
    assert not np.array_equal(cached.load(images[0]), cached.load(images[1]))


def test_stages_use_their_own_preprocessing(recipe: Load, images: list[ImageFile]) -> None:
    both = recipe("stage1.image=square")
    (difference,) = stage_fingerprint(both, 1).differences(stage_fingerprint(both, 2))
    assert difference.startswith("image: ")
    assert stage_fingerprint(recipe(), 1) == stage_fingerprint(recipe(), 2)
    extract(both)
    stage1, stage2 = open_features(both, 1), open_features(both, 2)
    assert any(not np.array_equal(stage1.load(image), stage2.load(image)) for image in images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_do_not_depend_on_the_batch(recipe: Load, images: list[ImageFile], dtype: str) -> None:
    encoder = stage_vision(recipe(), 1).load("cpu", dtype)
    pixels = [prepare(encoder, image) for image in images]
    expected = Backbone(encoder, "cpu", 16).encode(pixels)
    assert expected.shape == (len(images), encoder.shape.patches, encoder.shape.width)
    for size in (1, 2, 3, 5, 7):
        for batch_size in (1, 2, 3, 16):
            backbone = Backbone(encoder, "cpu", batch_size)
            batches = [backbone.encode(pixels[start : start + size]) for start in range(0, len(pixels), size)]
            assert np.array_equal(np.concatenate(batches), expected), (size, batch_size)


class BatchRecorder:
    """A backbone that records its batch sizes; in batches of several images it adds ``batch_effect``."""

    shape = FeatureShape((1, 1), 1)

    def __init__(self, batch_effect: float) -> None:
        self.batch_effect = batch_effect
        self.sizes: list[int] = []

    def preprocess(self, image: object) -> np.ndarray:
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        return pixels.reshape(-1, 1, 1) + self.batch_effect * (len(pixels) > 1)


def test_cpu_uses_batches_only_if_they_are_bit_identical() -> None:
    pixels = [np.full((1, 1, 1), index, np.float32) for index in range(10)]
    invariant, varying = BatchRecorder(0), BatchRecorder(1e-6)
    for encoder in (invariant, varying):
        features = Backbone(encoder, "cpu", 4).encode(pixels)
        assert np.array_equal(features.reshape(-1), np.arange(10))
    assert invariant.sizes == [1, 1, 1, 1, 4, 4, 1, 1]
    assert varying.sizes == [1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1]


def test_other_devices_use_a_constant_batch_size() -> None:
    encoder = BatchRecorder(0)
    backbone = Backbone(encoder, "cpu:0", 4)  # any device not named "cpu"
    pixels = [np.full((1, 1, 1), index, np.float32) for index in range(6)]
    assert np.array_equal(backbone.encode(pixels).reshape(-1), np.arange(6))
    assert encoder.sizes == [4, 4]


@pytest.mark.parametrize(
    ("device", "order"), [("cpu", "begin 0 end 0 begin 4 end 4"), ("cpu:0", "begin 0 begin 4 end 0 end 4")]
)
def test_other_devices_start_the_next_batch_before_awaiting_the_last(
    device: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class LoggingBackbone(Backbone):
        def encode_async(self, pixels: Sequence[np.ndarray]) -> Callable[[], BatchFeatures]:
            first = int(pixels[0].item())
            log.append(f"begin {first}")
            wait = super().encode_async(pixels)

            def logged_wait() -> BatchFeatures:
                log.append(f"end {first}")
                return wait()

            return logged_wait

    monkeypatch.setattr(fill, "prepare", lambda _encoder, image, _key: np.full((1, 1, 1), image, np.float32))
    backbone = LoggingBackbone(BatchRecorder(0), device, 4)
    batches = list(encode_images({str(index): index for index in range(8)}, backbone, workers=1))  # type: ignore[misc]
    assert [key for batch in batches for key in batch.keys] == [str(index) for index in range(8)]
    assert np.array_equal(np.concatenate([batch.features for batch in batches]).reshape(-1), np.arange(8))
    assert " ".join(log) == order


def test_cached_features_do_not_load_the_backbone(
    recipe: Load, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(recipe())

    def load(*_: object) -> None:
        raise AssertionError("the backbone's weights were loaded")

    monkeypatch.setattr(TransformersVision, "load", load)
    features = open_features(recipe(), 2)
    assert features.contents(images).unreadable == {}
    assert features.load(images[0]).shape == (features.shape.patches, features.shape.width)
    report = extract(recipe())
    assert (report.encoded, report.stored_before) == (0, len(images))


def test_missing_store_is_an_error_that_names_the_command_and_the_differences(recipe: Load) -> None:
    with pytest.raises(StoreError) as caught:
        open_features(recipe(), 1)
    assert "closest store" not in caught.value.message
    assert "llavactl extract" in caught.value.hint
    extract(recipe())
    with pytest.raises(StoreError, match=r"closest store .* layers: .*\[1\].*\[2\]"):
        open_features(recipe("vision.layer=-3"), 1)


def test_images_without_cached_features_are_counted_and_named(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe())
    for index, image in enumerate(images[:5]):
        image.file.write_bytes(images[6].file.read_bytes() + bytes([index]))
    with pytest.raises(StoreError, match=f"5 images .*{images[0].name}, .*, …") as caught:
        open_features(recipe(), 1).contents(images)
    assert "llavactl extract" in caught.value.hint
    with pytest.raises(StoreError):
        open_features(recipe(), 1).load(images[0])


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_unreadable_images_are_listed_with_reasons(recipe: Load, images: list[ImageFile], mode: str) -> None:
    images[1].file.unlink()
    images[3].file.write_bytes(b"")
    images[5].file.write_bytes(images[5].file.read_bytes()[:-100])
    if mode == "cached":
        extract(recipe())
    features = open_features(recipe(f"features.mode={mode}"), 1, "cpu")
    reasons = features.contents(images).unreadable
    assert list(reasons) == [images[1], images[3], images[5]]
    assert reasons[images[1]] == "No such file or directory"
    assert "empty" in reasons[images[3]]
    assert "truncated" in reasons[images[5]]
    with pytest.raises(DataError, match=images[1].name):
        features.load(images[1])


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_equal_bytes_have_equal_keys(recipe: Load, images: list[ImageFile], mode: str) -> None:
    images[1].file.write_bytes(images[0].file.read_bytes())
    images[3].file.unlink()
    extract(recipe())
    keys = open_features(recipe(f"features.mode={mode}"), 1, "cpu").contents(images).keys
    assert keys.keys() == set(images) - {images[3]}
    assert keys[images[0]] == keys[images[1]]
    assert len(set(keys.values())) == len(images) - 2


def test_cached_reader_can_be_pickled(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe())
    features = open_features(recipe(), 1)
    unpickled = pickle.loads(pickle.dumps(features))
    assert np.array_equal(features.load(images[2]), unpickled.load(images[2]))


def test_live_image_is_encoded_once_until_its_file_changes(recipe: Load, images: list[ImageFile]) -> None:
    encoder = stage_vision(recipe(), 1).load("cpu", "float32")
    live = LiveFeatures(encoder, stage_fingerprint(recipe(), 1))
    first = live.load(images[0])
    first[:] = 0
    before = live.load(images[0])
    assert before.any(), "callers get copies"
    assert live._recent.cache_info().hits == 1
    images[0].file.write_bytes(images[1].file.read_bytes())
    assert np.array_equal(live.load(images[0]), live.load(images[1]))
    assert not np.array_equal(live.load(images[0]), before)


class OverflowingBackbone:
    """A backbone whose features exceed float16 for bright images."""

    shape = FeatureShape((1, 1), 1)

    def preprocess(self, image: object) -> np.ndarray:
        return np.asarray(image, np.float32).mean().reshape(1, 1, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(-1, 1, 1) * 1000


def test_live_features_that_overflow_float16_are_refused(images: list[ImageFile]) -> None:
    live = LiveFeatures(OverflowingBackbone(), Fingerprint({}))
    with pytest.raises(PluginError, match="not finite in float16"):
        live.load(images[0])


def test_preprocessing_errors_become_reasons(images: list[ImageFile]) -> None:
    class RefusingBackbone(OverflowingBackbone):
        def preprocess(self, image: object) -> np.ndarray:
            raise ValueError("image too small")

    live = LiveFeatures(RefusingBackbone(), Fingerprint({}))
    reasons = live.contents(images[:2]).unreadable.values()
    assert all(reason.endswith(": image too small") for reason in reasons)
    assert reasons


def test_store_is_shared_between_runs(recipe: Load, images: list[ImageFile], tmp_path: Path) -> None:
    extract(recipe())
    report = extract(recipe(f"run_dir={tmp_path / 'other-run'}"))
    assert report.encoded == 0
    assert len(FeatureStore.open(stage_fingerprint(recipe(), 1))) == len(images)
