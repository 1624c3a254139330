"""Several processes train the same as one, with replicas and sharded; checkpoints go from one number to another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llavactl.core.paths import exclusive_lock
from llavactl.testing import run_cli
from llavactl.training.metrics import read

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TIMEOUT_S = 400
"""Longer than any test takes unless it hangs."""

SHARED_PREFIXES = ["init=scratch", "shuffle=images", "validation=0.05", "max_steps=4", "epochs=4"]
LORA = ["method=lora", "lora.r=4", "lora.dropout=0", "gradient_checkpointing=true"]
SETTINGS: dict[str, tuple[int, list[str]]] = {
    "stage 1": (1, ["template=vicuna-v1", "image_order=random", "max_steps=4", "micro_batch_size=2"]),
    "full": (2, [*SHARED_PREFIXES, "micro_batch_size=2", "max_grad_norm=0.5"]),
    "padded": (2, [*SHARED_PREFIXES, "packing=never"]),
    "lora": (2, [*SHARED_PREFIXES, "micro_batch_size=4", *LORA]),
    "some modules": (2, [*SHARED_PREFIXES, "trainable_modules=[self_attn, norm]", "micro_batch_tokens=300"]),
    "tied": (2, [*SHARED_PREFIXES, "language.model={toy}/tied"]),
    "uneven end": (
        2,
        ["init=scratch", "shuffle=images", "validation=0", "epochs=1", "batch_size=9", "micro_batch_size=3"],
    ),
}
"""Records of different lengths, with text-only ones; the number of samples is no multiple of the global batch size."""

RUN_COMMANDS = """
import json, os, sys
from torch.distributed.tensor import DTensor
from llavactl.core.processes import exit_process
from llavactl.testing import run_cli
from llavactl.verbs import train

def count_shares(run):
    result = run_loop(run)
    if run.placement.sharded and run.settings.method == "full" and not run.settings.trainable_modules:
        masters = run.optimizer.masters
        moments = {f"{name}.{key}": value for name, master in masters.items()
                   for key, value in run.optimizer.algorithm_of[name].state[master].items() if value.ndim}
        counts = {"parameters": sum(p.numel() for p in run.model.parameters())}
        own = dict(run.model.named_parameters())
        for kind, tensors in {"own": own, "masters": masters, "moments": moments}.items():
            assert all(isinstance(tensor, DTensor) for tensor in tensors.values()), kind
            counts[kind] = sum(tensor.to_local().numel() for tensor in tensors.values())
        with open(f"{folder}/shares-{os.environ['RANK']}", "w") as file:
            json.dump(counts, file)
    return result

folder = sys.argv[1]
run_loop, train.run_loop = train.run_loop, count_shares
for command in json.loads(open(f"{folder}/commands.json").read()):
    result = run_cli(*command)
    if result.exit_code:
        sys.exit(f"{command}: {result.stderr}")
exit_process(0)
"""


OBSERVER = """
import os
from pathlib import Path
from llavactl import hookimpl

def note(hook):
    with Path(__file__).with_name("hooks.txt").open("a") as file:
        file.write(f"{hook} {os.environ.get('RANK', '0')}\\n")

@hookimpl
def train_started():
    note("train_started")

@hookimpl
def train_logged():
    note("train_logged")

@hookimpl
def checkpoint_saved():
    note("checkpoint_saved")

@hookimpl
def train_finished():
    note("train_finished")
