"""Progress: ours, and what transformers shows of its own."""

from __future__ import annotations

import pytest

from llavactl.core import progress


def test_transformers_bars_stay_off_what_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.set_tqdm_hook(None)
    try:
        assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert "Loading weights" in capsys.readouterr().err
        progress.quiet_transformers()
        assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert capsys.readouterr().err == ""
    finally:
        logging.set_tqdm_hook(before)
