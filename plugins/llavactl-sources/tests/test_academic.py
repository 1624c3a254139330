"""The academic data sets: conversations as in LLaVA's mix, and problems of their files."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llavactl_sources.regions import box_text

from llavactl import DataError, Sample
from llavactl.testing import check_source

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def source_of(create: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function that writes each option that isn't a string or a number as JSON, and returns the source."""

    def source(name: str, **options: Any) -> Any:
        for key, value in options.items():
            if isinstance(value, dict | list):
                (tmp_path / f"{key}.json").write_text(json.dumps(value))
        files = {key: tmp_path / f"{key}.json" for key, value in options.items() if isinstance(value, dict | list)}
        return create(name, **{**options, **files})

    return source


def dialogs(source: Any) -> dict[str, list[str]]:
    """The texts of every sample, after the image, by its id."""
    assert check_source(source) == []
    found = {}
    for sample in source:
        assert not isinstance(sample.turns[0].content[0], str), "the image is first"
        assert len(sample.images) == 1
        found[sample.id] = [turn.text.removeprefix("\n") for turn in sample.turns]
    return found


def names(source: Any) -> list[str]:
    return [sample.images[0].path for sample in source]


def questions(*rows: tuple[int, int, str]) -> dict[str, Any]:
    return {"questions": [{"question_id": a, "image_id": b, "question": text} for a, b, text in rows]}


def test_vqav2(source_of: Any) -> None:
    """Questions about an image are one conversation, in the order of the file."""
    asked = questions((1, 9, "What?"), (2, 8, "Who?"), (3, 9, "Where?"))
    answers = [
        {"question_id": each, "multiple_choice_answer": text} for each, text in ((3, "left"), (1, "dog"), (2, "no"))
    ]
    source = source_of("vqa", questions=asked, annotations={"annotations": answers})
    assert dialogs(source) == {"9": [f"What?{SHORT}", "Dog", "Where?", "Left"], "8": [f"Who?{SHORT}", "No"]}
    assert names(source) == ["000000000009.jpg", "000000000008.jpg"]
    named = source_of("vqa", questions=asked, annotations={"annotations": answers}, image="COCO_train2014_{:012d}.jpg")
    assert names(named)[0] == "COCO_train2014_000000000009.jpg"


def test_okvqa_has_the_most_frequent_answer(source_of: Any) -> None:
    answers = [{"answer": each} for each in ("race", "motocross", "motocross", "ride", "race")]
    annotations = {"annotations": [{"question_id": 1, "answers": answers}]}
    assert dialogs(source_of("vqa", questions=questions((1, 9, "What?")), annotations=annotations)) == {
        "9": [f"What?{SHORT}", "Race"]
    }, "the first of equally frequent ones"


def test_gqa(source_of: Any) -> None:
    rows = {
        "201": {"imageId": "2354786", "question": "Is it blue?", "answer": "yes", "fullAnswer": "Yes, it is."},
        "202": {"imageId": "2354786", "question": "Where?", "answer": "left"},
    }
    source = source_of("gqa", questions=rows)
    assert dialogs(source) == {"2354786": [f"Is it blue?{SHORT}", "Yes", "Where?", "Left"]}
    assert names(source) == ["2354786.jpg"]


def test_aokvqa_has_a_copy_for_each_choice(source_of: Any) -> None:
    row = {"image_id": 7, "question_id": "a", "question": "What?", "choices": ["x", "y", "z"], "correct_choice_idx": 1}
    instruction = "\nAnswer with the option's letter from the given choices directly."
    source = source_of("a-okvqa", questions=[row])
    assert dialogs(source) == {
        "7-0": [f"What?\nA. x\nB. y\nC. z{instruction}", "B"],
        "7-1": [f"What?\nA. y\nB. z\nC. x{instruction}", "A"],
        "7-2": [f"What?\nA. z\nB. x\nC. y{instruction}", "C"],
    }
    for copy in dialogs(source).values():
        lines = dict(line.split(". ") for line in copy[0].splitlines()[1:-1])
        assert lines[copy[1]] == "y", "the letter is that of the right choice"
    assert dialogs(source_of("a-okvqa", questions=[row], rotate=False)).keys() == {"7-0"}


