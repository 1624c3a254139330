"""Ctrl-C and SIGTERM: a checkpoint at the end of the step, exit 130 or 143, and the run that follows is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavactl.chat.conversation import Conversation
from llavactl.components.vision.encoder import VisionEncoder
from llavactl.core import stopping
from llavactl.features import FeatureStore, stage_fingerprint
from llavactl.features.reader import LiveFeatures
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training import loop
from llavactl.training.metrics import read

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows delivers no such signals")

RARE = ["features.mode=live", "stage1.epochs=8", "stage2.epochs=8", "stage1.validation=0.2", "stage2.validation=0.2"]
RARE += ["stage1.checkpoint_every=1000", "stage2.checkpoint_every=1000", "stage2.init=scratch"]
"""No checkpoint is due before the end: what is there was saved because of the signal."""


def command(toy: Path, *options: str, stage: int = 1, folder: str = "cut") -> list[str]:
    words = [word for each in (*RARE, f"run_dir={toy}/{folder}", *options) for word in ("-o", each)]
    return ["train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *words, "--json"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def same(left: Path, right: Path) -> None:
    """To the bit."""
    assert read(left / "metrics.jsonl") == read(right / "metrics.jsonl")
    ours, theirs = weights(left / "model"), weights(right / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ},
    )  # fmt: skip


def wait_for(step: int, folder: Path, process: subprocess.Popen[str]) -> None:
    while not any(line["step"] >= step for line in read(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(each.name.partition("-")[2]) for each in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("end", "code", "stage"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2)])
def test_one_signal_saves_and_the_rest_follows(toy: Path, end: signal.Signals, code: int, stage: int) -> None:
    process = started(["llavactl", *command(toy, stage=stage)])
    folder = toy / f"cut/stage{stage}"
    wait_for(5, folder, process)
    process.send_signal(end)
    err = process.communicate()[1]
    assert process.returncode == code, err
    assert "Traceback" not in err
    last = read(folder / "metrics.jsonl")[-1]["step"]
    assert checkpoints(folder) == [last], "of the step that was under way"
    (line,) = [line for line in err.splitlines() if "resume after step" in line]
    assert f"step-{last:08d}" in line
    assert line.endswith(f"step {last}")
    assert err.splitlines()[-1] == "interrupted; run the same command to resume"
    resumed = run_cli(*command(toy, stage=stage))
    assert resumed.json()["resumed_from"] == last
    assert run_cli(*command(toy, stage=stage, folder="whole")).exit_code == 0
    same(folder, toy / f"whole/stage{stage}")


def test_two_signals_stop_at_once_and_the_rest_follows(toy: Path) -> None:
    process = started(["llavactl", *command(toy, "stage1.checkpoint_every=2")])
    wait_for(5, toy / "cut/stage1", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert run_cli(*command(toy, "stage1.checkpoint_every=2")).json()["resumed_from"] >= 4
    assert run_cli(*command(toy, "stage1.checkpoint_every=2", folder="whole")).exit_code == 0
    same(toy / "cut/stage1", toy / "whole/stage1")


class Sends:
    """Stands in for a function and sends signals to this process at its ``call``-th call, before the work is done."""

    def __init__(self, real: Callable[..., Any], call: int, *ends: signal.Signals) -> None:
        self.real, self.call, self.ends = real, call, ends

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.call -= 1
        for end in self.ends if self.call == 0 else ():
            signal.raise_signal(end)
        return self.real(*args, **more)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_leaves_the_step_unfinished(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Sends(loop.schedule, 5, signal.SIGINT, signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "schedule", step)
        result = run_cli(*command(toy))
    assert result.exit_code == 143
    assert "interrupt again" in result.stderr
    assert [line["step"] for line in read(toy / "cut/stage1/metrics.jsonl")] == [1, 2, 3, 4]
    assert checkpoints(toy / "cut/stage1") == []


OFTEN = ("stage1.checkpoint_every=3", "stage1.epochs=3", "stage1.restore_best=true")
MOMENTS = {
    "in a step": ("schedule", 2),
    "in a step before a validation": ("schedule", 3),
    "in the last step": ("schedule", -1),
    "before the first validation": ("validate", 1),
    "before the last validation": ("validate", -1),
    "before the first checkpoint": ("_save", 1),
    "before the last checkpoint": ("_save", -1),
    "when all steps are done": ("_load_best", 1),
}


@pytest.fixture(scope="module")
def whole(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of an uninterrupted run, and how often it called what."""
    folder = tmp_path_factory.mktemp("whole")
    calls = {name: Sends(getattr(loop, name), 0) for name, _ in MOMENTS.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(folder / "home"))
        for name, counting in calls.items():
            patch.setattr(loop, name, counting)
        assert run_cli(*command(toys, *OFTEN, f"run_dir={folder}")).exit_code == 0
    return folder / "stage1", {name: -counting.call for name, counting in calls.items()}


