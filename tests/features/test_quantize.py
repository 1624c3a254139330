"""int8 features: small, near what they stand for, and the same bits whoever reads them."""

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
    """Numbers shaped as CLIP's layer -2: a few channels and a few tokens of huge magnitude."""
    chance = np.random.default_rng(seed)
    made = chance.standard_normal((patches, width)) * np.exp(0.3 * chance.standard_normal(width))
    made[:, [7, width // 3, width - 5]] *= (30, 60, 20)
    made[:, width // 3] += 40
    made[chance.choice(patches, 6, replace=False)] *= 8
    return made.astype(np.float16)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error with every channel brought to one size, so that the huge ones don't hide the others."""
    size = np.sqrt((wanted.astype(np.float64) ** 2).mean(axis=0))
    return float(np.linalg.norm((found - wanted.astype(np.float64)) / size) / np.linalg.norm(wanted / size))


def test_outliers_of_channels_and_tokens_cost_the_others_nothing() -> None:
    features = clip_like()
    assert error(as_stored(features, "int8"), features) < 0.01
    one_scale_a_token = np.abs(features.astype(np.float32)).max(axis=1, keepdims=True) / 127
    assert error(np.rint(features / one_scale_a_token) * one_scale_a_token, features) > 0.1


def test_half_of_float16() -> None:
    shape = FeatureShape((24, 24), 1024)
    assert bytes_of(shape, 1000, 500, "int8") <= 0.51 * bytes_of(shape, 1000, 500)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize(
    ("side", "width", "a_shard"), [(24, 1024, 2), (2, 16, 2), (2, 32, 5), (4, 64, 12), (16, 64, 9)]
)
def test_the_bytes_on_disk_are_foretold(side: int, width: int, a_shard: int, dtype: str) -> None:
    made_with, shape, images = Fingerprint({"dtype": dtype}), FeatureShape((side, side), width), a_shard * 2 - 1
    with StoreWriter(made_with, shape, a_shard) as writer:
        writer.append(
            [content_key(b"%d" % index) for index in range(images)], np.ones((images, side**2, width), np.float16)
        )
    assert writer.bytes_written == bytes_of(shape, images, a_shard, dtype)


@settings(max_examples=200)
@given(
    arrays.arrays(
        np.float16,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(-65504, 65504, width=16, allow_nan=False),
    )
)
def test_any_finite_features_come_back_near_and_finite(features: np.ndarray) -> None:
    integers, scales = quantize(features)
    assert (integers.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (sum(features.shape),))
    found = dequantize(integers, scales)
    assert found.dtype == np.float16
    assert np.isfinite(found).all()
    tokens, channels = scales[: len(features), None], scales[len(features) :]
    # A step at most for what was kept from overflowing, half a step else; and what float16 itself rounds.
    assert (
        np.abs(found.astype(np.float64) - features) <= 1.01 * tokens * channels + np.abs(features) / 1024 + 1e-7
    ).all()
    assert not found[features == 0].any()


def test_numpy_torch_and_any_company_make_the_same_bits() -> None:
    features = clip_like(64, 48)
    integers, scales = quantize(features)
    plain = (integers.astype(np.float32) * scales[:64, None] * scales[64:]).astype(np.float16)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert np.array_equal(dequantize(integers, scales), plain)
    torch.set_num_threads(before)


def test_batches_carry_what_is_stored_and_make_the_same_numbers_of_it(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe("features.dtype=int8"))
    features = open_features(recipe("features.dtype=int8"), 1)
    items = [Encoded((1, *[IMAGE_TOKEN] * 4, 5), (IGNORE,) * 5 + (5,), (image,)) for image in images[:3]]
    wanted = np.stack([features.load(image) for image in images[:3]])
    for batch in (collate(items, features), pack([(0, items[:2]), (5, items[2:])], features)):
        moved = to_device(batch, "cpu")
        assert moved.features is not None
        assert image_features(moved) is not None
        assert moved.features.dtype == torch.int8
        assert np.array_equal(image_features(moved).numpy(), wanted)
    live = collate(items, open_features(recipe("features.dtype=int8", "features.mode=live"), 1, "cpu"))
    assert live.scales is None
    assert live.features is not None
    assert np.array_equal(live.features.numpy(), wanted)


@pytest.mark.parametrize("stage", [1, 2])
def test_cached_is_live_bit_for_bit(recipe: Load, images: list[ImageFile], stage: int) -> None:
    settings = ("features.dtype=int8", "stage1.image=square")
    extract(recipe(*settings))
    cached = open_features(recipe(*settings), stage)
    live = open_features(recipe(*settings, "features.mode=live"), stage, "cpu")
    halves = open_features(recipe("features.mode=live", "stage1.image=square"), stage, "cpu")
    assert cached.fingerprint == live.fingerprint
    assert cached.fingerprint.differences(halves.fingerprint) == ['dtype: "int8", not "float16"']
    for image in images:
        found = cached.load(image)
        assert found.dtype == np.float16
        assert np.array_equal(found, live.load(image))
        assert 0 < error(found, halves.load(image)) < 0.01
    assert verify().sound


def test_the_two_dtypes_are_two_stores(recipe: Load) -> None:
    extract(recipe())
    with pytest.raises(StoreError, match='dtype: "int8", not "float16"'):
        open_features(recipe("features.dtype=int8"), 1)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_plain_h5py_reads_a_shard(count: int) -> None:
    shape = FeatureShape((3, 5), 7, prefix=1)
    made = np.random.default_rng(0).standard_normal((count, 16, 7)).astype(np.float16)
    keys = [content_key(b"%d" % index) for index in range(count)]
    with StoreWriter(INT8, shape, 4) as writer:
        writer.append(keys, made)
    store = FeatureStore.open(INT8)
    assert np.array_equal(
        np.stack([store.read(key) for key in keys]), np.stack([as_stored(each, "int8") for each in made])
    )
    row = 0
    for path in sorted(store.folder.glob("*.h5")):
        with h5py.File(path) as file:
            assert set(file) == {"features", "scales", "keys"}
            assert file["features"].dtype == np.int8
            for values, scales in zip(file["features"], file["scales"], strict=True):
                found = values * scales[:16, None] * scales[16:]
                assert np.array_equal(found.astype(np.float16), store.read(keys[row]))
                row += 1
    assert row == count


def test_a_flipped_scale_is_found(recipe: Load) -> None:
    extract(recipe("features.dtype=int8"))
    path = FeatureStore.open(stage_fingerprint(recipe("features.dtype=int8"), 1)).folder / "shard-00001.h5"
    with h5py.File(path) as file:
        at = file["scales"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[at + 2] ^= 1
    path.write_bytes(data)
    assert [each.file for each in verify().damaged] == [path.name]


def test_a_shard_without_its_scales_is_refused(home: Path) -> None:
    with StoreWriter(INT8, FeatureShape((1, 2), 3), 4) as writer:
        writer.append([content_key(b"x")], np.ones((1, 2, 3), np.float16))
    folder = home / "cache" / "features" / INT8.id
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["shards"][0]["file"]
    spare = path.with_suffix(".spare")
    with h5py.File(path) as file, h5py.File(spare, "w") as other:
        other.attrs.update(file.attrs)
        other["features"], other["keys"] = file["features"][:], file["keys"][:]
    shutil.move(spare, path)
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"is damaged: .*scales"):
        FeatureStore.open(INT8)