def books(count: int) -> dict[str, Any]:
    return {
        str(each): {"split": 1 + each % 2, "questions": ["Who?", "What?"], "answers": [f"Author {each}", "a Title"]}
        for each in range(count)
    }


def test_ocrvqa(source_of: Any) -> None:
    source = source_of("ocr-vqa", questions=books(3))
    assert dialogs(source)["0"] == [f"Who?{SHORT}", "Author 0", "What?", "a Title"], "answers are unchanged"
    assert names(source) == ["0.jpg", "2.jpg"], "split 1"
    sampled = [dialogs(source_of("ocr-vqa", questions=books(100), sample=10, seed=seed)) for seed in (0, 0, 1)]
    assert [len(each) for each in sampled] == [10] * 3
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(dialogs(source_of("ocr-vqa", questions=books(100), sample=1000))) == 50


def test_textcaps_has_the_first_caption_of_an_image(source_of: Any) -> None:
    captions = [{"image_id": "ab", "caption_str": "A sign."}, {"image_id": "ab", "caption_str": "Another."}]
    ocr = [{"image_id": "ab", "ocr_tokens": ["STOP", "4-WAY"]}]
    source = source_of("textcaps", captions={"data": captions}, ocr={"data": ocr})
    question = "Provide a one-sentence caption for the provided image.\nReference OCR token: STOP, 4-WAY"
    assert dialogs(source) == {"ab": [question, "A sign."]}
    assert names(source) == ["ab.jpg"]


DESCRIBE = "Please provide a short description for this region: "
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: "


def described(question: str, answer: str) -> tuple[str, str]:
    """The phrase and the box of a question that asks for either."""
    if question.startswith(DESCRIBE):
        return answer, question.removeprefix(DESCRIBE).removesuffix(".")
    assert question.startswith(LOCATE)
    return question.removeprefix(LOCATE).removesuffix("."), answer


def genome(count: int) -> dict[str, Any]:
    regions = [{"region_id": n, "phrase": f"dot {n}.", "x": n, "y": 0, "width": 10, "height": 50} for n in range(count)]
    size = {"image_id": 3, "width": 100, "height": 50, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/3.jpg"}
    return {"regions": [{"id": 3, "regions": regions}], "image_data": [size]}


def test_visual_genome(source_of: Any) -> None:
    source = source_of("visual-genome", **genome(30))
    texts = dialogs(source)["3"]
    assert len(texts) == 20, "10 regions"
    pairs = [described(*texts[start : start + 2]) for start in range(0, 20, 2)]
    numbers = [int(phrase.removeprefix("dot ")) for phrase, _ in pairs]
    assert numbers == sorted(set(numbers)), "selected once, in the file's order"
    assert [box for _, box in pairs] == [f"[{n / 100}, 0.25, {(n + 10) / 100}, 0.75]" for n in numbers], (
        "in the padded image"
    )
    assert {text.startswith(DESCRIBE) for text in texts[::2]} == {True, False}
    assert names(source) == ["VG_100K_2/3.jpg"]
    assert dialogs(source_of("visual-genome", **genome(30), seed=1)) != {"3": texts}
    assert len(dialogs(source_of("visual-genome", **genome(30), per_image=30))["3"]) == 60


@pytest.mark.parametrize(
    ("xywh", "size", "padded", "expected"),
    [
        ((0, 0, 100, 50), (100, 50), True, "[0.0, 0.25, 1.0, 0.75]"),
        ((0, 0, 50, 100), (50, 100), True, "[0.25, 0.0, 0.75, 1.0]"),
        ((0, 0, 100, 50), (100, 50), False, "[0.0, 0.0, 1.0, 1.0]"),
        ((-5, 10, 200, 200), (100, 50), False, "[0.0, 0.2, 1.0, 1.0]"),
        ((1, 1, 1, 1), (3, 3), True, "[0.33, 0.33, 0.67, 0.67]"),
    ],
)
def test_boxes(xywh: Any, size: Any, padded: Any, expected: str) -> None:
    assert box_text(xywh, *size, padded=padded) == expected


@pytest.mark.parametrize("xywh", [(0, 0, 0, 5), (0, 0, 5, -1), (100, 0, 5, 5), (0, 50, 5, 5), (-9, 0, 5, 5)])
def test_boxes_without_an_area_in_the_image(xywh: Any) -> None:
    with pytest.raises(ValueError, match="box"):
        box_text(xywh, 100, 50, padded=True)


INSTANCES = {"images": [{"id": 5, "width": 100, "height": 50}], "annotations": [{"id": 6, "bbox": [0, 0, 50, 50]}]}


def reference(number: int, split: str = "train", sentences: int = 1) -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": 6,
        "image_id": 5,
        "split": split,
        "sentences": [{"sent": f"dot {number} {each}"} for each in range(sentences)],
    }


