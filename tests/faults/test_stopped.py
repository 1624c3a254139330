"""Ctrl-C and SIGTERM: a checkpoint after the current step, exit code 130 or 143, and a bit-identical resumed run."""

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
from llavactl.training import loop, milestones
from llavactl.training.metrics import read, without_measured

from ..preloaded import Interpreters, Process

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows doesn't deliver these signals")

NO_CHECKPOINTS = [
    "features.mode=live",
    "stage1.epochs=8",
    "stage2.epochs=8",
    "stage1.validation=0.2",
    "stage2.validation=0.2",
]
NO_CHECKPOINTS += ["stage1.checkpoint_every=1000", "stage2.checkpoint_every=1000", "stage2.init=scratch"]
"""No checkpoint is due before the end, so every checkpoint was saved because of a signal."""


def command(toy: Path, *options: str, stage: int = 1, folder: str = "interrupted") -> list[str]:
    words = [word for option in (*NO_CHECKPOINTS, f"run_dir={toy}/{folder}", *options) for word in ("-o", option)]
    return ["train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *words, "--json"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def assert_identical(left: Path, right: Path) -> None:
    """The metrics are equal and the weights bit-identical."""
    assert without_measured(read(left / "metrics.jsonl")) == without_measured(read(right / "metrics.jsonl"))
    first, second = weights(left / "model"), weights(right / "model")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ},
    )  # fmt: skip


def wait_for(step: int, folder: Path, process: subprocess.Popen[str] | Process) -> None:
    while not any(line["step"] >= step for line in read(folder / "metrics.jsonl")):
        assert process.poll() is None, f"the run ended before step {step}"
        time.sleep(0.005)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(each.name.partition("-")[2]) for each in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("end", "code", "stage"), [(signal.SIGTERM, 143, 1), pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.slow)]
)
def test_one_signal_saves_a_checkpoint_and_the_run_resumes(
    toy: Path, interpreters: Interpreters, end: signal.Signals, code: int, stage: int
) -> None:
    output = toy / "output"
    program = "from llavactl.cli import main; main()"
    process = interpreters.start(program, *command(toy, stage=stage), cwd=toy, env=os.environ, output=output)
    folder = toy / f"interrupted/stage{stage}"
    wait_for(5, folder, process)
    process.send_signal(end)
    ended, err = process.wait(), output.read_text()
    assert ended == code, err
    assert "Traceback" not in err
    last = read(folder / "metrics.jsonl")[-1]["step"]
    assert checkpoints(folder) == [last], "expected the checkpoint of the current step"
    (line,) = [line for line in err.splitlines() if "resume after step" in line]
    assert f"step-{last:08d}" in line
    assert line.endswith(f"step {last}")
    assert err.splitlines()[-1].startswith("interrupted")
    resumed = run_cli(*command(toy, stage=stage))
    assert resumed.json()["resumed_from"] == last
    assert run_cli(*command(toy, stage=stage, folder="uninterrupted")).exit_code == 0
    assert_identical(folder, toy / f"uninterrupted/stage{stage}")


@pytest.mark.slow  # below, signals are sent in this process
def test_two_signals_stop_at_once_and_the_run_resumes(toy: Path) -> None:
    process = started(["llavactl", *command(toy, "stage1.checkpoint_every=2")])
    wait_for(5, toy / "interrupted/stage1", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert run_cli(*command(toy, "stage1.checkpoint_every=2")).json()["resumed_from"] >= 4
    assert run_cli(*command(toy, "stage1.checkpoint_every=2", folder="uninterrupted")).exit_code == 0
    assert_identical(toy / "interrupted/stage1", toy / "uninterrupted/stage1")


class SignalSender:
    """Wraps a function and sends signals to this process before its ``call``-th call."""

    def __init__(self, real: Callable[..., Any], call: int, *ends: signal.Signals) -> None:
        self.real, self.call, self.ends = real, call, ends

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.call -= 1
        for end in self.ends if self.call == 0 else ():
            signal.raise_signal(end)
        return self.real(*args, **more)


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_signal_aborts_the_step(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SignalSender(loop.update, 5, signal.SIGINT, signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", step)
        result = run_cli(*command(toy))
    assert result.exit_code == 143
    assert "interrupt again" in result.stderr
    assert [line["step"] for line in read(toy / "interrupted/stage1/metrics.jsonl")] == [1, 2, 3, 4]
    assert checkpoints(toy / "interrupted/stage1") == []


FREQUENT_CHECKPOINTS = ("stage1.checkpoint_every=3", "stage1.epochs=3", "stage1.restore_best=true")
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in a step": (loop, "update", 2),
    "in a step before a validation": (loop, "update", 3),
    "in the last step": (loop, "update", -1),
    "before the first validation": (milestones, "validate", 1),
    "before the last validation": (milestones, "validate", -1),
    "before the first checkpoint": (milestones.checkpoints, "save", 2),  # the first call is a trial before step 1
    "before the last checkpoint": (milestones.checkpoints, "save", -1),
    "when all steps are done": (loop, "_load_best", 1),
}
FAST_MOMENTS = ("in a step", "before the first validation", "before the last checkpoint", "when all steps are done")


@pytest.fixture(scope="module")
def uninterrupted(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of an uninterrupted run, and the number of calls of each function."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    calls = {name: (module, SignalSender(getattr(module, name), 0)) for module, name, _ in MOMENTS.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(folder / "home"))
        for name, (module, counting) in calls.items():
            patch.setattr(module, name, counting)
        assert run_cli(*command(toys, *FREQUENT_CHECKPOINTS, f"run_dir={folder}")).exit_code == 0
    return folder / "stage1", {name: -counting.call for name, (_, counting) in calls.items()}


@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=() if each in FAST_MOMENTS else pytest.mark.slow) for each in MOMENTS]
)
def test_signal_at_any_moment_gives_a_bit_identical_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: tuple[Path, dict[str, int]], moment: str
) -> None:
    folder, calls = uninterrupted
    module, name, call = MOMENTS[moment]
    with monkeypatch.context() as patch:
        sender = SignalSender(getattr(module, name), call if call > 0 else calls[name], signal.SIGTERM)
        patch.setattr(module, name, sender)
        result = run_cli(*command(toy, *FREQUENT_CHECKPOINTS))
    assert result.exit_code == 143, result.stderr
    stopped = read(toy / "interrupted/stage1/metrics.jsonl")[-1]["step"]
    assert checkpoints(toy / "interrupted/stage1")[-1] == stopped
    resumed = run_cli(*command(toy, *FREQUENT_CHECKPOINTS))
    assert resumed.json()["resumed_from"] == stopped, resumed.stderr
    assert_identical(toy / "interrupted/stage1", folder)


