"""Messages for pydantic's validation errors, and descriptions of options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llavactl.core.options import ModelId, RecipePath
from llavactl.core.registry import Options
from llavactl.core.validation import describe_options, explain
from llavactl.recipe.load import check


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    x: int = 0


class Everything(Options):
    path: RecipePath
    model: ModelId = "m"
    count: Annotated[int, Field(ge=1, le=9, description="number of items")] = 1
    maybe: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    layer: int | list[int] = -2
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    either: Inner | str | None = None
    many: tuple[Inner, ...] = ()
    pair: tuple[int, int] = (0, 0)
    names: dict[str, int] = Field(default_factory=dict)
    even: int = 0
    anything: Any = None

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


def reasons(**given: Any) -> dict[str, str]:
    try:
        Everything.model_validate({"path": "p", **given})
    except ValidationError as error:
        explained = explain(error, Everything, {"path": "p", **given})
        return {".".join(map(str, path)): reason for path, reason in explained}
    return {}


@pytest.mark.parametrize(
    ("given", "path", "reason"),
    [
        ({"path": 3}, "path", "expected a file or folder, got 3"),
        ({"path": ""}, "path", "expected a file or folder, got ''"),
        ({"model": 4}, "model", "expected a string, got 4"),
        ({"count": "abc"}, "count", "expected an integer ≥ 1 and ≤ 9, got 'abc'"),
        ({"count": 0}, "count", "expected an integer ≥ 1 and ≤ 9, got 0"),
        ({"count": 1.5}, "count", "expected an integer ≥ 1 and ≤ 9, got 1.5"),
        ({"count": None}, "count", "expected an integer ≥ 1 and ≤ 9, got null"),
        ({"maybe": 0}, "maybe", "expected an integer ≥ 1 or null, got 0"),
        ({"share": 1}, "share", "expected a number ≥ 0 and < 1, got 1"),
        ({"layer": "x"}, "layer", "expected an integer or a list, each item an integer, got 'x'"),
        ({"layer": [1, "x"]}, "layer", "expected an integer or a list, each item an integer, got [1, 'x']"),
        ({"many": {}}, "many", "expected a list, each item a mapping, got {}"),
        ({"names": {"a": "x"}}, "names.a", "expected an integer, got 'x'"),
        ({"kind": "c"}, "kind", "expected one of 'a', 'b', got 'c'"),
        ({"inner": []}, "inner", "expected a mapping, got []"),
        ({"inner": {"y": 1}}, "inner.y", "unknown key; available: x"),
        ({"either": 3}, "either", "expected a mapping or a string or null, got 3"),
        ({"many": [{"x": "a"}]}, "many.0.x", "expected an integer, got 'a'"),
        ({"many": [1]}, "many.0", "expected a mapping, got 1"),
        ({"even": 3}, "even", "3 is odd"),
        ({"kin": "a"}, "kin", "unknown key; did you mean 'kind'?"),
        ({"model": ["x"]}, "model", "expected a string, got ['x']"),
        ({"count": "x" * 100}, "count", f"expected an integer ≥ 1 and ≤ 9, got '{'x' * 56}…"),
    ],
)
def test_messages(given: dict[str, Any], path: str, reason: str) -> None:
    assert reasons(**given) == {path: reason}


def test_errors_without_an_expected_type_keep_their_path() -> None:
    assert reasons(pair=[1]).keys() == {"pair.1"}
    assert reasons(pair=[1, 2, 3]).keys() == {"pair"}


def test_a_failed_union_is_reported_once() -> None:
    assert reasons(either={"zz": 1}) == {"either": "expected a mapping or a string or null, got {'zz': 1}"}


def test_descriptions_of_options() -> None:
    described = describe_options(Everything)
    assert described["path"] == "a file or folder; required"
    assert described["count"] == "an integer ≥ 1 and ≤ 9; default 1; number of items"
    assert described["anything"] == "any value; default null"


def test_errors_of_a_model_without_a_json_schema() -> None:
    class Strange(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

        thing: TestCase
        count: int = 1

    with pytest.raises(ValidationError) as caught:
        Strange.model_validate({"thing": 3, "count": "x", "more": 1})
    explained = dict(explain(caught.value, Strange, {"thing": 3, "count": "x", "more": 1}))
    assert set(explained) == {("thing",), ("count",), ("more",)}
    assert describe_options(Strange) == {}


class TestCase:
    """A class that pydantic can't validate."""

    __test__ = False


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("stage2.only=[norm]", "'trainable_modules': a list"),
        ("stage1.final=best", "'restore_best': true or false"),
        ("connector.fold=2", "pixel_shuffle"),
        ("stage1.micro_tokens=100", "micro_batch_tokens"),
        ("stage1.grounding_steps=1", "box_alignment_steps"),
        ("data.stage2=[{name: llava-json, path: a.json, turns: apart}]", "split_turns"),
        ("eval.blind_twin=false", "blind_baseline"),
        ("eval.stage1=true", "stage1_baseline"),
    ],
)
def test_a_renamed_key_suggests_its_new_name(toys: Path, override: str, now: str) -> None:
    (problem,) = check(toys / "recipe.yaml", [override])
    assert now in problem.why