def test_refcoco_in_conversations_of_at_most_nine(source_of: Any) -> None:
    refs = [*(reference(number, sentences=5) for number in range(4)), reference(9, "val")]
    found = dialogs(source_of("refcoco", refs=refs, instances=INSTANCES))
    assert [(key, len(texts) // 2) for key, texts in found.items()] == [("5-0", 9), ("5-1", 9), ("5-2", 2)]
    pairs = [described(*texts[at : at + 2]) for texts in found.values() for at in range(0, len(texts), 2)]
    assert pairs == [(f"dot {number} {each}", "[0.0, 0.25, 0.5, 0.75]") for number in range(4) for each in range(5)]


def test_refcoco_reads_pickles_of_plain_data_only(source_of: Any, create: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    source_of("refcoco", refs=[], instances=INSTANCES)
    path = tmp_path / "refs(unc).p"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps([reference(1)], protocol))
        assert dialogs(create("refcoco", refs=path, instances=tmp_path / "instances.json")).keys() == {"5"}
        for value in ([Evil()], b"cut"):
            path.write_bytes(pickle.dumps(value, protocol)[: -1 if value == b"cut" else None])
            with pytest.raises(DataError, match=r"refs\(unc\)\.p"):
                list(create("refcoco", refs=path, instances=tmp_path / "instances.json"))
    assert not (tmp_path / "evil").exists()


VQA = {
    "questions": questions((1, 9, "What?")),
    "annotations": {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}]}]},
}
GQA = {"1": {"imageId": "1", "question": "What?", "answer": "a"}}
AOKVQA = {"image_id": 7, "question_id": "a", "question": "What?", "choices": ["x", "y"], "correct_choice_idx": 0}
OCR = {
    "captions": {"data": [{"image_id": "a", "caption_str": "A."}]},
    "ocr": {"data": [{"image_id": "a", "ocr_tokens": []}]},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vqa", {**VQA, "annotations": {"annotations": []}}),
        ("vqa", {**VQA, "annotations": {"annotations": [{"question_id": 1}]}}),
        ("vqa", {**VQA, "questions": {"questions": [{"question_id": 1, "image_id": "x", "question": "What?"}]}}),
        ("vqa", {**VQA, "questions": {"questions": [{"question_id": 1, "image_id": 1}]}}),
        ("vqa", {**VQA, "questions": {"questions": ["What?"]}}),
        ("vqa", {**VQA, "image": "{}{}"}),
        ("gqa", {"questions": {"1": {**GQA["1"], "answer": 3}}}),
        ("gqa", {"questions": {"1": []}}),
        ("a-okvqa", {"questions": [{**AOKVQA, "correct_choice_idx": 2}]}),
        ("a-okvqa", {"questions": [{**AOKVQA, "correct_choice_idx": True}]}),
        ("a-okvqa", {"questions": [{**AOKVQA, "choices": "xy", "correct_choice_idx": 7}]}),
        ("a-okvqa", {"questions": [3]}),
        ("ocr-vqa", {"questions": {"1": {"split": 1, "questions": ["Who?"], "answers": []}}}),
        ("ocr-vqa", {"questions": {"1": {"questions": ["Who?"], "answers": ["X"]}}}),
        ("textcaps", {**OCR, "ocr": {"data": []}}),
        ("textcaps", {**OCR, "captions": {"data": [{"image_id": "a"}]}}),
        ("visual-genome", {**genome(1), "image_data": []}),
        ("visual-genome", {**genome(1), "regions": [{"id": 3, "regions": [{"phrase": "x"}]}]}),
        ("refcoco", {"refs": [{**reference(1), "ann_id": 1}], "instances": INSTANCES}),
        ("refcoco", {"refs": [{**reference(1), "sentences": [{}]}], "instances": INSTANCES}),
        ("refcoco", {"refs": [3], "instances": INSTANCES}),
    ],
)
def test_records_of_another_form_are_located(source_of: Any, kinds: Any, name: str, options: Any) -> None:
    source = source_of(name, **options)
    assert kinds(source) == [["json"]]
    with pytest.raises(DataError) as error:
        list(source)
    assert error.value.message.startswith(str(source.files[0]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vqa", {**VQA, "questions": questions((1, 9, "What?"), (1, 9, " "))}),
        (
            "vqa",
            {
                **VQA,
                "questions": questions((1, 9, "What?"), (2, 9, "?")),
                "annotations": {
                    "annotations": [
                        {"question_id": 1, "multiple_choice_answer": "a"},
                        {"question_id": 2, "answers": []},
                    ]
                },
            },
        ),
        ("gqa", {"questions": {**GQA, "2": {**GQA["1"], "answer": ""}}}),
        ("ocr-vqa", {"questions": {"1": {"split": 1, "questions": ["Who?", "What?"], "answers": ["", "A title"]}}}),
        (
            "visual-genome",
            {
                **genome(1),
                "regions": [
                    {
                        "id": 3,
                        "regions": [
                            {"phrase": "a", "x": 0, "y": 0, "width": 5, "height": 5},
                            {"phrase": "b", "x": 200, "y": 0, "width": 5, "height": 5},
                        ],
                    }
                ],
            },
        ),
    ],
)
def test_questions_that_can_not_be_trained_are_counted(source_of: Any, caplog: Any, name: str, options: Any) -> None:
    found = dialogs(source_of(name, **options))
    assert [len(texts) for texts in found.values()] == [2]
    assert " 1 questions " in caplog.text


