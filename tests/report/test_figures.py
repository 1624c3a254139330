from typing import Any

import pytest

from llavactl.report.figures import Row, Table, duration, score_tables, show


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("", "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (12.3456, "12.3"),
        (1.005, "1.00"),
        (0.00123456, "0.001235"),
        (98765.4, "98,765"),
        (float("nan"), "nan"),
        ([1, "b"], "1, b"),
        ({"a": 1, "b": 0.5}, "a 1, b 0.5"),
        ({}, "–"),
        ("text", "text"),
    ],
)
def test_format_of_a_value(value: Any, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (42.4, "42 s"),
        (95, "1 min 35 s"),
        (3599.7, "1 h 0 min"),
        (36061, "10 h 1 min"),
        ("x", "–"),
        (-1, "–"),
    ],
)
def test_format_of_durations(seconds: Any, text: str) -> None:
    assert duration(seconds) == text


def test_groups_with_the_same_keys_are_columns() -> None:
    (table,) = score_tables({"accuracy": 61.25, "unparsed": 3, "chance": {"accuracy": 33.5}})
    assert table == Table(
        ("score", "chance"), (Row("accuracy", ("61.2", "33.5"), 61.25, 33.5), Row("unparsed", ("3", "–")))
    )


def test_other_groups_are_rows() -> None:
    (table,) = score_tables({"all": {"relative": 80.0, "n": 90}, "conv": {"relative": 75.0, "failed": 1}})
    assert table.columns == ("relative", "n", "failed")
    assert table.rows == (Row("all", ("80.0", "90", "–")), Row("conv", ("75.0", "–", "1")))


def test_only_percentages_have_bars() -> None:
    (table,) = score_tables({"tp": 50, "loss": 250.0, "f1": 87.14})
    assert [row.percent for row in table.rows] == [None, None, 87.14]


def test_without_scores_there_is_no_table() -> None:
    assert score_tables({}) == ()
