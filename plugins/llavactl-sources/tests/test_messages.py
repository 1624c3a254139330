"""Records of other tools: the samples of every form, and what is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llavactl import DataError, ImageFile, Sample
from llavactl.testing import check_source, toy_records

QUESTION = {"role": "user", "content": "<image>What?"}
ANSWER = {"role": "assistant", "content": "A dog."}
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture
def source_of(create: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function that writes records, and returns their source."""

    def source(*records: Any, **options: Any) -> Any:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return create("messages", path=path, **options)

    return source


def dialog(sample: Sample) -> list[tuple[str, ...]]:
    """The role and content of every turn, images by name in angle brackets."""
    return [
        (turn.role, *(part if isinstance(part, str) else f"<{part.name}>" for part in turn.content))
        for turn in sample.turns
    ]


WHAT = ("user", "<a.jpg>", "What?")
WHAT_BELOW = ("user", "<a.jpg>", "\nWhat?")
DOG = ("assistant", "A dog.")

FORMS: list[tuple[str, dict[str, Any], list[tuple[str, ...]]]] = [
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}],
            "image": "a.jpg",
        },
        [WHAT, DOG],
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "A dog."}],
            "system": "Be brief.",
        },
        [("system", "Be brief."), ("user", "Hi"), DOG],
    ),
    ("ms-swift", {"messages": [QUESTION, ANSWER], "images": ["a.jpg"]}, [WHAT, DOG]),
    ("ms-swift", {"messages": [QUESTION, ANSWER], "images": [{"path": "a.jpg", "bytes": None}]}, [WHAT, DOG]),
    ("ms-swift", {"query": "<image>What?", "response": "A dog.", "images": ["a.jpg"]}, [WHAT, DOG]),
    (
        "ms-swift",
        {
            "query": "And?",
            "response": "A cat.",
            "history": [["<image>What?", "A dog."]],
            "images": ["a.jpg"],
            "system": "S",
        },
        [("system", "S"), WHAT, DOG, ("user", "And?"), ("assistant", "A cat.")],
    ),
    ("llama-factory", {"messages": [QUESTION, ANSWER], "images": ["a.jpg"]}, [WHAT, DOG]),
    (
        "llama-factory",
        {"messages": [{"role": "user", "content": "What?"}, ANSWER], "images": ["a.jpg"]},
        [("user", "<a.jpg>", "\n", "What?"), DOG],
    ),
    ("trl", {"messages": [user(IMAGE, text("What?")), ANSWER], "images": ["a.jpg"]}, [WHAT_BELOW, DOG]),
    (
        "trl",
        {
            "messages": [
                user({"type": "image", "image": "a.jpg"}, text("What?")),
                {**ANSWER, "content": [text("A dog.")]},
            ]
        },
        [WHAT_BELOW, DOG],
    ),
    (
        "trl",
        {"messages": [user({"type": "image_url", "image_url": {"url": "a.jpg"}}, text("What?")), ANSWER]},
        [WHAT_BELOW, DOG],
    ),
    ("trl", {"prompt": [user(IMAGE, text("What?"))], "completion": [ANSWER], "image": "a.jpg"}, [WHAT_BELOW, DOG]),
    ("trl", {"prompt": "What?", "completion": "A dog."}, [("user", "What?"), DOG]),
    ("auto", {"texts": [{"user": "What?", "assistant": "A dog.", "source": "x"}]}, [("user", "What?"), DOG]),
    ("auto", {"question": "<image>What?", "answer": "A dog.", "image": "a.jpg"}, [WHAT, DOG]),
    ("auto", {"caption": "A dog.", "image": "a.jpg"}, [("user", "<a.jpg>", "\nDescribe the image briefly."), DOG]),
]


