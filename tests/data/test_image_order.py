"""``image_order`` moves the images of user turns."""

from __future__ import annotations

from typing import Any

import pytest

from llavactl.core.schema import Turn
from llavactl.data.image_order import arrange, arrangements
from llavactl.images.image_file import ImageFile

PHOTO, OTHER = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
ANSWER = Turn("assistant", ("A dog.",))


def test_each_order() -> None:
    turn = Turn("user", ("What is it?\n", PHOTO))
    assert arrange([turn], "first", "")[0].content == (PHOTO, "\n", "What is it?")
    assert arrange([turn], "as-data", "") == (turn,)
    image_first = {arrange([turn], "random", str(seed))[0].content[0] == PHOTO for seed in range(20)}
    assert image_first == {True, False}
    assert arrange([turn], "random", "7") == arrange([turn], "random", "7")


def test_only_the_first_user_turn_is_random() -> None:
    first, second = Turn("user", ("What is it?\n", PHOTO)), Turn("user", ("And this?", OTHER))
    for seed in range(20):
        assert arrange([first, ANSWER, second], "random", str(seed))[2].content == (OTHER, "\n", "And this?")
        text = Turn("user", ("Hello.",))
        assert arrange([text, ANSWER, second], "random", str(seed))[2].content == (OTHER, "\n", "And this?")


@pytest.mark.parametrize("order", ["first", "random", "as-data"])
def test_arrangements_are_all_results_over_seeds(order: Any) -> None:
    turns = [Turn("user", ("What is it?\n", PHOTO)), ANSWER, Turn("user", ("And this?", OTHER))]
    results = {arrange(turns, order, str(seed)) for seed in range(40)}
    assert results == set(arrangements(turns, order))
