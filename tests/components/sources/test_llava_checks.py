"""Checks and repairs of LLaVA records agree with what the source llava-json accepts."""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.components.sources.llava_checks import REFUSED, llava_findings
from llavactl.components.sources.llava_json import llava_sample
from llavactl.components.sources.llava_record import TAG, foreign_placeholder, names_images, tag_fault
from llavactl.components.sources.llava_repair import repair
from llavactl.core.errors import DataError
from llavactl.curation.problems import KINDS
from llavactl.files.records import image_names
from llavactl.images.references import ImageBytes

ROOT = "/images"
FIXTURES = Path(__file__).parents[2] / "fixtures"
REAL = Path(__file__).parents[4] / "shared" / "data" / "llava" / "llava_instruct_100.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")

SPEAKERS = st.sampled_from(["human", "gpt", "system", "user", "assistant", "Human", "bot", "nobody", 3, None, []])
TEXTS = st.sampled_from(
    ["What?", "A dog.", "", " ", f"{TAG}\nWhat?", f"What?\n{TAG}", f"{TAG} or {TAG}?", TAG, 7, "<|image_1|> What?"]
) | st.sampled_from(["<video>\nWhat?", "<img>a.jpg</img> What?"])
MESSAGES = st.fixed_dictionaries(
    {"from": SPEAKERS, "value": TEXTS},
    optional={"image": st.sampled_from([None, "a.jpg"]), "audio": st.just(["x.wav"]), "loss": st.booleans()},
) | st.sampled_from([{}, "hi", {"from": "gpt"}])
IMAGES = st.sampled_from(
    [None, "", "a.jpg", "../a.jpg", "/a.jpg", ["a.jpg", "b.jpg"], [], ["a.jpg", 3], {"x": 1}, [["a.jpg"]], [""], 0]
) | st.sampled_from([{"path": "a.jpg", "bytes": None}, [{"path": "a.jpg"}]])
MEDIA = st.sampled_from([None, "", [], "x.mp4", ["x.mp4"], [None], {"path": "x.mp4"}, 3, False])
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from([1, "x", None, True, [], ""]),
        "image": IMAGES,
        "images": IMAGES,
        "video": MEDIA,
        "Image": MEDIA,
        "image_path": MEDIA,
        "system": st.just("Be brief."),
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


def accepted(record: Any) -> bool:
    try:
        llava_sample(record, "a.json:1", ROOT)
    except DataError:
        return False
    return True


def kinds(record: Any) -> set[str]:
    return {finding.kind for finding in llava_findings(record, ROOT)[0]}


@settings(max_examples=600)
@given(RECORDS | LIKELY | st.sampled_from([3, None, []]))
def test_check_refuses_what_the_source_refuses(record: Any) -> None:
    found = kinds(record)
    assert found <= KINDS.keys()
    assert accepted(record) == (not found & REFUSED)


@settings(max_examples=600)
@given(RECORDS | LIKELY)
def test_a_repaired_record_is_accepted_and_needs_no_repair(record: dict[str, Any]) -> None:
    before = copy.deepcopy(record)
    repaired, changes = repair(record, ROOT)
    assert record == before
    if repaired is None:
        assert changes[-1].startswith("dropped")
        return
    assert accepted(repaired)
    assert not {kind for kind in kinds(repaired) if KINDS[kind].effect != "noted"}
    assert repair(repaired, ROOT) == (repaired, [])
    if not changes:
        assert repaired is record


def question_words(record: dict[str, Any]) -> list[str]:
    """The words and tags of the user's turns, in order."""
    texts = (str(each["value"]) for each in record["conversations"] if each["from"] in ("human", "user", "Human"))
    return [word for text in texts for word in re.findall(rf"{TAG}|\S+", text)]


@settings(max_examples=300)
@given(LIKELY)
def test_trainable_records_are_not_dropped(record: dict[str, Any]) -> None:
    """A question followed by an answer with text is enough, with one image or none."""
    talk = [message for message in record["conversations"] if message["from"] != "system"]
    pairs = itertools.pairwise(talk)
    images = len(image_names(record))
    texts = [message["value"] for message in record["conversations"] if message["from"] in ("human", "Human")]
    if images > 1 or tag_fault(texts, images, named=names_images(record)) or foreign_placeholder(texts, images=True):
        return
    if any(a["from"] != "gpt" and b["from"] == "gpt" and b["value"].strip() for a, b in pairs):
        assert repair(record, ROOT)[0] is not None


