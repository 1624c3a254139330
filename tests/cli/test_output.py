"""What people read: reports, lines with labels, tables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import yaml

from llavactl.cli import output


@dataclass(frozen=True)
class Report:
    loss: float = 6.050176620483398
    learning_rate: float = 1.23456789e-5
    free_bytes: int = 50_477_199_360
    bytes: int = 22_272
    seed: int = 1234567
    judge: str | None = None
    finished: bool = False
    damaged: tuple[str, ...] = ()
    interval: dict[str, list[float]] = field(default_factory=lambda: {"accuracy": [0.0, 43.44824647831748]})


def test_a_report_is_rounded_has_units_and_no_missing_values(capsys: pytest.CaptureFixture[str]) -> None:
    output.report(Report(), as_json=False)
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == {
        "loss": 6.0502,
        "learning_rate": 1.2346e-5,
        "free_bytes": "50.5 GB",
        "bytes": "22 kB",
        "seed": 1234567,
        "finished": False,
        "damaged": "none",
        "interval": {"accuracy": [0.0, 43.448]},
    }


def test_json_is_complete_and_exact(capsys: pytest.CaptureFixture[str]) -> None:
    output.report(Report(), as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == Report.loss
    assert report["free_bytes"] == Report.free_bytes
    assert report["judge"] is None
    assert report["damaged"] == []


def test_numbers_are_aligned_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    output.table([("tokens", "1,048", "a"), ("images", "3", "b")], ("measure", "mean", "note"), titles_in_pipes=True)
    assert capsys.readouterr().out.splitlines() == [
        "measure   mean  note",
        "tokens   1,048  a",
        "images       3  b",
    ]


def test_titles_are_left_out_in_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    output.table([("tokens", "1")], ("measure", "count"))
    output.table([], ("measure", "count"))
    assert capsys.readouterr().out == "tokens  1\n"


def test_long_lines_with_labels_are_not_wrapped_in_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    output.labeled([("placement", "word " * 50), ("fits", "yes")])
    assert capsys.readouterr().out.splitlines() == [f"placement  {'word ' * 50}".rstrip(), "fits       yes"]


def test_long_lines_with_labels_are_wrapped_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "40"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    path = f"/{'long' * 20}"
    output.labeled([("placement", "word " * 12), ("report", path)])
    first, second, last = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert first == f"placement  {'word ' * 6}".rstrip()
    assert second == f"{' ' * 11}{'word ' * 6}".rstrip()
    assert last == f"report     {path}", "can be copied"
