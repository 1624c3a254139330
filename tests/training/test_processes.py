"""Two processes with 4 samples each train the same as one process with 8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llavactl.testing import run_cli
from llavactl.training.metrics import read

SHARED_PREFIXES = ["init=scratch", "shuffle=images", "validation=0.05"]
SETTINGS = {
    "stage 1, random order": (1, ["template=vicuna-v1", "image_order=random", "max_steps=4"]),
    "stage 2, shared prefixes": (2, [*SHARED_PREFIXES, "max_steps=4"]),
    "stage 2, padded": (2, [*SHARED_PREFIXES, "max_steps=4", "packing=never"]),
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMEOUT_S = 400
"""Longer than any test takes unless it hangs."""


def write_records(toy: Path, count: int) -> None:
    """``count`` records of different lengths, three per image and one without an image."""
    records = json.loads((toy / "records.json").read_text())
    extended = []
    for index in range(count - 1):
        record = records[index // 3 % len(records)]
        turns = [record["conversations"][0], {"from": "gpt", "value": "It is. " * (index % 4 + 1)}]
        extended.append({**record, "id": f"r{index}", "conversations": turns})
    text = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "A word."}]
    (toy / "records.json").write_text(json.dumps([*extended, {"id": "text", "conversations": text}]))


def command(toy: Path, stage: int, settings: list[str], folder: str) -> list[str]:
    options = ["features.mode=live", f"run_dir={toy}/{folder}"]
    options += [f"stage{stage}.{each}" for each in ("batch_size=8", "micro_batch_size=8", *settings)]
    words = [word for option in options for word in ("-o", option)]
    return ["train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *words, "--json"]


def run_two_processes(arguments: list[str]) -> None:
    launched = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "llavactl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        pytest.param(*values, id=name, marks=[pytest.mark.slow] if name == "stage 2, padded" else [])
        for name, values in SETTINGS.items()
    ],
)
def test_two_processes_train_the_same_as_one(toy: Path, stage: int, settings: list[str]) -> None:
    write_records(toy, 36)
    result = run_cli(*command(toy, stage, settings, "one"))
    assert result.exit_code == 0, result.stderr
    run_two_processes(command(toy, stage, settings, "two"))
    packed = "packing=never" not in settings
    assert (result.json()["packing"] == "packed") == packed
    assert (result.json()["prefix_sharing"] > 0.1) == (packed and "shuffle=images" in settings)
    compare(toy / f"one/stage{stage}", toy / f"two/stage{stage}")


def compare(left: Path, right: Path) -> None:
    one, two = weights(left / "model"), weights(right / "model")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    left_lines, right_lines = read(left / "metrics.jsonl"), read(right / "metrics.jsonl")
    for key in ("step", "tokens"):
        assert [line.get(key) for line in left_lines] == [line.get(key) for line in right_lines]
    for key in ("loss", "val_loss"):
        losses = [line[key] for line in right_lines if key in line]
        assert losses == pytest.approx([line[key] for line in left_lines if key in line], rel=1e-5)


def test_a_last_batch_of_one_sample_leaves_a_process_without_micro_batches(toy: Path) -> None:
    write_records(toy, 17)
    settings = [*SHARED_PREFIXES[:2], "validation=0", "epochs=1"]
    assert run_cli(*command(toy, 2, settings, "one")).json()["samples"] == 17
    run_two_processes(command(toy, 2, settings, "two"))
    compare(toy / "one/stage2", toy / "two/stage2")


PLUGIN = """
import os
from torch import nn, zeros
from llavactl import hookimpl

@hookimpl
def register_connectors(register):
    register("buffered", "buffered:Connector")

class Module(nn.Module):
    def __init__(self, width, language_width):
        super().__init__()
        self.projection = nn.Linear(width, language_width)
        self.register_buffer("mean", zeros(width))

    def forward(self, features):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean((0, 1))
        elif self.mean.any():
            with open(f"{os.environ['MEANS']}-{os.environ['RANK']}", "a") as file:
                print(self.mean.tolist(), file=file)
        return self.projection(features - self.mean)

class Connector:
    def __init__(self, options):
        pass

    def tokens(self, shape):
        return shape.patches

    def build(self, shape, language_width):
        return Module(shape.width, language_width)
"""


def test_all_processes_validate_with_the_saved_buffers(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plugin"
    info = folder / "buffered-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: buffered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llavactl]\nbuffered = buffered\n")
    (folder / "buffered.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MEANS", str(tmp_path / "means"))
    settings = ["max_steps=2", "micro_batch_size=1", "validation=0.5", "template=vicuna-v1"]
    run_two_processes([*command(toy, 1, settings, "run"), "-o", "connector.name=buffered"])
    saved = load_file(toy / "run/stage1/model/connector.safetensors")["mean"].tolist()
    means = [(tmp_path / f"means-{rank}").read_text().splitlines() for rank in (0, 1)]
    # Other means are from the connector check at the start and the sample answers at the end.
    assert all(str(saved) in lines for lines in means)