@settings(max_examples=600)
@given(RECORDS | LIKELY)
def test_repair_keeps_the_tags_of_kept_questions(record: dict[str, Any]) -> None:
    """Questions may be removed with their tags; the others keep their images."""
    repaired, _ = repair(record, ROOT)
    if repaired is None:
        return
    assert (repaired.get("image"), repaired.get("images")) == (record.get("image"), record.get("images"))
    before, after = question_words(record), question_words(repaired)
    images = len(image_names(repaired))
    if images > 1:
        assert after.count(TAG) in (0, images, before.count(TAG))
        assert after.count(TAG) >= before.count(TAG)
    else:
        assert after.count(TAG) <= before.count(TAG)


PAIR = {"from": "human", "value": f"{TAG}\nWhat?"}, {"from": "gpt", "value": "A dog."}
CASES: list[tuple[Any, str, Any]] = [
    ([{"from": "Human", "value": "Hi"}, {"from": "bot", "value": "Yes"}], "role", [("human", "Hi"), ("gpt", "Yes")]),
    ([*PAIR, {"from": "human", "value": "More?"}, {"from": "gpt", "value": " "}], "empty-answer", [*PAIR]),
    (
        [PAIR[0], {"from": "human", "value": "What?"}, PAIR[1]],
        "turns",
        [("human", f"{TAG}\nWhat?\nWhat?"), ("gpt", "A dog.")],
    ),
    ([*PAIR, *PAIR], "tags", None),
    ([{"from": "human", "value": "Hi"}], "no-answer", None),
]


@pytest.mark.parametrize(("messages", "kind", "expected"), CASES)
def test_repair_keeps_all_usable_messages(messages: Any, kind: str, expected: Any) -> None:
    record = {"id": 1, "image": "a.jpg", "conversations": messages, "extra": "kept"}
    assert kind in kinds(record)
    repaired, _ = repair(record, ROOT)
    if expected is None:
        assert repaired is None
        return
    pairs = [(each["from"], each["value"]) if isinstance(each, dict) else each for each in expected]
    assert repaired is not None
    assert [(each["from"], each["value"]) for each in repaired["conversations"]] == pairs
    assert repaired["extra"] == "kept"


@pytest.mark.parametrize("image", [{}, {"image": "a.jpg"}])
def test_repair_keeps_tags_that_are_text_or_repeated(image: dict[str, str]) -> None:
    question = f"{TAG}\nTwo {TAG} tags?"
    record = {"id": 1, **image, "conversations": [{"from": "Human", "value": question}, PAIR[1]]}
    repaired, _ = repair(record, ROOT)
    assert repaired is not None
    assert repaired["conversations"][0] == {"from": "human", "value": question}


def test_missing_tags_are_added_after_the_last_one() -> None:
    record = {"image": ["a.jpg", "b.jpg", "c.jpg"], "conversations": list(PAIR)}
    repaired, changes = repair(record, ROOT)
    assert repaired is not None
    assert repaired["conversations"][0]["value"] == f"{TAG}\n{TAG}\n{TAG}\nWhat?"
    assert changes == ["added 2 <image> tags"]


UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    ("media", {"video": "x.mp4"}),
    ("media", {"videos": ["x.mp4"]}),
    ("media", {"audio": "x.wav"}),
    ("media", {"image": "a.jpg", "audios": ["x.wav"]}),
    ("media", {"Images": ["a.jpg"]}),
    ("media", {"image_path": "a.jpg"}),
    ("media", {"img": {"path": "a.jpg"}}),
    ("record", {"images": [["a.jpg"]]}),
    ("record", {"images": [{"path": "a.jpg", "bytes": None}]}),
    ("record", {"image": "a.jpg", "images": ["b.jpg"]}),
]


@pytest.mark.parametrize(("kind", "names"), UNSUPPORTED)
@pytest.mark.parametrize("tag", ["", f"{TAG}\n"])
def test_images_under_unsupported_keys_are_refused(kind: str, names: dict[str, Any], tag: str) -> None:
    record = {"id": 1, **names, "conversations": [{"from": "human", "value": f"{tag}What?"}, PAIR[1]]}
    assert kind in kinds(record)
    with pytest.raises(DataError, match=r"^a\.json:1: "):
        llava_sample(record, "a.json:1", ROOT)
    assert repair(record, ROOT)[0] is None


