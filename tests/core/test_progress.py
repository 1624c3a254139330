"""Progress bars of llavactl and transformers."""

from __future__ import annotations

import logging

import pytest

from llavactl.core import progress


def test_transformers_shows_no_bars_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    previous = logging.set_tqdm_hook(None)
    try:
        assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert "Loading weights" in capsys.readouterr().err
        progress.quiet_transformers()
        assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert capsys.readouterr().err == ""
    finally:
        logging.set_tqdm_hook(previous)


@pytest.mark.parametrize("total", [4, None])
def test_lines_outside_a_terminal_have_a_total_if_it_is_known(
    total: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), progress.bar(total, "reading", "record") as bar:
        bar.advance(3)
    (line,) = caplog.messages
    assert "3 of 4 records" in line if total else "3 records" in line
    assert ("left" in line) == (total is not None)


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (3, "step", "3 steps"),
        (50_099, "record", "50,099 records"),
        (900, "byte", "1 kB"),
        (30_106_000, "byte", "30.1 MB"),
        (12e9, "byte", "12.0 GB"),
    ],
)
def test_quantities(count: float, unit: str, text: str) -> None:
    assert progress.quantity(count, unit) == text


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (490_000, "byte", "490 kB per second"),
        (1234.5, "step", "1,234 per second"),
        (12.5, "image", "12.5 per second"),
        (0.3125, "step", "3.2 s per step"),
        (0.0, "answer", "0.0 per second"),
    ],
)
def test_rates_have_no_exponents(rate: float, unit: str, text: str) -> None:
    assert progress.speed(rate, unit) == text


def test_bytes_on_a_terminal_have_a_prefix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.bar(50_099_000, "check big.json", progress.BYTE) as bar:
        bar.advance(30_106_000)
    assert "30.1M/50.1M" in capsys.readouterr().err


def test_a_line_about_bytes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), progress.bar(50_099_000, "check big.json", progress.BYTE) as bar:
        bar.advance(30_106_000)
    assert caplog.messages[0].startswith("check big.json: 30.1 MB of 50.1 MB, ")