@pytest.mark.parametrize(("name", "call"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_signal_at_any_moment_changes_no_bit(
    toy: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, int]], name: str, call: int
) -> None:
    folder, calls = whole
    with monkeypatch.context() as patch:
        patch.setattr(loop, name, Sends(getattr(loop, name), call if call > 0 else calls[name], signal.SIGTERM))
        result = run_cli(*command(toy, *OFTEN))
    assert result.exit_code == 143, result.stderr
    stopped = read(toy / "cut/stage1/metrics.jsonl")[-1]["step"]
    assert checkpoints(toy / "cut/stage1")[-1] == stopped
    resumed = run_cli(*command(toy, *OFTEN))
    assert resumed.json()["resumed_from"] == stopped, resumed.stderr
    same(toy / "cut/stage1", folder)


def test_a_batch_that_takes_long_to_prepare_holds_nobody_up(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LiveFeatures.stored

    def slow(self: LiveFeatures, image: Any) -> Any:
        time.sleep(0.5)
        return real(self, image)

    monkeypatch.setattr(LiveFeatures, "stored", slow)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    real_batches = loop.prefetched_steps

    def delayed_steps(*args: Any) -> Any:
        threading.Timer(1, send).start()
        return real_batches(*args)

    monkeypatch.setattr(loop, "prefetched_steps", delayed_steps)
    result = run_cli(*command(toy, "stage1.batch_size=120"))
    assert result.exit_code == 143
    assert time.monotonic() - sent[0] < 10, "not the 60 s that the batch takes"
    assert "resume after" not in result.stderr, "there is nothing yet"


@pytest.mark.parametrize("where", ["initial_model", "load_split", "trial_save", "save_model", "_write_sample_answers"])
def test_a_signal_where_no_step_is_under_way_acts_at_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from llavactl.verbs import train

    called: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, where, Sends(lambda *_, **_more: called.append(where), 1, signal.SIGTERM))
        result = run_cli(*command(toy, "stage1.max_steps=2"))
    assert result.exit_code == 143
    assert not called
    assert result.stderr.splitlines()[-1] == "interrupted; run the same command to resume"
    assert run_cli(*command(toy, "stage1.max_steps=2")).exit_code == 0


def test_extract_keeps_what_was_made(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        real = VisionEncoder.encode
        sends = Sends(real, 9, signal.SIGTERM)
        patch.setattr(VisionEncoder, "encode", lambda *args: sends(*args))
        result = run_cli("extract", cwd=toy)
    assert result.exit_code == 143, result.stderr
    assert len(FeatureStore.open(stage_fingerprint(load_recipe(toy / "recipe.yaml"), 1))) > 0
    assert run_cli("extract", cwd=toy).exit_code == 0


def test_sigterm_ends_a_conversation_that_ctrl_c_does_not(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(*command(toy, "stage1.max_steps=1", "stage1.template=vicuna-v1")).exit_code == 0
    real = Conversation.ask
    for end, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        sends = Sends(real, 1, end)
        monkeypatch.setattr(Conversation, "ask", lambda *args, sends=sends, **more: sends(*args, **more))
        words = ["chat", "--model", str(toy / "cut/stage1/model"), "--max-new-tokens", "1"]
        result = run_cli(*words, stdin="one\ntwo\n")
        assert result.exit_code == code, result.stderr
        assert sends.call == (-1 if end == signal.SIGINT else 0), "the second question"


def test_what_was_started_to_ignore_a_signal_ignores_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping.sigterm_as_interrupt(), stopping.deferred_interrupt() as stop:
            signal.raise_signal(signal.SIGTERM)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_is_touched() -> None:
    found: list[Any] = []

    def work() -> None:
        with stopping.sigterm_as_interrupt(), stopping.deferred_interrupt():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llavactl"]


def workers(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize("receiver", ["launcher", "first", "second"])
def test_two_processes_stop_after_the_same_step(toy: Path, receiver: str) -> None:
    """Whether torchrun passes the signal on to both or only one of them gets it."""
    folder = toy / "cut/stage1"
    process = started([*TORCHRUN, *command(toy, "stage1.batch_size=2", "stage1.epochs=20")])
    wait_for(5, folder, process)
    targets = {"launcher": process.pid, **dict(zip(("first", "second"), workers(process.pid), strict=True))}
    os.kill(targets[receiver], signal.SIGTERM)
    err = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert err.count("resume after step") == 1, err
    assert "RuntimeError" not in err
    last = read(folder / "metrics.jsonl")[-1]["step"]
    assert checkpoints(folder) == [last]
    for name in ("cut", "whole"):
        done = started([*TORCHRUN, *command(toy, "stage1.batch_size=2", "stage1.epochs=20", folder=name)])
        err = done.communicate(timeout=300)[1]
        assert done.returncode == 0, err
    same(folder, toy / "whole/stage1")
