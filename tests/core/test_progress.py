"""Progress bars of llavactl and transformers."""

from __future__ import annotations

import logging

import pytest

from llavactl.core import progress
from llavactl.core.quantities import BYTE


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


def test_bytes_on_a_terminal_have_a_prefix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.bar(50_099_000, "check big.json", BYTE) as bar:
        bar.advance(30_106_000)
    assert "30.1M/50.1M" in capsys.readouterr().err


def test_a_line_about_bytes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), progress.bar(50_099_000, "check big.json", BYTE) as bar:
        bar.advance(30_106_000)
    assert caplog.messages[0].startswith("check big.json: 30.1 MB of 50.1 MB, ")
