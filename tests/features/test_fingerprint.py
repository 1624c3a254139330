"""The fingerprint is equal for identical features and differs with anything that changes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from llavactl.features import Fingerprint
from llavactl.features.fingerprint import identity_fingerprint
from llavactl.recipe.sections import Features

FIELDS = {"backbone": "toy", "layers": [2], "image": "pad"}


def fingerprint(fields: Mapping[str, Any], features: Features, **component: Any) -> Fingerprint:
    return identity_fingerprint(
        {"name": "toy", "version": "1", "options": {}, **component, "identity": fields}, features
    )


def test_id_is_stable_across_versions() -> None:
    """Existing stores are found by it."""
    assert Fingerprint({"a": 1, "b": [2, "ü"]}).id == "163397a6bcd326c1"


def test_field_order_and_tuples_do_not_matter() -> None:
    reordered = {"image": "pad", "layers": (2,), "backbone": "toy"}
    assert fingerprint(FIELDS, Features()) == fingerprint(reordered, Features())
    assert fingerprint(FIELDS, Features()).id == fingerprint(reordered, Features()).id


@pytest.mark.parametrize("changed", [{"backbone": "other"}, {"layers": [3]}, {"image": "square"}, {"new": None}])
def test_every_identity_field_changes_the_id(changed: dict[str, Any]) -> None:
    before, after = (fingerprint(fields, Features()) for fields in (FIELDS, FIELDS | changed))
    assert before.id != after.id
    assert [line.split(":")[0] for line in before.differences(after)] == list(changed)


@pytest.mark.parametrize("changed", [{"name": "other"}, {"version": "2"}, {"options": {"scale": 2}}])
def test_backbones_without_identity_fields_share_no_features(changed: dict[str, Any]) -> None:
    assert fingerprint({}, Features()).id != fingerprint({}, Features(), **changed).id


def test_weights_in_the_identity_replace_the_model_option() -> None:
    one, two = ({"model": {"sha256": name}, "layer": -2} for name in ("one", "two"))
    with_weights = FIELDS | {"weights": "the same"}
    assert fingerprint(with_weights, Features(), options=one) == fingerprint(with_weights, Features(), options=two)
    assert fingerprint({}, Features(), options=one) != fingerprint({}, Features(), options=two)


def test_weights_in_the_identity_replace_the_models_of_nested_options() -> None:
    """As in a backbone that is made of others."""
    one, two, other = (
        {"parts": [{"model": model, "layer": layer}, {"model": "hub/model"}]}
        for model, layer in (({"sha256": "one"}, -2), ({"id": "hub/two", "commit": "2"}, -2), ({"sha256": "one"}, -1))
    )
    with_weights = FIELDS | {"weights": ["the", "same"]}
    assert fingerprint(with_weights, Features(), options=one) == fingerprint(with_weights, Features(), options=two)
    assert fingerprint(with_weights, Features(), options=one) != fingerprint(with_weights, Features(), options=other)
    assert fingerprint({}, Features(), options=one) != fingerprint({}, Features(), options=two)


def test_compute_dtype_is_part_of_the_fingerprint() -> None:
    before = fingerprint(FIELDS, Features())
    after = fingerprint(FIELDS, Features(compute="bfloat16"))
    (difference,) = before.differences(after)
    assert re.fullmatch(r'compute: .*"float32".*"bfloat16"', difference)


def test_batching_and_sharding_are_not_part_of_the_fingerprint() -> None:
    other = Features(batch_size=3, workers=5, shard_images=7, mode="live")
    assert fingerprint(FIELDS, Features()).id == fingerprint(FIELDS, other).id


def test_differences_show_both_values_including_unset_fields() -> None:
    ours, theirs = Fingerprint({"a": 1, "b": "x", "c": True}), Fingerprint({"a": 2, "c": True, "d": None})
    differences = ours.differences(theirs)
    assert [line.split(":")[0] for line in differences] == ["a", "b", "d"]
    patterns = [r"\b1\b.*\b2\b", '"x".*unset', "unset.*null"]
    assert all(re.search(pattern, line) for pattern, line in zip(patterns, differences, strict=True))
    assert ours.differences(ours) == []


@pytest.mark.parametrize("field", ["dtype", "compute", "format", "component", "own"])
def test_identity_fields_with_reserved_names_are_kept(field: str) -> None:
    one, other = (fingerprint({field: value}, Features()) for value in ("a", "b"))
    assert one.id != other.id
    assert one.fields["dtype"] == "float16"
