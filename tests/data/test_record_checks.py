"""What check says of a record, and what mending makes of it, against what the source takes."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.components.sources.llava_json import TAG, sample_of
from llavactl.core.errors import DataError
from llavactl.data.mend import mend
from llavactl.data.problems import KINDS, REFUSED
from llavactl.data.record_checks import examine

ROOT = "/images"
REAL = Path(__file__).parents[3] / "shared" / "data" / "llava" / "llava_instruct_100.json"

SPEAKERS = st.sampled_from(["human", "gpt", "system", "user", "assistant", "Human", "bot", "nobody", 3, None, []])
TEXTS = st.sampled_from(["What?", "A dog.", "", " ", f"{TAG}\nWhat?", f"What?\n{TAG}", f"{TAG} or {TAG}?", TAG, 7])
MESSAGES = st.fixed_dictionaries({"from": SPEAKERS, "value": TEXTS}) | st.sampled_from([{}, "hi", {"from": "gpt"}])
IMAGES = st.sampled_from([None, "", "a.jpg", "../a.jpg", "/a.jpg", ["a.jpg", "b.jpg"], [], ["a.jpg", 3], {"x": 1}])
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from([1, "x", None]),
        "image": IMAGES,
        "conversations": st.lists(MESSAGES, max_size=7) | st.sampled_from([None, "hi"]),
    },
)
LIKELY = st.fixed_dictionaries(
    {
        "id": st.just("x"),
        "image": st.sampled_from(["a.jpg", ["a.jpg", "b.jpg"], None]),
        "conversations": st.lists(
            st.fixed_dictionaries(
                {"from": st.sampled_from(["human", "gpt", "Human", "system"]), "value": TEXTS.filter(lambda t: t != 7)}
            ),
            max_size=7,
        ),
    }
)


def taken(record: Any) -> bool:
    try:
        sample_of(record, "here", ROOT)
    except DataError:
        return False
    return True


def kinds(record: Any) -> set[str]:
    return {finding.kind for finding in examine(record, ROOT)[0]}


@settings(max_examples=600)
@given(RECORDS | LIKELY | st.sampled_from([3, None, []]))
def test_check_finds_fault_just_where_the_source_does(record: Any) -> None:
    found = kinds(record)
    assert found <= KINDS.keys()
    assert taken(record) == (not found & REFUSED)


@settings(max_examples=600)
@given(RECORDS | LIKELY)
def test_a_mended_record_is_taken_and_needs_no_more(record: dict[str, Any]) -> None:
    before = copy.deepcopy(record)
    mended, did = mend(record, ROOT)
    assert record == before
    if mended is None:
        assert did[-1].startswith("dropped")
        return
    assert taken(mended)
    assert not {kind for kind in kinds(mended) if KINDS[kind].effect != "noted"}
    assert mend(mended, ROOT) == (mended, [])
    if not did:
        assert mended is record


@settings(max_examples=300)
@given(LIKELY)
def test_what_can_be_trained_is_not_dropped(record: dict[str, Any]) -> None:
    """A question followed by an answer with text is enough, whoever else speaks."""
    talk = [message for message in record["conversations"] if message["from"] != "system"]
    pairs = itertools.pairwise(talk)
    if any(a["from"] != "gpt" and b["from"] == "gpt" and b["value"].strip() for a, b in pairs):
        assert mend(record, ROOT)[0] is not None


SAID = {"from": "human", "value": f"{TAG}\nWhat?"}, {"from": "gpt", "value": "A dog."}
CASES: list[tuple[Any, str, Any]] = [
    ([{"from": "Human", "value": "Hi"}, {"from": "bot", "value": "Yes"}], "role", [("human", "Hi"), ("gpt", "Yes")]),
    ([*SAID, {"from": "human", "value": "More?"}, {"from": "gpt", "value": " "}], "empty-answer", [*SAID]),
    ([SAID[0], SAID[0], SAID[1]], "turns", [("human", f"{TAG}\nWhat?\nWhat?"), ("gpt", "A dog.")]),
    ([{"from": "human", "value": f"{TAG}{TAG} Hi"}, SAID[1]], "tags", [("human", f"{TAG} Hi"), SAID[1]]),
    ([{"from": "human", "value": "Hi"}], "no-answer", None),
]


@pytest.mark.parametrize(("messages", "kind", "wanted"), CASES)
def test_mending_keeps_what_was_said(messages: Any, kind: str, wanted: Any) -> None:
    record = {"id": 1, "image": "a.jpg", "conversations": messages, "extra": "kept"}
    assert kind in kinds(record)
    mended, _ = mend(record, ROOT)
    if wanted is None:
        assert mended is None
        return
    said = [(each["from"], each["value"]) if isinstance(each, dict) else each for each in wanted]
    assert mended is not None
    assert [(each["from"], each["value"]) for each in mended["conversations"]] == said
    assert mended["extra"] == "kept"


def test_missing_tags_stand_behind_the_last_one() -> None:
    record = {"image": ["a.jpg", "b.jpg", "c.jpg"], "conversations": list(SAID)}
    mended, did = mend(record, ROOT)
    assert mended is not None
    assert mended["conversations"][0]["value"] == f"{TAG}\n{TAG}\n{TAG}\nWhat?"
    assert did == ["1 <image> tags made 3"]


@pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")
def test_real_records_have_nothing_wrong() -> None:
    for record in json.loads(REAL.read_text()):
        assert kinds(record) == set()
        assert mend(record, ROOT) == (record, [])