"""
"""A plugin that writes which process calls each hook."""


def write_records(toy: Path, count: int) -> None:
    """``count`` records of different lengths, three per image and one of nine without an image."""
    records = json.loads((toy / "records.json").read_text())
    extended = []
    for index in range(count):
        record = records[index // 3 % len(records)]
        turns = [record["conversations"][0], {"from": "gpt", "value": "It is. " * (index % 4 + 1)}]
        extended.append({**record, "id": f"r{index}", "conversations": turns})
        if index % 9 == 8:
            text = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": f"Word {index}."}]
            extended[-1] = {"id": f"text{index}", "conversations": text}
    (toy / "records.json").write_text(json.dumps(extended))


def command(toy: Path, stage: int, settings: list[str], folder: str, *options: str) -> list[str]:
    options = ("features.mode=live", f"run_dir={toy}/{folder}", *options)
    for setting in ("batch_size=8", "micro_batch_size=8", *settings):
        key = setting if setting.startswith("language.") else f"stage{stage}.{setting}"
        options += (key.format(toy=toy),)
    words = [word for option in options for word in ("-o", option)]
    return ["train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *words, "--json"]


def write_tied_language_model(toy: Path) -> None:
    """A copy of the language model, with tied embeddings, to ``toy/tied``."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "language")
    config = AutoConfig.from_pretrained(toy / "language", tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(toy / "tied")
    tokenizer.save_pretrained(toy / "tied")


def launch(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, str(processes), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run_in_processes(toy: Path, processes: int, *commands: list[str]) -> None:
    """Runs ``commands`` of the CLI one after the other in the same ``processes``, which saves imports."""
    (toy / "commands.py").write_text(RUN_COMMANDS)
    (toy / "commands.json").write_text(json.dumps(commands))
    (toy / "observer.py").write_text(OBSERVER)
    launched = launch(processes, str(toy / "commands.py"), str(toy), LLAVACTL_PLUGIN_FILES=str(toy / "observer.py"))
    assert launched.returncode == 0, launched.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def compare(left: Path, right: Path) -> None:
    one, several = weights(left / "model"), weights(right / "model")
    assert one.keys() == several.keys()
    for name in one:
        torch.testing.assert_close(one[name], several[name], rtol=0, atol=1e-5, msg=name)
    compare_metrics(read(left / "metrics.jsonl"), read(right / "metrics.jsonl"), 1e-6)


def compare_metrics(left: list[dict[str, float]], right: list[dict[str, float]], tolerance: float) -> None:
    for key in ("step", "tokens"):
        assert [line.get(key) for line in left] == [line.get(key) for line in right]
    for key in ("loss", "val_loss"):
        losses = [line[key] for line in right if key in line]
        assert losses == pytest.approx([line[key] for line in left if key in line], rel=tolerance)


@pytest.mark.parametrize(
    ("processes", "replicas", "sharded"),
    [
        pytest.param(2, ["uneven end"], ["tied"], id="2"),
        pytest.param(3, ["uneven end"], ["stage 1", "tied"], id="3", marks=pytest.mark.slow),
        pytest.param(3, ["stage 1", "full", "padded", "lora"], [], id="3-replicas", marks=pytest.mark.slow),
        pytest.param(2, ["uneven end"], [*SETTINGS], id="2-all", marks=pytest.mark.slow),
        pytest.param(4, [], ["full", "padded", "some modules"], id="4-sharded", marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_the_same_as_one(
    toy: Path, processes: int, replicas: list[str], sharded: list[str]
) -> None:
    write_records(toy, 37)
    write_tied_language_model(toy)
    groups = {"none": replicas, "full": sharded}
    cases = {
        f"{name}-{sharding}".replace(" ", "-"): (*SETTINGS[name], sharding)
        for sharding, names in groups.items()
        for name in names
    }
    for name, (stage, settings, _) in cases.items():
        result = run_cli(*command(toy, stage, settings, f"{name}/one"))
        assert result.exit_code == 0, result.stderr
        packed = "packing=never" not in settings
        assert (result.json()["packing"] == "packed") == packed
        assert (result.json()["prefix_sharing"] > 0.1) == (packed and "shuffle=images" in settings)
    run_in_processes(
        toy,
        processes,
        *(
            command(toy, stage, settings, f"{name}/several", f"sharding={sharding}")
            for name, (stage, settings, sharding) in cases.items()
        ),
    )
    for name, (stage, *_) in cases.items():
        compare(toy / f"{name}/one/stage{stage}", toy / f"{name}/several/stage{stage}")
    if sharded:
        check_shares(toy, processes)
    calls = {tuple(line.split()) for line in (toy / "hooks.txt").read_text().splitlines()}
    assert calls == {(hook, "0") for hook in ("train_started", "train_logged", "checkpoint_saved", "train_finished")}


def check_shares(toy: Path, processes: int) -> None:
    """Checks that each process had its share of the tensors, and that none was kept twice."""
    counts = [json.loads((toy / f"shares-{rank}").read_text()) for rank in range(processes)]
    total = counts[0]["parameters"]
    for kind, tensors in {"own": 1, "masters": 1, "moments": 2}.items():
        shares = [each[kind] for each in counts]
        assert sum(shares) == tensors * total
        # Rows are not divided: a share can be larger by a row per tensor.
        assert max(shares) < 1.1 * tensors * total / processes


def remove_after(stage: Path, step: int) -> None:
    """Makes ``stage`` look as if it had been killed after ``step``."""
    for checkpoint in (stage / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(stage / "model")
    (stage / "report.json").unlink()


@pytest.mark.slow
def test_a_checkpoint_of_replicas_is_resumed_sharded(toy: Path) -> None:
    write_records(toy, 37)
    settings = ["init=scratch", "max_steps=6", "epochs=4", "checkpoint_every=2", "keep_last=9", "validation=0"]
    assert run_cli(*command(toy, 2, settings, "one")).exit_code == 0
    shutil.copytree(toy / "one", toy / "three")
    remove_after(toy / "three/stage2", 2)
    run_in_processes(toy, 3, command(toy, 2, settings, "three", "sharding=full"))
    assert json.loads((toy / "three/stage2/report.json").read_text())["resumed_from"] == 2
    compare(toy / "one/stage2", toy / "three/stage2")


@pytest.mark.slow
def test_a_checkpoint_is_resumed_by_another_number_of_processes(toy: Path) -> None:
    write_records(toy, 37)
    settings = ["init=scratch", "shuffle=images", "max_steps=8", "epochs=4", "micro_batch_size=2"]
    settings += ["checkpoint_every=2", "keep_last=9", "validation=0.05"]
    stages = {name: toy / name / "stage2" for name in ("two", "one", "three", "two-again")}
    run_in_processes(toy, 2, command(toy, 2, settings, "two", "sharding=full"))
    for name in ("one", "three", "two-again"):
        shutil.copytree(toy / "two", toy / name)
        remove_after(stages[name], 4)
    resumed = run_cli(*command(toy, 2, settings, "one"))
    assert resumed.json()["resumed_from"] == 4
    run_in_processes(toy, 3, command(toy, 2, settings, "three", "sharding=full"))
    run_in_processes(toy, 2, command(toy, 2, settings, "two-again", "sharding=full"))
    lines = read(stages["two"] / "metrics.jsonl")
    for name in ("one", "three"):
        compare_metrics(lines, read(stages[name] / "metrics.jsonl"), 1e-5)
        assert json.loads((stages[name] / "report.json").read_text())["resumed_from"] == 4
    expected, actual = weights(stages["two"] / "model"), weights(stages["two-again"] / "model")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    compare_metrics(lines, read(stages["two-again"] / "metrics.jsonl"), 0)


STOPPER = """
from llavactl import hookimpl

@hookimpl
def control_training(lines):
    return "stop" if sum("loss" in line for line in lines) >= 3 else None
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_plugin_ends_a_stage_after_the_same_step_in_all_processes(toy: Path, sharding: str) -> None:
    write_records(toy, 37)
    (toy / "stopper.py").write_text(STOPPER)
    settings = ["init=scratch", "max_steps=6", "epochs=4", "validation=0.05"]
    alone = run_cli("--plugin", str(toy / "stopper.py"), *command(toy, 2, settings, "one"))
    assert (alone.json()["steps"], alone.json()["stopped_by"]) == (3, ["stopper"])
    several = command(toy, 2, settings, "two", f"sharding={sharding}")
    run_in_processes(toy, 2, ["--plugin", str(toy / "stopper.py"), *several])
    report = json.loads((toy / "two/stage2/report.json").read_text())
    assert (report["steps"], report["stopped_by"]) == (3, ["stopper"])
    compare(toy / "one/stage2", toy / "two/stage2")


KILLED = """
import os, signal, sys
from llavactl.cli import main
from llavactl.training import checkpoints, step

def kill(function, step_of):
    def wrapped(*arguments):
        if os.environ["RANK"] == "1" and step_of(*arguments) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return wrapped

if sys.argv.pop(1) == "step":
    calls = []
    step.to_device = kill(step.to_device, lambda *_: calls.append(0) or len(calls))
else:
    saves = []
    checkpoints._write = kill(checkpoints._write, lambda *_: saves.append(0) or len(saves))
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on Windows")
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("moment", ["step", "save"])
def test_if_a_process_is_killed_the_others_end_and_the_run_resumes(toy: Path, moment: str, sharding: str) -> None:
    write_records(toy, 37)
    (toy / "killed.py").write_text(KILLED)
    settings = ["init=scratch", "max_steps=8", "epochs=4", "checkpoint_every=1", "validation=0", "keep_last=9"]
    arguments = command(toy, 2, settings, "run", f"sharding={sharding}")
    began = time.monotonic()
    killed = launch(3, str(toy / "killed.py"), moment, *arguments)
    assert time.monotonic() - began < 60, "the others noticed"
    assert killed.returncode != 0
    assert "another process of this run" in killed.stderr
    assert "resume" in killed.stderr
    saved = sorted(path.name for path in (toy / "run/stage2/checkpoints").glob("step-*"))
    assert saved, "earlier checkpoints are kept"
    run_in_processes(toy, 3, arguments)
    report = json.loads((toy / "run/stage2/report.json").read_text())
    assert report["resumed_from"] == int(saved[-1].removeprefix("step-"))
    run_in_processes(toy, 3, command(toy, 2, settings, "uninterrupted", f"sharding={sharding}"))
    expected, actual = weights(toy / "uninterrupted/stage2/model"), weights(toy / "run/stage2/model")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


SIGNALLED = """
import os, signal
from llavactl.cli import main
from llavactl.training import loop

def update(run, gradient, step, steps, original=loop.update):
    if os.environ["RANK"] == "1" and step + 1 == steps:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(run, gradient, step, steps)

loop.update = update
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM on Windows")
def test_a_signal_to_one_process_in_the_last_step_stops_all(toy: Path) -> None:
    write_records(toy, 37)
    (toy / "signalled.py").write_text(SIGNALLED)
    arguments = command(toy, 2, ["init=scratch", "max_steps=2", "validation=0"], "run")
    stopped = launch(2, str(toy / "signalled.py"), *arguments)
    assert stopped.returncode != 0
    assert "another process of this run" not in stopped.stderr
    assert (toy / "run/stage2/checkpoints/step-00000002").is_dir()
    assert not (toy / "run/stage2/model").exists()
    run_in_processes(toy, 2, arguments)
    assert json.loads((toy / "run/stage2/report.json").read_text())["resumed_from"] == 2


@pytest.mark.slow
def test_all_processes_report_that_the_stage_is_being_trained(toy: Path) -> None:
    write_records(toy, 37)
    with exclusive_lock(toy / "run/.stage2.lock", RuntimeError("locked")):
        refused = launch(2, "-m", "llavactl", *command(toy, 2, ["init=scratch"], "run"))
    assert refused.returncode != 0
    assert "another process of this run" not in refused.stderr
    assert "another process is training" in refused.stderr


@pytest.mark.parametrize("settings", [["method=qlora"], ["optimizer=muon"]])
def test_methods_that_cannot_be_sharded_are_refused(toy: Path, settings: list[str]) -> None:
    result = run_cli(*command(toy, 2, ["init=scratch", *settings], "run", "sharding=full"))
    assert result.exit_code == 1
    assert "sharding" in result.stderr
    assert "stage2." in result.stderr


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


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_all_processes_validate_with_the_saved_buffers(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str
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
    run_in_processes(toy, 2, command(toy, 1, settings, "run", "connector.name=buffered", f"sharding={sharding}"))
    saved = load_file(toy / "run/stage1/model/connector.safetensors")["mean"].tolist()
    means = [(tmp_path / f"means-{rank}").read_text().splitlines() for rank in (0, 1)]
    # Other means are from the connector check at the start and the sample answers at the end.
    assert all(str(saved) in lines for lines in means)
