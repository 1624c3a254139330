"""Features by image, cached or live: the same bits, the same answers to bad images."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llavactl import DataError, FeatureShape, ImageFile, StoreError, TransformersVision
from llavactl.features import (
    FeatureStore,
    Fingerprint,
    LiveFeatures,
    extraction,
    open_features,
    stage_fingerprint,
    stage_vision,
)
from llavactl.features.backbone import Backbone, Result
from llavactl.features.extraction import Extraction, encoded
from llavactl.features.prepare import prepare
from llavactl.recipe.frame import Recipe
from llavactl.recipe.sections import Features
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_cached_is_live_bit_for_bit(recipe: Load, images: list[ImageFile], compute: str, stage: int) -> None:
    settings = (f"features.compute={compute}", "stage1.image=square")
    extract(recipe(*settings))
    cached = open_features(recipe(*settings), stage)
    live = open_features(recipe(*settings, "features.mode=live"), stage, "cpu")
    assert cached.shape == live.shape
    assert cached.fingerprint == live.fingerprint == stage_fingerprint(recipe(*settings), stage)
    for image in images:
        ours, theirs = cached.load(image), live.load(image)
        assert ours.dtype == theirs.dtype == np.float16
        assert np.array_equal(ours, theirs)
    assert not np.array_equal(cached.load(images[0]), cached.load(images[1]))


def test_the_stages_preprocess_as_they_say(recipe: Load, images: list[ImageFile]) -> None:
    both = recipe("stage1.image=square")
    assert stage_fingerprint(both, 1).differences(stage_fingerprint(both, 2)) == ['image: "square", not "pad"']
    assert stage_fingerprint(recipe(), 1) == stage_fingerprint(recipe(), 2)
    extract(both)
    long = next(image for image in images if not np.array_equal(*(open_features(both, s).load(image) for s in (1, 2))))
    assert long


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_do_not_depend_on_the_batch(recipe: Load, images: list[ImageFile], dtype: str) -> None:
    encoder = stage_vision(recipe(), 1).load("cpu", dtype)
    pixels = [prepare(encoder, image) for image in images]
    whole = Backbone(encoder, "cpu", 16).encode(pixels)
    assert whole.shape == (len(images), encoder.shape.patches, encoder.shape.width)
    for size in (1, 2, 3, 5, 7):
        for batch_size in (1, 2, 3, 16):
            backbone = Backbone(encoder, "cpu", batch_size)
            parts = [backbone.encode(pixels[at : at + size]) for at in range(0, len(pixels), size)]
            assert np.array_equal(np.concatenate(parts), whole), (size, batch_size)


class Counting:
    """A backbone that notes how many images it gets at once; ``company`` is what a neighbour does to an image."""

    shape = FeatureShape((1, 1), 1)

    def __init__(self, company: float) -> None:
        self.company = company
        self.sizes: list[int] = []

    def preprocess(self, image: object) -> np.ndarray:
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        return pixels.reshape(-1, 1, 1) + self.company * (len(pixels) > 1)


def test_on_the_cpu_batches_are_used_where_they_change_no_bit() -> None:
    pixels = [np.full((1, 1, 1), index, np.float32) for index in range(10)]
    harmless, harmful = Counting(0), Counting(1e-6)
    for encoder in (harmless, harmful):
        features = Backbone(encoder, "cpu", 4).encode(pixels)
        assert np.array_equal(features.reshape(-1), np.arange(10))
    assert harmless.sizes == [1, 1, 1, 1, 4, 4, 1, 1]
    assert harmful.sizes == [1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1]


def test_other_devices_see_one_size_of_group_only() -> None:
    encoder = Counting(0)
    backbone = Backbone(encoder, "cpu:0", 4)  # any device that isn't called "cpu"
    pixels = [np.full((1, 1, 1), index, np.float32) for index in range(6)]
    assert np.array_equal(backbone.encode(pixels).reshape(-1), np.arange(6))
    assert encoder.sizes == [4, 4]


@pytest.mark.parametrize(
    ("device", "order"), [("cpu", "begin 0 end 0 begin 4 end 4"), ("cpu:0", "begin 0 begin 4 end 0 end 4")]
)
def test_another_device_is_given_the_next_group_before_the_last_is_awaited(
    device: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Told(Backbone):
        def start(self, pixels: Sequence[np.ndarray]) -> Callable[[], Result]:
            first = int(pixels[0].item())
            log.append(f"begin {first}")
            wait = super().start(pixels)

            def told() -> Result:
                log.append(f"end {first}")
                return wait()

            return told

    monkeypatch.setattr(extraction, "prepare", lambda _encoder, image, _key: np.full((1, 1, 1), image, np.float32))
    work = Extraction(Told(Counting(0), device, 4), Features(workers=1))
    made = list(encoded({str(index): index for index in range(8)}, work))  # type: ignore[misc]
    assert [key for each in made for key in each.keys] == [str(index) for index in range(8)]
    assert np.array_equal(np.concatenate([each.features for each in made]).reshape(-1), np.arange(8))
    assert " ".join(log) == order


def test_cached_never_loads_the_backbone(
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


def test_without_extract_there_is_an_error_that_says_so(recipe: Load) -> None:
    with pytest.raises(StoreError, match=r"no features for this recipe yet$") as caught:
        open_features(recipe(), 1)
    assert caught.value.hint == "run `llavactl extract`"
    extract(recipe())
    with pytest.raises(StoreError, match=r"layers: \[1\], not \[2\]"):
        open_features(recipe("vision.layer=-3"), 1)


def test_images_not_extracted_yet_are_counted_and_named(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe())
    for index, image in enumerate(images[:5]):
        image.file.write_bytes(images[6].file.read_bytes() + bytes([index]))
    with pytest.raises(StoreError, match=f"5 images have no features yet: {images[0].name}, .*, …") as caught:
        open_features(recipe(), 1).contents(images)
    assert caught.value.hint == "run `llavactl extract`"
    with pytest.raises(StoreError):
        open_features(recipe(), 1).load(images[0])


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_unreadable_images_are_told_with_their_reasons(recipe: Load, images: list[ImageFile], mode: str) -> None:
    images[1].file.unlink()
    images[3].file.write_bytes(b"")
    images[5].file.write_bytes(images[5].file.read_bytes()[:-100])
    if mode == "cached":
        extract(recipe())
    features = open_features(recipe(f"features.mode={mode}"), 1, "cpu")
    found = features.contents(images).unreadable
    assert list(found) == [images[1], images[3], images[5]]
    assert found[images[1]] == "No such file or directory"
    assert found[images[3]] == "the file is empty"
    assert "truncated" in found[images[5]]
    with pytest.raises(DataError, match="can't be read"):
        features.load(images[1])


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_equal_bytes_have_equal_contents(recipe: Load, images: list[ImageFile], mode: str) -> None:
    images[1].file.write_bytes(images[0].file.read_bytes())
    images[3].file.unlink()
    extract(recipe())
    found = open_features(recipe(f"features.mode={mode}"), 1, "cpu").contents(images).keys
    assert found.keys() == set(images) - {images[3]}
    assert found[images[0]] == found[images[1]]
    assert len(set(found.values())) == len(images) - 2


def test_a_cached_reader_can_be_pickled(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe())
    features = open_features(recipe(), 1)
    again = pickle.loads(pickle.dumps(features))
    assert np.array_equal(features.load(images[2]), again.load(images[2]))


def test_a_live_image_is_encoded_once_and_anew_when_its_file_changes(recipe: Load, images: list[ImageFile]) -> None:
    encoder = stage_vision(recipe(), 1).load("cpu", "float32")
    live = LiveFeatures(encoder, stage_fingerprint(recipe(), 1))
    first = live.load(images[0])
    first[:] = 0
    before = live.load(images[0])
    assert before.any(), "what is kept is not what was given away"
    assert live._recent.cache_info().hits == 1
    images[0].file.write_bytes(images[1].file.read_bytes())
    assert np.array_equal(live.load(images[0]), live.load(images[1]))
    assert not np.array_equal(live.load(images[0]), before)


class Overflowing:
    """A backbone whose features grow with the brightness of the image."""

    shape = FeatureShape((1, 1), 1)

    def preprocess(self, image: object) -> np.ndarray:
        return np.asarray(image, np.float32).mean().reshape(1, 1, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(-1, 1, 1) * 1000


def test_live_features_that_overflow_float16_are_refused(images: list[ImageFile]) -> None:
    live = LiveFeatures(Overflowing(), Fingerprint({}))
    with pytest.raises(DataError, match="not finite in float16"):
        live.load(images[0])


def test_a_backbone_that_refuses_an_image_is_a_reason_and_not_a_crash(images: list[ImageFile]) -> None:
    class Picky(Overflowing):
        def preprocess(self, image: object) -> np.ndarray:
            raise ValueError("too small for me")

    live = LiveFeatures(Picky(), Fingerprint({}))
    reasons = live.contents(images[:2]).unreadable.values()
    assert all(reason.endswith(": too small for me") for reason in reasons)
    assert reasons


def test_the_store_is_shared_between_runs(recipe: Load, images: list[ImageFile], tmp_path: Path) -> None:
    extract(recipe())
    again = extract(recipe(f"run_dir={tmp_path / 'elsewhere'}"))
    assert again.encoded == 0
    assert len(FeatureStore.open(stage_fingerprint(recipe(), 1))) == len(images)
