"""Progress bars of llavactl and transformers."""

from __future__ import annotations

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