def test_slow_batch_preparation_does_not_delay_the_stop(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LiveFeatures.arrays

    def slow(self: LiveFeatures, image: Any) -> Any:
        time.sleep(0.5)
        return real(self, image)

    monkeypatch.setattr(LiveFeatures, "arrays", slow)
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
    assert time.monotonic() - sent[0] < 10, "waited for the batch, which takes 60 s"
    assert "resume after" not in result.stderr, "no checkpoint was saved"


@pytest.mark.parametrize(
    "where",
    [
        *("load_split", "save_model"),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("initial_model", "trial_save", "_write_sample_answers")
        ),
    ],
)
def test_signal_outside_of_a_step_stops_at_once(toy: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from llavactl.verbs import train

    called: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, where, SignalSender(lambda *_, **_more: called.append(where), 1, signal.SIGTERM))
        result = run_cli(*command(toy, "stage1.max_steps=2"))
    assert result.exit_code == 143
    assert not called
    assert result.stderr.splitlines()[-1].startswith("interrupted")
    assert run_cli(*command(toy, "stage1.max_steps=2")).exit_code == 0


def test_interrupted_extract_keeps_encoded_features(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        real = VisionEncoder.encode
        sender = SignalSender(real, 9, signal.SIGTERM)
        patch.setattr(VisionEncoder, "encode", lambda *args: sender(*args))
        result = run_cli("extract", cwd=toy)
    assert result.exit_code == 143, result.stderr
    assert len(FeatureStore.open(stage_fingerprint(load_recipe(toy / "recipe.yaml"), 1))) > 0
    assert run_cli("extract", cwd=toy).exit_code == 0


def test_sigterm_ends_a_chat_and_ctrl_c_only_the_answer(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(*command(toy, "stage1.max_steps=1", "stage1.template=vicuna-v1")).exit_code == 0
    real = Conversation.ask
    for end, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        sender = SignalSender(real, 1, end)
        monkeypatch.setattr(Conversation, "ask", lambda *args, sender=sender, **more: sender(*args, **more))
        words = ["chat", "--model", str(toy / "interrupted/stage1/model"), "--max-new-tokens", "1"]
        result = run_cli(*words, stdin="one\ntwo\n")
        assert result.exit_code == code, result.stderr
        assert sender.call == (-1 if end == signal.SIGINT else 0), "the second question"


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping.signals_as_interrupts(), stopping.deferred_interrupt() as stop:
            signal.raise_signal(signal.SIGTERM)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_unchanged_in_other_threads() -> None:
    found: list[Any] = []

    def work() -> None:
        with stopping.signals_as_interrupts(), stopping.deferred_interrupt():
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
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("receiver", ["launcher", "first", "second"])
def test_two_processes_stop_after_the_same_step(toy: Path, receiver: str) -> None:
    """Whether torchrun forwards the signal to both processes or only one of them receives it."""
    folder = toy / "interrupted/stage1"
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
    for name in ("interrupted", "uninterrupted"):
        done = started([*TORCHRUN, *command(toy, "stage1.batch_size=2", "stage1.epochs=20", folder=name)])
        err = done.communicate(timeout=300)[1]
        assert done.returncode == 0, err
    assert_identical(folder, toy / "uninterrupted/stage1")
