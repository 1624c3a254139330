"""int8 features: half the size, small errors, bit-identical whether cached or live."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llavactl import FeatureShape, ImageFile, StoreError
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded
from llavactl.data.batches import collate, pack
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key, open_features, stage_fingerprint
from llavactl.features.quantize import as_stored, dequantize, quantize
from llavactl.features.shards import bytes_of
from llavactl.model.inputs import image_features, to_device
from llavactl.recipe.frame import Recipe
from llavactl.verbs.cache import verify
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]

INT8 = Fingerprint({"backbone": "toy", "dtype": "int8"})


def clip_like(patches: int = 576, width: int = 1024, seed: int = 0) -> np.ndarray:
    """Values like those of CLIP's layer -2: a few outlier channels and a few outlier tokens."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((patches, width)) * np.exp(0.3 * rng.standard_normal(width))
    features[:, [7, width // 3, width - 5]] *= (30, 60, 20)
    features[:, width // 3] += 40
    features[rng.choice(patches, 6, replace=False)] *= 8
    return features.astype(np.float16)


def normalized_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative error after scaling every channel to the same size; otherwise outlier channels would dominate."""
    size = np.sqrt((expected.astype(np.float64) ** 2).mean(axis=0))
    return float(np.linalg.norm((actual - expected.astype(np.float64)) / size) / np.linalg.norm(expected / size))


def test_outlier_channels_and_tokens_do_not_increase_the_error_of_others() -> None:
    features = clip_like()
    assert normalized_error(as_stored(features, "int8"), features) < 0.01
    token_scales = np.abs(features.astype(np.float32)).max(axis=1, keepdims=True) / 127
    assert normalized_error(np.rint(features / token_scales) * token_scales, features) > 0.1


def test_int8_takes_half_the_bytes_of_float16() -> None:
    shape = FeatureShape((24, 24), 1024)
    assert bytes_of(shape, 1000, 500, "int8") <= 0.51 * bytes_of(shape, 1000, 500)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize(
    ("side", "width", "shard_images"), [(24, 1024, 2), (2, 16, 2), (2, 32, 5), (4, 64, 12), (16, 64, 9)]
)
def test_bytes_on_disk_are_predicted(side: int, width: int, shard_images: int, dtype: str) -> None:
    fingerprint, shape, images = Fingerprint({"dtype": dtype}), FeatureShape((side, side), width), shard_images * 2 - 1
    with StoreWriter(fingerprint, shape, shard_images) as writer:
        writer.append(
            [content_key(b"%d" % index) for index in range(images)], np.ones((images, side**2, width), np.float16)
        )
    assert writer.bytes_written == bytes_of(shape, images, shard_images, dtype)


@settings(max_examples=200)
@given(
    arrays.arrays(
        np.float16,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(-65504, 65504, width=16, allow_nan=False),
    )
)
def test_round_trip_error_is_bounded_and_finite(features: np.ndarray) -> None:
    integers, scales = quantize(features)
    assert (integers.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (sum(features.shape),))
    restored = dequantize(integers, scales)
    assert restored.dtype == np.float16
    assert np.isfinite(restored).all()
    tokens, channels = scales[: len(features), None], scales[len(features) :]
    # At most one step for values kept from overflowing, otherwise half a step, plus the rounding of float16.
    assert (
        np.abs(restored.astype(np.float64) - features) <= 1.01 * tokens * channels + np.abs(features) / 1024 + 1e-7
    ).all()
    assert not restored[features == 0].any()


def test_numpy_and_torch_give_the_same_bits_for_any_thread_count() -> None:
    features = clip_like(64, 48)
    integers, scales = quantize(features)
    expected = (integers.astype(np.float32) * scales[:64, None] * scales[64:]).astype(np.float16)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert np.array_equal(dequantize(integers, scales), expected)
    torch.set_num_threads(before)


def test_batches_carry_int8_and_dequantize_to_the_same_features(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe("features.dtype=int8"))
    features = open_features(recipe("features.dtype=int8"), 1)
    items = [Encoded((1, *[IMAGE_TOKEN] * 4, 5), (IGNORE,) * 5 + (5,), (image,)) for image in images[:3]]
    expected = np.stack([features.load(image) for image in images[:3]])
    for batch in (collate(items, features), pack([(0, items[:2]), (5, items[2:])], features)):
        moved = to_device(batch, "cpu")
        assert moved.features is not None
        assert image_features(moved) is not None
        assert moved.features.dtype == torch.int8
        assert np.array_equal(image_features(moved).numpy(), expected)
    live = collate(items, open_features(recipe("features.dtype=int8", "features.mode=live"), 1, "cpu"))
    assert live.scales is None
    assert live.features is not None
    assert np.array_equal(live.features.numpy(), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_cached_and_live_features_are_bit_identical(recipe: Load, images: list[ImageFile], stage: int) -> None:
    settings = ("features.dtype=int8", "stage1.image=square")
    extract(recipe(*settings))
    cached = open_features(recipe(*settings), stage)
    live = open_features(recipe(*settings, "features.mode=live"), stage, "cpu")
    float16 = open_features(recipe("features.mode=live", "stage1.image=square"), stage, "cpu")
    assert cached.fingerprint == live.fingerprint
    (difference,) = cached.fingerprint.differences(float16.fingerprint)
    assert difference.startswith("dtype: ")
    for image in images:
        features = cached.load(image)
        assert features.dtype == np.float16
        assert np.array_equal(features, live.load(image))
        assert 0 < normalized_error(features, float16.load(image)) < 0.01
    assert verify().sound


def test_dtypes_have_separate_stores(recipe: Load) -> None:
    extract(recipe())
    with pytest.raises(StoreError, match=r'dtype: .*"int8".*"float16"'):
        open_features(recipe("features.dtype=int8"), 1)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_shard_is_readable_with_plain_h5py(count: int) -> None:
    shape = FeatureShape((3, 5), 7, prefix=1)
    features = np.random.default_rng(0).standard_normal((count, 16, 7)).astype(np.float16)
    keys = [content_key(b"%d" % index) for index in range(count)]
    with StoreWriter(INT8, shape, 4) as writer:
        writer.append(keys, features)
    store = FeatureStore.open(INT8)
    assert np.array_equal(
        np.stack([store.read(key) for key in keys]), np.stack([as_stored(image, "int8") for image in features])
    )
    row = 0
    for path in sorted(store.folder.glob("*.h5")):
        with h5py.File(path) as file:
            assert set(file) == {"features", "scales", "keys"}
            assert file["features"].dtype == np.int8
            for values, scales in zip(file["features"], file["scales"], strict=True):
                restored = values * scales[:16, None] * scales[16:]
                assert np.array_equal(restored.astype(np.float16), store.read(keys[row]))
                row += 1
    assert row == count


def test_flipped_bit_in_the_scales_is_detected(recipe: Load) -> None:
    extract(recipe("features.dtype=int8"))
    path = FeatureStore.open(stage_fingerprint(recipe("features.dtype=int8"), 1)).folder / "shard-00001.h5"
    with h5py.File(path) as file:
        offset = file["scales"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 2] ^= 1
    path.write_bytes(data)
    assert [shard.file for shard in verify().damaged] == [path.name]


def test_shard_without_scales_is_refused(home: Path) -> None:
    with StoreWriter(INT8, FeatureShape((1, 2), 3), 4) as writer:
        writer.append([content_key(b"x")], np.ones((1, 2, 3), np.float16))
    folder = home / "cache" / "features" / INT8.id
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["shards"][0]["file"]
    replacement = path.with_suffix(".replacement")
    with h5py.File(path) as file, h5py.File(replacement, "w") as other:
        other.attrs.update(file.attrs)
        other["features"], other["keys"] = file["features"][:], file["keys"][:]
    shutil.move(replacement, path)
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"is damaged: .*scales"):
        FeatureStore.open(INT8)