@pytest.mark.parametrize("extra", [{"image_url": "http://x/a.jpg"}, {"picture": None}, {"video": ""}, {"photo_id": 3}])
def test_other_keys_are_kept_as_extra(extra: dict[str, Any]) -> None:
    record = {"id": 1, "image": "a.jpg", **extra, "conversations": list(PAIR)}
    assert kinds(record) == set()
    assert llava_sample(record, "a.json:1", ROOT).extra == extra


@pytest.mark.parametrize("value", ["a.jpg", ["a.jpg"]])
def test_images_equals_image(value: Any) -> None:
    one, other = ({"id": 1, key: value, "conversations": list(PAIR)} for key in ("image", "images"))
    assert llava_sample(one, "a.json:1", ROOT) == llava_sample(other, "a.json:1", ROOT)
    assert llava_sample({**one, "images": value}, "a.json:1", ROOT) == llava_sample(one, "a.json:1", ROOT)
    assert llava_sample({**one, "images": []}, "a.json:1", ROOT) == replace(
        llava_sample(one, "a.json:1", ROOT), extra={}
    ), "an empty list names nothing"
    assert kinds(other) == set()
    assert repair(other, ROOT) == (other, [])


PLACEHOLDERS = ["<video>", "<|image|>", "<|image_pad|>", "<image_1>", "<ImageHere>", "<Image>", "<img>", "[IMG]"]


@pytest.mark.parametrize("placeholder", [*PLACEHOLDERS, "<start_of_image>", "<image-placeholder>", "<im_patch>"])
def test_another_tools_placeholder_is_refused_in_a_record_with_images(placeholder: str) -> None:
    messages = [{"from": "human", "value": f"{placeholder}\nWhat?"}, PAIR[1]]
    assert "placeholder" in kinds({"id": 1, "image": "a.jpg", "conversations": messages})
    assert kinds({"id": 1, "conversations": messages}) == {"placeholder-text"}
    both = [{"from": "human", "value": f"{TAG}\nWhat is {placeholder} for?"}, PAIR[1]]
    assert kinds({"id": 1, "image": "a.jpg", "conversations": both}) == set()


@pytest.mark.parametrize("word", ["<imagery>", "<important>", "<b>", "[img.png]", "<imagine that>", "x < image > y?"])
def test_similar_words_are_not_placeholders(word: str) -> None:
    messages = [{"from": "human", "value": f"{word} What?"}, PAIR[1]]
    assert ("placeholder" in kinds({"id": 1, "image": "a.jpg", "conversations": messages})) == (word[0] == "x")


def test_an_answer_excluded_from_training_is_refused() -> None:
    for mark in ({"weight": 0}, {"loss": False}, {"train": False}):
        assert "message" in kinds({"id": 1, "conversations": [{"from": "human", "value": "A"}, {**PAIR[1], **mark}]})
    fine = [{"from": "human", "value": "A", "loss": False}, {**PAIR[1], "weight": 1, "loss": True}]
    assert kinds({"id": 1, "conversations": fine}) == set()


@pytest.mark.parametrize(
    "file",
    [
        FIXTURES / "instruct.json",
        FIXTURES / "pretrain.json",
        pytest.param(REAL, marks=needs_real),
    ],
    ids=lambda file: file.name,
)
def test_valid_records_have_no_problem(file: Path) -> None:
    for record in json.loads(file.read_text(encoding="utf-8")):
        assert kinds(record) == set()
        assert repair(record, ROOT) == (record, [])


def test_images_of_other_sources_are_named_by_a_mapping() -> None:
    images = {"1": ImageBytes("1", "1" * 64, b"")}
    record = {"id": 1, "image": "1", "conversations": list(PAIR)}
    assert llava_findings(record, images) == ([], [images["1"]])
    assert llava_sample(record, "a.json:1", images).images == (images["1"],)
    assert [finding.kind for finding in llava_findings({**record, "image": "2"}, images)[0]] == ["image-path"]
    with pytest.raises(DataError, match=r"^a\.json:1: "):
        llava_sample({**record, "image": "2"}, "a.json:1", images)
