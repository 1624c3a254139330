"""The fingerprint: the same for the same numbers, another for anything that changes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from llavactl.features import Fingerprint
from llavactl.features.fingerprint import of_identity
from llavactl.recipe.sections import Features

FIELDS = {"backbone": "toy", "layers": [2], "image": "pad"}


def fingerprint(fields: Mapping[str, Any], features: Features, **component: Any) -> Fingerprint:
    return of_identity({"name": "toy", "version": "1", "options": {}, **component, "identity": fields}, features)


def test_the_id_never_changes() -> None:
    """Stores of earlier versions are found by it."""
    assert Fingerprint({"a": 1, "b": [2, "ü"]}).id == "163397a6bcd326c1"


def test_the_order_of_fields_and_tuples_do_not_matter() -> None:
    reordered = {"image": "pad", "layers": (2,), "backbone": "toy"}
    assert fingerprint(FIELDS, Features()) == fingerprint(reordered, Features())
    assert fingerprint(FIELDS, Features()).id == fingerprint(reordered, Features()).id


@pytest.mark.parametrize("changed", [{"backbone": "other"}, {"layers": [3]}, {"image": "square"}, {"new": None}])
def test_every_field_of_the_identity_counts(changed: dict[str, Any]) -> None:
    before, after = (fingerprint(fields, Features()) for fields in (FIELDS, FIELDS | changed))
    assert before.id != after.id
    assert [line.split(":")[0] for line in before.differences(after)] == list(changed)


@pytest.mark.parametrize("changed", [{"name": "other"}, {"version": "2"}, {"options": {"scale": 2}}])
def test_backbones_that_say_nothing_of_themselves_share_no_features(changed: dict[str, Any]) -> None:
    assert fingerprint({}, Features()).id != fingerprint({}, Features(), **changed).id


def test_a_model_is_known_by_its_weights_where_they_are_in_the_identity() -> None:
    here, there = ({"model": {"sha256": name}, "layer": -2} for name in ("one", "two"))
    known = FIELDS | {"weights": "the same"}
    assert fingerprint(known, Features(), options=here) == fingerprint(known, Features(), options=there)
    assert fingerprint({}, Features(), options=here) != fingerprint({}, Features(), options=there)


def test_computing_in_another_precision_is_another_fingerprint() -> None:
    before = fingerprint(FIELDS, Features())
    after = fingerprint(FIELDS, Features(compute="bfloat16"))
    assert before.differences(after) == ['compute: "float32", not "bfloat16"']


def test_how_it_is_batched_and_stored_is_not_part_of_it() -> None:
    other = Features(batch_size=3, workers=5, shard_images=7, mode="live")
    assert fingerprint(FIELDS, Features()).id == fingerprint(FIELDS, other).id


def test_differences_show_both_values_and_what_is_absent() -> None:
    ours, theirs = Fingerprint({"a": 1, "b": "x", "c": True}), Fingerprint({"a": 2, "c": True, "d": None})
    assert ours.differences(theirs) == ["a: 1, not 2", 'b: "x", not nothing', "d: nothing, not null"]
    assert ours.differences(ours) == []


@pytest.mark.parametrize("field", ["dtype", "compute", "format", "component", "own"])
def test_identity_fields_with_reserved_names_are_kept(field: str) -> None:
    one, other = (fingerprint({field: value}, Features()) for value in ("a", "b"))
    assert one.id != other.id
    assert one.fields["dtype"] == "float16"
