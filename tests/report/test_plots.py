"""Loss curves."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavactl.core.errors import LlavactlError
from llavactl.report import plots
from llavactl.report.plots import DARK, LIGHT, draw_loss, plot_loss, smooth


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 3 / step, "tokens": 10, "learning_rate": 1e-3} for step in range(1, 61)]
    lines.append({"step": 60, "val_loss": 0.2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo')
    return path


def colors(png: bytes) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).tolist()))


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_the_plot_has_raw_smoothed_and_validation_loss(metrics: Path, tmp_path: Path) -> None:
    plot_loss(metrics, tmp_path / "loss.png")
    drawn = colors((tmp_path / "loss.png").read_bytes())
    assert {rgb(LIGHT.background), rgb(LIGHT.curve), rgb(LIGHT.validation)} <= drawn
    assert not [file for file in tmp_path.iterdir() if file.name not in ("loss.png", "metrics.jsonl")]


def test_without_validation_there_is_no_validation_curve(metrics: Path) -> None:
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if "val_loss" not in line))
    assert rgb(DARK.validation) not in colors(draw_loss(metrics, DARK))


def test_global_state_of_matplotlib_is_unchanged(metrics: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw_loss(metrics, DARK)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("text", [None, "", "not json\n", '{"step": 1, "loss": NaN}\n', '{"step": 1, "loss": 2.0}\n'])
def test_any_metrics_file_can_be_plotted(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > image.height


def test_smoothing_preserves_lines_and_constants() -> None:
    line = [float(value) for value in range(100)]
    assert smooth(line)[:-4] == pytest.approx(line[:-4])
    assert smooth([2.5] * 7) == pytest.approx([2.5] * 7)
    assert smooth([]) == []


def test_without_matplotlib_the_error_names_the_extra(
    metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plots._draw_loss.cache_clear()
    with pytest.raises(LlavactlError) as caught:
        plot_loss(metrics, tmp_path / "loss.png")
    assert "pip install 'llavactl[plots]'" in caught.value.hint
    assert not (tmp_path / "loss.png").exists()
