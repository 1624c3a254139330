"""Progress bars of llavactl and transformers."""

from __future__ import annotations

import logging

import pytest

from llavactl.core import progress
from llavactl.core.quantities import BYTE


@pytest.fixture
def every_update_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)


def test_transformers_shows_no_bars_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    previous = logging.set_tqdm_hook(None)
    logging.enable_progress_bar()
    try:
        assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert "Loading weights" in capsys.readouterr().err
        progress.quiet_transformers()
        assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert capsys.readouterr().err == ""
    finally:
        logging.set_tqdm_hook(previous)


@pytest.mark.parametrize("total", [4, None])
@pytest.mark.usefixtures("every_update_is_logged")
def test_lines_outside_a_terminal_have_a_total_if_it_is_known(
    total: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), progress.bar(total, "reading", "record") as bar:
        bar.advance(3)
    (line,) = caplog.messages
    assert "3 of 4 records" in line if total else "3 records" in line
    assert ("left" in line) == (total is not None)


@pytest.mark.usefixtures("every_update_is_logged")
def test_a_line_about_bytes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress.bar(50_099_000, "check big.json", BYTE) as bar:
        bar.advance(30_106_000)
    assert caplog.messages[0].startswith("check big.json: 30.1 MB of 50.1 MB, ")


@pytest.mark.usefixtures("every_update_is_logged")
@pytest.mark.parametrize("memory", [True, False])
def test_memory_is_shown_on_request(memory: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress.bar(2, "encoding", "image", memory=memory) as bar:
        bar.advance()
    assert (", memory " in caplog.messages[0]) == memory


def test_lines_are_sparse_and_the_last_one_is_complete(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with caplog.at_level(logging.INFO), progress.bar(100, "encoding", "image") as bar:
        for _ in range(100):
            now += 1.0
            bar.advance()
    counts = [int(line.split()[1]) for line in caplog.messages]
    assert counts == [5, 35, 65, 95, 100]
    assert "in 1 min 40 s" in caplog.messages[-1]


def test_a_short_operation_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress.bar(2, "reading", "record") as bar:
        bar.advance(2)
    assert caplog.messages == []


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, True), (logging.WARNING, False), (logging.NOTSET, True)])
def test_the_level_of_the_logger_hides_the_bar(
    level: int, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    log = logging.getLogger("llavactl")
    monkeypatch.setattr(log, "level", level)
    with progress.bar(2, "reading", "record") as bar:
        bar.advance()
    assert ("reading" in capsys.readouterr().err) == shown
