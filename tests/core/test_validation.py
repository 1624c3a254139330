"""What pydantic finds, in words."""

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
    count: Annotated[int, Field(ge=1, le=9, description="how many")] = 1
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
            raise ValueError(f"{value} is odd; LLaVA likes even numbers")
        return value


def why(**given: Any) -> dict[str, str]:
    try:
        Everything.model_validate({"path": "p", **given})
    except ValidationError as error:
        found = explain(error, Everything, {"path": "p", **given})
        return {".".join(map(str, path)): why for path, why in found}
    return {}


@pytest.mark.parametrize(
    ("given", "path", "said"),
    [
        ({"path": 3}, "path", "must be a file or folder, not 3"),
        ({"path": ""}, "path", "must be a file or folder, not ''"),
        ({"model": 4}, "model", "must be a string, not 4"),
        ({"count": "abc"}, "count", "must be an integer ≥ 1 and ≤ 9, not 'abc'"),
        ({"count": 0}, "count", "must be an integer ≥ 1 and ≤ 9, not 0"),
        ({"count": 1.5}, "count", "must be an integer ≥ 1 and ≤ 9, not 1.5"),
        ({"count": None}, "count", "must be an integer ≥ 1 and ≤ 9, not null"),
        ({"maybe": 0}, "maybe", "must be an integer ≥ 1 or null, not 0"),
        ({"share": 1}, "share", "must be a number ≥ 0 and < 1, not 1"),
        ({"layer": "x"}, "layer", "must be an integer or a list, each an integer, not 'x'"),
        ({"layer": [1, "x"]}, "layer", "must be an integer or a list, each an integer, not [1, 'x']"),
        ({"many": {}}, "many", "must be a list, each a mapping, not {}"),
        ({"names": {"a": "x"}}, "names.a", "must be an integer, not 'x'"),
        ({"kind": "c"}, "kind", "must be one of 'a', 'b', not 'c'"),
        ({"inner": []}, "inner", "must be a mapping, not []"),
        ({"inner": {"y": 1}}, "inner.y", "unknown key; available: x"),
        ({"either": 3}, "either", "must be a mapping or a string or null, not 3"),
        ({"many": [{"x": "a"}]}, "many.0.x", "must be an integer, not 'a'"),
        ({"many": [1]}, "many.0", "must be a mapping, not 1"),
        ({"even": 3}, "even", "3 is odd; LLaVA likes even numbers"),
        ({"kin": "a"}, "kin", "unknown key; did you mean 'kind'?"),
        ({"model": ["x"]}, "model", "must be a string, not ['x']"),
        ({"count": "x" * 100}, "count", f"must be an integer ≥ 1 and ≤ 9, not '{'x' * 56}…"),
    ],
)
def test_words(given: dict[str, Any], path: str, said: str) -> None:
    assert why(**given) == {path: said}


def test_what_has_no_words_of_ours_keeps_pydantics() -> None:
    assert why(pair=[1]) == {"pair.1": "is missing"}
    assert "pair" in why(pair=[1, 2, 3])


def test_a_place_is_told_once_however_many_branches_failed() -> None:
    assert why(either={"zz": 1}) == {"either": "must be a mapping or a string or null, not {'zz': 1}"}


def test_options_in_words() -> None:
    described = describe_options(Everything)
    assert described["path"] == "a file or folder; required"
    assert described["count"] == "an integer ≥ 1 and ≤ 9; default 1; how many"
    assert described["anything"] == "any value; default null"


def test_a_model_without_a_schema_still_explains() -> None:
    class Strange(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

        thing: TestCase
        count: int = 1

    with pytest.raises(ValidationError) as caught:
        Strange.model_validate({"thing": 3, "count": "x", "more": 1})
    found = dict(explain(caught.value, Strange, {"thing": 3, "count": "x", "more": 1}))
    assert set(found) == {("thing",), ("count",), ("more",)}
    assert describe_options(Strange) == {}


class TestCase:
    """A class that pydantic knows nothing of."""

    __test__ = False


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("stage2.only=[norm]", "trainable_modules"),
        ("stage1.final=best", "restore_best"),
        ("connector.fold=2", "pixel_shuffle"),
        ("stage1.micro_tokens=100", "micro_batch_tokens"),
        ("stage1.grounding_steps=1", "box_alignment_steps"),
        ("data.stage2=[{name: llava-json, path: a.json, turns: apart}]", "split_turns"),
        ("eval.blind_twin=false", "blind_baseline"),
    ],
)
def test_a_key_of_an_earlier_version_names_its_new_one(toys: Path, override: str, now: str) -> None:
    (problem,) = check(toys / "recipe.yaml", [override])
    assert now in problem.why