@pytest.mark.parametrize("text", ["{", '{"questions": [', "[]", "{}", '"text"', "\xff"])
@pytest.mark.parametrize(
    ("name", "option"), [("vqa", "questions"), ("vqa", "annotations"), ("textcaps", "ocr"), ("refcoco", "instances")]
)
def test_damaged_files(source_of: Any, tmp_path: Path, name: str, option: str, text: str) -> None:
    valid = {"vqa": VQA, "textcaps": OCR, "refcoco": {"refs": [reference(1)], "instances": INSTANCES}}[name]
    source = source_of(name, **valid)
    (tmp_path / f"{option}.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=option):
        list(source)


def test_missing_files_and_identity(source_of: Any, tmp_path: Path) -> None:
    source = source_of("vqa", **VQA)
    before = source.identity()
    assert source_of("vqa", **VQA).path == tmp_path
    os.utime(tmp_path / "annotations.json", (1, 1))
    assert source.identity() != before
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"annotations\.json"):
        source.check()


def test_an_image_outside_the_folder_is_refused(source_of: Any, kinds: Any) -> None:
    source = source_of("gqa", questions={"1": {**GQA["1"], "imageId": "../../1"}})
    assert kinds(source) == [["image-path"]]


def test_samples_are_picklable(source_of: Any) -> None:
    (sample,) = source_of("vqa", **VQA)
    assert isinstance(sample, Sample)
    assert pickle.loads(pickle.dumps(sample)) == sample
