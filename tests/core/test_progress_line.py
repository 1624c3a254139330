"""Progress as text: what remains of it in a narrow terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm.utils import disp_len

from llavactl.core.progress_line import Status, log_line, terminal_line
from llavactl.core.quantities import BYTE

FACTS = {"loss": "1.2345", "grad_norm": "0.52", "tokens/s": "12,345", "MFU": "41.2%", "memory": "41.2 GB"}
TRAINING = Status("stage1", 1240, 5194, "step", FACTS, rate=0.31, seconds=4000.0)


def test_a_log_line_has_everything() -> None:
    line = log_line(TRAINING)
    for part in (
        "stage1: 1,240 of 5,194 steps",
        "3.2 s/step",
        "h 32 min left",
        *(f"{k} {v}" for k, v in FACTS.items()),
    ):
        assert part in line


def test_a_terminal_of_80_columns_shows_phase_rate_time_loss_and_memory() -> None:
    line = terminal_line(TRAINING, 77)
    for part in ("stage1", "1,240/5,194", "3.2 s/step", " left", "loss 1.2345", "memory 41.2 GB"):
        assert part in line
    assert "MFU" not in line


def test_a_wide_terminal_shows_everything() -> None:
    line = terminal_line(TRAINING, 200)
    assert "|██▍       |  24%" in line
    assert all(f"{name} {value}" in line for name, value in FACTS.items())


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (20, "stage1  1,240/5,194"),
        (39, "stage1  1,240/5,194  3 h 32 min left"),
        (52, "stage1  1,240/5,194  3 h 32 min left  loss 1.2345"),
        (64, "stage1  1,240/5,194  3.2 s/step  3 h 32 min left  loss 1.2345"),
        (17, "sta…  1,240/5,194"),
    ],
)
def test_the_least_important_parts_are_left_out(width: int, line: str) -> None:
    assert terminal_line(TRAINING, width) == line


@given(
    st.text("ab 数é", min_size=1, max_size=60),
    st.integers(0, 10**12),
    st.integers(0, 10**12),
    st.sampled_from(["step", BYTE]),
    st.dictionaries(st.sampled_from(list(FACTS)), st.text("1.a ", max_size=20)),
    st.just(0.0) | st.floats(1e-6, 1e9),
    st.integers(1, 200),
)
def test_a_line_fits(
    what: str, done: int, total: int, unit: str, facts: dict[str, str], rate: float, width: int
) -> None:
    line = terminal_line(Status(what, done, total, unit, facts, rate, 1.0), width)
    assert disp_len(line) <= width
    assert "\n" not in line


def test_bytes_have_a_prefix() -> None:
    line = terminal_line(Status("check big.json", 30_106_000, 50_099_000, BYTE, {}, 1e6, 30.0), 79)
    assert "30.1 MB/50.1 MB" in line
    assert "1.0 MB/s" in line


def test_an_unknown_total_has_no_bar_and_no_time_left() -> None:
    line = terminal_line(Status("reading", 1200, 0, "record", {}, 100.0, 12.0), 79)
    assert line == "reading  1,200 records  100 records/s"


def test_the_last_line_has_the_elapsed_time() -> None:
    assert "in 1 min 5 s" in terminal_line(Status("stage1", 10, 10, "step", {}, 1.0, 65.0), 79)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.5, 0.999, 1.0])
def test_the_bar_has_a_constant_width(share: float) -> None:
    for ascii_only in (True, False):
        line = terminal_line(Status("x", round(1000 * share), 1000, "step", {}, 0.0, 0.0), 79, ascii_only=ascii_only)
        assert len(line.split("|")[1]) == 10
        assert not ascii_only or line.isascii()
