"""Quality gates: each refuses its faults, and none refuses records that GPT-4 wrote for LLaVA."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llavactl.core.protocols import Request
from llavactl.core.schema import Sample, Turn
from llavactl.images.image_file import ImageFile
from llavactl.recipe.sections import Gates
from llavactl.teaching.gates import GateChecker
from llavactl.teaching.generate import GeneratedRecord
from llavactl.testing.endpoint import WORDS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "instruct.json"
DATA = Path(__file__).parents[3] / "shared" / "data" / "llava"
FINE = "A dog is sitting on a bench in the park, and a child is standing next to it with a kite in one hand."


def generated(*texts: str, kind: str = "conversation", name: str = "1", image: str = "1") -> GeneratedRecord:
    sample = Sample(image, (Turn("user", (ImageFile("/", f"{image}.jpg"),)),))
    messages = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return GeneratedRecord(Request(f"{name}-{kind}", kind, (), sample), {"conversations": messages})


def category(*texts: str, kind: str = "conversation", **gates: Any) -> str:
    return GateChecker(Gates(**gates)).check(generated(*texts, kind=kind)).category


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("As the caption says, it is a dog in the park.", "leak"),
        ("The bounding box of the dog is on the left of it.", "leak"),
        ("The coordinates show that it is on the left.", "leak"),
        ("The dog is at [0.12, 0.30, 0.5, 0.7] in the picture.", "leak"),
        ("It is at (.12, .30), to the left of the bench.", "leak"),
        ("Based on the description, it is a dog in a park.", "leak"),
        ("From the provided context, it is a dog.", "leak"),
        ("The prompt doesn't say what it is.", "leak"),
        ("As an AI language model I see no pictures.", "leak"),
        ("I'm sorry, but I can't help with that.", "leak"),
        ("It is a dog.\n===\nQuestion: What else?", "structure"),
        ("It is a dog.\nUser: and what else is there?", "structure"),
        ("It is a dog. What else do you want to know?", "structure"),
        ("word " * 401, "too long"),
        ("a" * 9000, "too long"),
        ("Кошка сидит на столе и смотрит в окно.", "language"),
        ("Un perro marrón duerme sobre la hierba cerca de unos niños que juegan con una pelota roja.", "language"),
        ("Ein brauner Hund schläft neben zwei Kindern, die mit einem Ball spielen, während es regnet.", "language"),
        ("It is at [120, 44, 300, 200], to the left.", "leak"),
        ("The dog reaches from 0.123 to the right edge.", "leak"),
        ("The dog is at x1 = 3.", "leak"),
        ("The bbox shows a dog.", "leak"),
        ("Based on the boxes provided, there are two dogs.", "leak"),
        ("As mentioned in the description, the dog is red.", "leak"),
        ("The image description says that a dog runs.", "leak"),
        ("It is annotated as a dog.", "leak"),
        ("I don't have access to the image.", "leak"),
        ("### Human: hi", "structure"),
        ("**Answer:** a dog", "structure"),
        ("It is a dog.\nQuestion 2: where is it, then.", "structure"),
        ("A dog.<|im_end|>", "structure"),
        ("A dog.</s>", "structure"),
        ("[INST] A dog [/INST]", "structure"),
        ("<html><body>Please log in.</body></html>", "structure"),
        ("<p class='a'>A dog</p> is here.", "structure"),
        ('{"answer": "a dog"}', "structure"),
        ("There are 3, 4 (or 5) of them, and 1 < 2.", ""),
        ("The clock says (10, 15), or [so] it seems.", ""),
        (FINE, ""),
        ("Yes.", ""),
        ("It is 0.5 meters, or 1.5, or 2 of them.", ""),
        ("Two boxes of fruit stand on the cart, each of them full.", ""),
    ],
)  # fmt: skip
def test_each_gate_refuses_its_faults(answer: str, expected: str) -> None:
    assert category("What is it?", answer) == expected


def test_every_gate_can_be_switched_off() -> None:
    assert category("What?", "The caption says it.", leaks=False) == ""
    assert category("What?", "A dog. What else?", structure=False) == ""
    assert category("What?", "word " * 500, max_words=None, similarity=None, language=None) == ""
    assert category("What?", "Кошка сидит на столе.", language=None) == ""
    assert category("What?", "A dog.", "What?", "A dog.") == "duplicate"
    assert category("What?", "A dog.", "What?", "A dog.", duplicates=False) == ""


def test_reasoning_has_one_question() -> None:
    assert category("Why?", "It is so.", "And why?", "It is so too.", kind="reasoning") == "structure"
    assert category("Why?", "It is so.", kind="reasoning") == ""


def test_a_question_is_not_repeated_for_an_image_across_kinds() -> None:
    checker = GateChecker(Gates())
    assert checker.check(generated("<image>\nWhat is the dog doing?", "It sleeps.")).category == ""
    assert checker.check(generated("What is the dog doing ?!", "Sleeping.", kind="reasoning")).category == "duplicate"
    assert checker.check(generated("What is the dog doing?", "It runs.", image="2")).category == ""
    assert checker.check(generated("Describe it.", "A dog is here.", kind="detail")).category == ""
    assert checker.check(generated("Describe it.", "A cat is here, too.", kind="detail")).category == "", (
        "details share their questions"
    )


def test_near_duplicates_are_found_across_images() -> None:
    """Changing one word in twenty makes a near-duplicate; sharing half of the words doesn't."""
    rng = Random(0)

    def text(words: list[str]) -> str:
        return " ".join(f"the {word} is there and" for word in words)

    checker = GateChecker(Gates(language=None))
    base = [rng.choice(WORDS) + str(n) for n in range(60)]
    changed = [*base[:58], "another", "word"]
    half = [*base[:30], *(rng.choice(WORDS) + str(n) for n in range(30))]
    other = [rng.choice(WORDS) + str(100 + n) for n in range(60)]
    near = "near-duplicate"
    cases = ((base, ""), (half, ""), (other, ""), (changed, near), (base, near))
    for number, (words, expected) in enumerate(cases):
        result = checker.check(generated("Why?", text(words), kind="reasoning", name=str(number), image=str(number)))
        assert result.category == expected, result.reason
    assert "0-reasoning" in result.reason


def test_instruct_records_pass() -> None:
    checker = GateChecker(Gates(max_words=None))
    for record in json.loads(FIXTURE.read_text(encoding="utf-8")):
        texts = [message["value"].replace("<image>", "").strip() for message in record["conversations"]]
        result = checker.check(generated(*texts, name=record["id"], image=record["id"]))
        assert not result.reason, record["id"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_records_of_gpt_4_pass() -> None:
    """Of 190 LLaVA records, the gates may refuse at most 3."""
    checker, reasons, count = GateChecker(Gates(max_words=None)), [], 0
    kinds = {"conv": "conversation", "detail": "detail", "complex": "reasoning"}
    rows = [json.loads(line) for line in (DATA / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()]
    talks = [((row["instruction"], row["output"]), kinds[row["type"]]) for row in rows]
    records = json.loads((DATA / "llava_instruct_100.json").read_text())
    talks += [(tuple(each["value"] for each in record["conversations"]), "conversation") for record in records]
    for texts, kind in talks:
        count += 1
        result = checker.check(generated(*texts, kind=kind, name=str(count), image=str(count)))
        reasons += [result.reason] if result.reason else []
    assert count == 190
    assert len(reasons) <= 3, reasons