@pytest.mark.parametrize(("form", "record", "expected"), FORMS)
def test_every_form_becomes_the_same_sample(
    source_of: Any, kinds: Any, form: str, record: dict[str, Any], expected: Any, tmp_path: Path, photos: Sequence[Path]
) -> None:
    (tmp_path / "a.jpg").write_bytes(photos[0].read_bytes())
    for given in dict.fromkeys((form, "auto")):
        source = source_of({"id": 7, **record, "source": "web"}, format=given)
        assert check_source(source) == []
        (sample,) = source
        assert dialog(sample) == expected
        assert (sample.id, sample.extra) == ("7", {"source": "web"})
        assert sample.where == f"{source.path}:1"
        assert kinds(source) in ([[]], [["no-tag"]])


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("record", "a string"),
        ("record", {"text": "no conversation"}),
        ("record", {"messages": "no list"}),
        ("record", {"messages": [QUESTION, ANSWER], "conversations": []}),
        ("record", {"messages": [QUESTION, ANSWER], "images": [{"data": "a.jpg"}]}),
        ("record", {"messages": [user({"type": "image", "image": "a.jpg"}), ANSWER], "images": ["b.jpg"]}),
        ("record", {"caption": "A dog without an image."}),
        ("role", {"messages": [QUESTION, {"role": "tool", "content": "x"}], "images": ["a.jpg"]}),
        ("role", {"messages": [QUESTION, {"role": None, "content": "x"}], "images": ["a.jpg"]}),
        ("message", {"messages": [QUESTION, {"role": "assistant", "content": 3}], "images": ["a.jpg"]}),
        ("message", {"messages": [QUESTION, {**ANSWER, "loss": False}], "images": ["a.jpg"]}),
        ("message", {"messages": [{"role": "user", "content": [{"text": "no type"}]}, ANSWER]}),
        ("message", {"messages": [QUESTION, {**ANSWER, "content": [IMAGE]}], "images": ["a.jpg", "b.jpg"]}),
        ("message", {"messages": [QUESTION, ANSWER], "images": ["a.jpg"], "system": 3}),
        ("message", {"messages": [{"role": "system", "content": "A"}, QUESTION, ANSWER], "image": "a", "system": "B"}),
        ("message", {"query": "What?"}),
        ("message", {"query": "What?", "response": "A dog.", "history": [["What?"]]}),
        ("message", {"prompt": "What?"}),
        ("message", {"texts": ["What?"]}),
        ("turns", {"messages": [QUESTION, QUESTION, ANSWER], "images": ["a.jpg", "b.jpg"]}),
        ("no-answer", {"messages": [QUESTION], "images": ["a.jpg"]}),
        ("tags", {"messages": [QUESTION, ANSWER], "images": []}),
        ("tags", {"messages": [QUESTION, ANSWER], "images": ["a.jpg", "b.jpg"]}),
        ("tags", {"messages": [user(IMAGE, text("What?")), ANSWER]}),
        ("tags", {"messages": [user(IMAGE, text("a literal <image>")), ANSWER], "images": ["a.jpg"]}),
        ("tags", {"messages": [user(IMAGE, {"type": "image", "path": "a.jpg"}), ANSWER]}),
        ("media", {"messages": [user({"type": "video"}), ANSWER]}),
        ("media", {"messages": [QUESTION, ANSWER], "images": ["a.jpg"], "videos": ["v.mp4"]}),
        ("placeholder", {"messages": [user(text("<bbox>?")), ANSWER], "images": ["a.jpg"], "objects": {"bbox": [[1]]}}),
        ("placeholder", {"query": "<img>a.jpg</img>What?", "response": "A dog."}),
        ("image-path", {"messages": [QUESTION, ANSWER], "images": ["../a.jpg"]}),
        ("image-path", {"messages": [QUESTION, ANSWER], "images": ["https://example.org/a.jpg"]}),
    ],
)
def test_what_would_change_the_meaning_is_refused(
    source_of: Any, kinds: Any, kind: str, record: Any, tmp_path: Path
) -> None:
    source = source_of(record)
    assert check_source(source) == [], "examine() and sample() agree"
    assert kind in kinds(source)[0]
    with pytest.raises(DataError, match=r"records\.jsonl:1: "):
        list(source)


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("sharegpt", {"messages": [{"role": "user", "content": "Hi"}, ANSWER]}),
        ("llama-factory", {"query": "What?", "response": "A dog."}),
        ("llama-factory", {"messages": [user(text("Hi")), ANSWER]}),
        ("trl", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A dog."}]}),
    ],
)
def test_a_format_refuses_the_others(source_of: Any, kinds: Any, form: str, record: Any, tmp_path: Path) -> None:
    assert kinds(source_of(record)) == [["no-id"]]
    assert set(kinds(source_of(record, format=form))[0]) & {"record", "message"}


def test_a_broken_line_is_located_and_the_others_are_read(source_of: Any, kinds: Any, tmp_path: Path) -> None:
    source = source_of({"id": 1, "messages": [{"role": "user", "content": "Hi"}, ANSWER]})
    source.path.write_text('{"messages": [\n' + source.path.read_text())
    assert kinds(source) == [["json"], []]
    with pytest.raises(DataError, match=r"records\.jsonl:1: "):
        list(source)


def test_the_identity_changes_with_the_records(source_of: Any, kinds: Any, tmp_path: Path) -> None:
    record = {"id": 1, "messages": [{"role": "user", "content": "Hi"}, ANSWER]}
    first = source_of(record).identity()
    assert source_of(record).identity() == first
    assert source_of(record, record).identity() != first


def test_images_are_references_to_files(source_of: Any, kinds: Any, tmp_path: Path) -> None:
    source = source_of({"messages": [QUESTION, ANSWER], "images": ["b/a.jpg"]}, images=tmp_path / "images")
    (tmp_path / "images").mkdir()
    assert next(iter(source)).images == (ImageFile(str(tmp_path / "images"), "b/a.jpg"),)


@pytest.mark.parametrize("form", ["auto", "sharegpt", "ms-swift", "llama-factory"])
def test_records_of_llava_are_read_as_by_llava_json(
    create: Any, tmp_path: Path, photos: Sequence[Path], form: str
) -> None:
    options = {"path": toy_records(tmp_path / "records.json", photos), "images": photos[0].parent}
    assert list(create("messages", **options, format=form)) == list(create("llava-json", **options))
