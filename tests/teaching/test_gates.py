"""Gates: each stops what it is for, none stops what GPT-4 really wrote."""

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
from llavactl.teaching.gates import Gatekeeper
from llavactl.teaching.generate import GeneratedRecord
from llavactl.testing.endpoint import WORDS

DATA = Path(__file__).parents[3] / "shared" / "data" / "llava"
FINE = "A dog is sitting on a bench in the park, and a child is standing next to it with a kite in one hand."


def made(*said: str, kind: str = "conversation", name: str = "1", picture: str = "1") -> GeneratedRecord:
    sample = Sample(picture, (Turn("user", (ImageFile("/", f"{picture}.jpg"),)),))
    messages = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    return GeneratedRecord(Request(f"{name}-{kind}", kind, (), sample), {"conversations": messages})


def sort(*said: str, kind: str = "conversation", **gates: Any) -> str:
    return Gatekeeper(Gates(**gates)).check(made(*said, kind=kind)).sort


@pytest.mark.parametrize(
    ("answer", "why"),
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
def test_each_gate_stops_what_it_is_for(answer: str, why: str) -> None:
    assert sort("What is it?", answer) == why


def test_every_gate_can_be_switched_off() -> None:
    assert sort("What?", "The caption says it.", leaks=False) == ""
    assert sort("What?", "A dog. What else?", structure=False) == ""
    assert sort("What?", "word " * 500, max_words=None, similarity=None, language=None) == ""
    assert sort("What?", "Кошка сидит на столе.", language=None) == ""
    assert sort("What?", "A dog.", "What?", "A dog.") == "duplicate"
    assert sort("What?", "A dog.", "What?", "A dog.", duplicates=False) == ""


def test_reasoning_is_one_question() -> None:
    assert sort("Why?", "It is so.", "And why?", "It is so too.", kind="reasoning") == "structure"
    assert sort("Why?", "It is so.", kind="reasoning") == ""


def test_a_question_is_asked_once_about_a_picture_whatever_the_kind() -> None:
    keeper = Gatekeeper(Gates())
    assert keeper.check(made("<image>\nWhat is the dog doing?", "It sleeps.")).sort == ""
    assert keeper.check(made("What is the dog doing ?!", "Sleeping.", kind="reasoning")).sort == "duplicate"
    assert keeper.check(made("What is the dog doing?", "It runs.", picture="2")).sort == ""
    assert keeper.check(made("Describe it.", "A dog is here.", kind="detail")).sort == ""
    assert keeper.check(made("Describe it.", "A cat is here, too.", kind="detail")).sort == "", "our own question"


def test_near_duplicates_are_found_across_pictures() -> None:
    """A text with one word in twenty changed is one; texts with half of their words in common are none."""
    rng = Random(0)

    def text(words: list[str]) -> str:
        return " ".join(f"the {word} is there and" for word in words)

    keeper = Gatekeeper(Gates(language=None))
    base = [rng.choice(WORDS) + str(n) for n in range(60)]
    changed = [*base[:58], "another", "word"]
    half = [*base[:30], *(rng.choice(WORDS) + str(n) for n in range(30))]
    other = [rng.choice(WORDS) + str(100 + n) for n in range(60)]
    near = "near-duplicate"
    cases = ((base, ""), (half, ""), (other, ""), (changed, near), (base, near))
    for number, (words, expected) in enumerate(cases):
        found = keeper.check(made("Why?", text(words), kind="reasoning", name=str(number), picture=str(number)))
        assert found.sort == expected, found.reason
    assert "like 0-reasoning" in found.reason


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
def test_what_gpt_4_really_wrote_passes() -> None:
    """190 records of LLaVA's: a gate that stopped more than one in fifty of them would be wrong."""
    keeper, stopped, count = Gatekeeper(Gates(max_words=None)), [], 0
    kinds = {"conv": "conversation", "detail": "detail", "complex": "reasoning"}
    rows = [json.loads(line) for line in (DATA / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()]
    talks = [((row["instruction"], row["output"]), kinds[row["type"]]) for row in rows]
    records = json.loads((DATA / "llava_instruct_100.json").read_text())
    talks += [(tuple(each["value"] for each in record["conversations"]), "conversation") for record in records]
    for said, kind in talks:
        count += 1
        found = keeper.check(made(*said, kind=kind, name=str(count), picture=str(count)))
        stopped += [found.reason] if found.reason else []
    assert count == 190
    assert len(stopped) <= 3, stopped
