"""Which checkpoints are kept, which one the model is restored from, and errors of the disk before step 1."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavactl.testing import run_cli
from llavactl.training import checkpoints
from llavactl.training.checkpoints import Checkpoint, CheckpointState
from llavactl.training.metrics import read


def save(folder: Path, step: int, digest: str = "a", val_loss: float | None = None, keep_last: int = 2) -> list[str]:
    checkpoints.save(folder, CheckpointState(step, digest, val_loss), {"x": torch.tensor([float(step)])}, keep_last)
    return sorted(path.name.lstrip("step-0") for path in folder.iterdir())


def tensor_file(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("*.safetensors")
    return file


def value(checkpoint: Checkpoint) -> float:
    tensors = {name: torch.zeros(1) for name in checkpoint.names()}
    checkpoint.read(tensors)
    return tensors["x"].item()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: float("nan"), 5: 0.6}
    kept = [save(tmp_path, step, val_loss=loss) for step, loss in losses.items()]
    assert kept == [["1"], ["1", "2"], ["2", "3"], ["2", "3", "4"], ["2", "4", "5"]]
    assert save(tmp_path, 6, val_loss=0.3) == ["5", "6"], "the newer of two equally good ones"


def test_without_validation_the_newest_are_kept(tmp_path: Path) -> None:
    assert [save(tmp_path, step) for step in (1, 2, 3)][-1] == ["2", "3"]
    best = checkpoints.load_best(tmp_path, "a")
    assert best is not None
    assert best.state.step == 3


def test_checkpoints_of_another_run_are_removed(tmp_path: Path) -> None:
    for step in (70, 80, 90):
        save(tmp_path, step, digest="before", val_loss=0.1)
    (tmp_path / ".step-00000070.partial").mkdir()
    assert save(tmp_path, 1, digest="now", val_loss=0.9) == ["1"]
    newest = checkpoints.load_newest(tmp_path, "now")
    assert newest is not None
    assert newest.state == CheckpointState(1, "now", 0.9)


def test_if_the_best_is_damaged_the_next_best_is_loaded(tmp_path: Path) -> None:
    for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2)):
        save(tmp_path, step, val_loss=loss, keep_last=3)
    tensor_file(tmp_path / "step-00000001").write_bytes(b"")
    best = checkpoints.load_best(tmp_path, "a")
    assert best is not None
    assert (best.state.step, value(best)) == (3, 3.0)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def zero_end(file: Path) -> None:
    """As after a power failure before all pages were written: the right length, but zeros."""
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes(3))


@pytest.mark.parametrize("name", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, zero_end, Path.unlink])
def test_if_the_newest_is_damaged_the_previous_one_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    damage(next((tmp_path / "step-00000002").glob(name)))
    newest = checkpoints.load_newest(tmp_path, "a")
    assert newest is not None
    assert (newest.state.step, value(newest)) == (1, 1.0)
    assert "step-00000002" in caplog.text


def test_a_checkpoint_of_version_0_4_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    save_file({"x": torch.tensor([7.0])}, folder / "optimizer.safetensors")
    sha256 = hashlib.sha256((folder / "optimizer.safetensors").read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps({"step": 3, "digest": "a", "val_loss": None, "sha256": sha256}))
    newest = checkpoints.load_newest(tmp_path, "a")
    assert newest is not None
    assert (newest.state.step, value(newest)) == (3, 7.0)
    truncate(folder / "optimizer.safetensors")
    assert checkpoints.load_newest(tmp_path, "a") is None


def test_a_checkpoint_has_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MIN_FILE_BYTES", 20)
    monkeypatch.setattr(checkpoints, "MAX_FILES", 4)
    tensors = {str(index): torch.arange(index, index + 4.0) for index in range(9)}
    folder = checkpoints.save(tmp_path, CheckpointState(1, "a"), tensors, 1)
    assert 4 < len(list(folder.glob("*.safetensors"))) < 9, "each has two or one of the tensors"
    newest = checkpoints.load_newest(tmp_path, "a")
    assert newest is not None
    loaded = {name: torch.zeros(4) for name in newest.names()}
    newest.read(loaded)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def command(toy: Path, *settings: str, stage: int = 1) -> list[str]:
    common = (f"stage{stage}.validation=0.2", f"stage{stage}.keep_last=1")
    options = ("features.mode=live", f"run_dir={toy}/run", *common, *settings)
    return [
        *("train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), "--json"),
        *(word for each in options for word in ("-o", each)),
    ]


def test_with_cooldown_the_learning_rate_is_constant_until_the_decay(toy: Path) -> None:
    run_cli(*command(toy, "stage1.epochs=5", "stage1.cooldown=0.5")).json()
    rates = [line["learning_rate"] for line in read(toy / "run/stage1/metrics.jsonl") if "learning_rate" in line]
    half = len(rates) // 2
    assert len(set(rates[1:half])) == 1, "cosine decay would decrease it"
    assert rates[half - 1] == max(rates) > rates[-1]


def test_restore_best(toy: Path) -> None:
    settings = ["stage2.init=scratch", "stage2.epochs=5", "stage2.learning_rate=0.3", "stage2.warmup=0.95"]

    def train(*more: str) -> Any:
        return run_cli(*command(toy, *settings, *more, stage=2)).json()

    last = train()
    losses = {line["step"]: line["val_loss"] for line in read(toy / "run/stage2/metrics.jsonl") if "val_loss" in line}
    best = min(losses, key=lambda step: (losses[step], -step))
    assert best < last["steps"], "the learning rate is so high that the last step is not the best"
    assert (last["model_step"], last["val_loss"]) == (last["steps"], losses[last["steps"]])
    folders = sorted((toy / "run/stage2/checkpoints").iterdir())
    assert [int(folder.name.removeprefix("step-")) for folder in folders] == [best, last["steps"]]
    report = train("stage2.restore_best=true")
    assert report["resumed_from"] == last["steps"], "nothing is trained again"
    assert (report["model_step"], report["val_loss"]) == (best, losses[best])
    masters, model = load_file(tensor_file(folders[0])), load_file(toy / "run/stage2/model/connector.safetensors")
    assert all(torch.equal(masters[f"master.connector.{name}"], weight) for name, weight in model.items())
    assert train("stage2.restore_best=true")["finished_before"] is True
    assert train()["model_step"] == last["steps"]


def test_restore_best_without_validation_is_refused(toy: Path) -> None:
    result = run_cli(*command(toy, "stage1.restore_best=true", "stage1.validation=0"))
    assert result.exit_code == 1
    assert "stage1.restore_best" in result.stderr


WITH_FILE_SIZE_LIMIT = """
import resource, sys
from llavactl.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
sys.argv[0] = "llavactl"
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_a_checkpoint_that_cannot_be_written_fails_before_step_1(toy: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITH_FILE_SIZE_LIMIT, *command(toy)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"{toy}/run/stage1/" in result.stderr
    assert "hint: " in result.stderr
    assert "disk" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (toy / "run/stage1").iterdir()) == ["left_out.jsonl"]


def test_too_little_disk_space_fails_before_step_1(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(toy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    result = run_cli(*command(toy, "stage1.keep_last=4"))
    assert result.exit_code == 1
    assert "0.3 MB" in result.stderr
    assert "0.1 MB" in result.stderr
    assert "stage1.keep_last=1" in result.stderr
    assert not (toy / "run/stage1/metrics.jsonl").exists()


def test_a_run_folder_that_is_a_file_fails_before_step_1(toy: Path) -> None:
    (toy / "run").write_text("")
    result = run_cli(*command(toy))
    assert result.exit_code == 1
    assert f"{toy}/run" in result.stderr
    assert "Traceback" not in result.stderr
