"""CPU use of a training step, alone and beside other load, for settings of the OpenMP threads.

    python benchmarks/cpu.py --out cpu.json        # a quarter of an hour

Every run trains a few steps of stage 2 of the demo with packed sequences and Muon, in a new process.

- Phases of a step: forward and backward pass, update (gradient clipping, optimizer), waiting for data; for each the
  wall time and the number of busy cores (CPU time / wall time).
- Load: none; a second training process; one process per core that never sleeps, in another session.
- Settings: OpenMP's default (waiting threads spin for about a millisecond), a passive wait (threads sleep at once), and
  one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rounds import Document, Documents, add_options, publish

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LOADS = ("none", "training", "busy")
WARM_UP = 2
"""Steps that are not counted."""

PHASES = {"accumulate": "forward and backward", "update": "update"}
OVERRIDES = (
    "generate=null",
    "data.stage1=[]",
    "data.stage2=[{name: scenes, scenes: 200, split_turns: true, about: [color, shape, presence]}]",
    "stage2.init=scratch",
    "stage2.checkpoint_every=100000",
    "stage2.preview_every=null",
)
RECIPE = ["-r", "demo", *(word for each in OVERRIDES for word in ("-o", each))]


def train(recipe: list[str]) -> None:
    """Runs ``llavactl train`` in this process and prints the times of its steps as JSON."""
    from llavactl.cli import run_command
    from llavactl.training import loop

    times: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def timed(name: str) -> None:
        function = getattr(loop, name)

        def measured(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*arguments)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            return result

        setattr(loop, name, measured)

    for name in PHASES:
        timed(name)
    batches = loop.prefetched_steps

    def timed_steps(*arguments: Any) -> Iterator[Any]:
        iterator = batches(*arguments)
        wall, cpu = time.perf_counter(), time.process_time()
        for item in iterator:
            times["data"].append((time.perf_counter() - wall, time.process_time() - cpu))
            yield item
            wall, cpu = time.perf_counter(), time.process_time()

    loop.prefetched_steps = timed_steps
    code = run_command(recipe)
    print(json.dumps(times) if not code else "", flush=True)
    sys.exit(code)


def start(folder: Path, name: str, steps: int, setting: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")} | SETTINGS[setting]
    options = ["-o", f"run_dir={folder / name}", "-o", f"stage2.max_steps={steps}"]
    arguments = ["train", "--stage", "2", "--resume", "never", "--json", *RECIPE, *options]
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


@contextmanager
def load(kind: str, folder: Path, steps: int, setting: str) -> Iterator[None]:
    """Other load of this ``kind`` on the machine."""
    others: list[subprocess.Popen[str]] = []
    if kind == "training":
        others = [start(folder, "other", 10 * steps, setting)]
    elif kind == "busy":
        words = [sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(words, start_new_session=True, encoding="utf-8") for _ in range(CORES)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


def measured(folder: Path, steps: int, setting: str, kind: str) -> dict[str, float]:
    """Median seconds of each phase and of their sum, and busy cores in them."""
    with load(kind, folder, steps, setting):
        process = start(folder, "run", steps, setting)
        output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    times = json.loads(output.rstrip("\n").rpartition("\n")[2])
    result: dict[str, float] = {}
    for phase, label in {**PHASES, "data": "data"}.items():
        wall, cpu = zip(*times[phase][WARM_UP:], strict=True)
        result[label] = statistics.median(wall)
        result[f"{label}: cores"] = sum(cpu) / sum(wall)
    result["step"] = sum(result[label] for label in (*PHASES.values(), "data"))
    return result


def documents(rounds: int, steps: int) -> Documents:
    collected: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    machine = f"{CORES} cores, {platform.machine()}, {platform.system()}, torch {version('torch')}"
    with tempfile.TemporaryDirectory() as temporary:
        for done in range(1, rounds + 1):
            for kind in LOADS:
                for setting in SETTINGS if done % 2 else reversed(SETTINGS):
                    collected[setting, kind].append(measured(Path(temporary), steps, setting, kind))
            rows = [
                {"setting": setting, "load": kind, "seconds": _medians(values)}
                for (setting, kind), values in collected.items()
            ]
            yield {"machine": machine, "rounds": done, "steps": steps, "rows": rows}


def _medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in results), 3) for name in results[0]}


def as_text(document: Document) -> str:
    alone = {row["setting"]: row["seconds"]["step"] for row in document["rows"] if row["load"] == "none"}
    best = min(alone.values())
    lines = [f"{document['machine']}; {document['steps']} steps, {document['rounds']} rounds"]
    lines.append(f"{'setting':<12} {'load':<10} {'s/step':>7} {'/ best':>7}   busy cores: forward and backward, update")
    for row in document["rows"]:
        seconds = row["seconds"]
        cores = [seconds[f"{label}: cores"] for label in PHASES.values()]
        lines.append(
            f"{row['setting']:<12} {row['load']:<10} {seconds['step']:>7.2f} {seconds['step'] / best:>7.2f}   "
            + ", ".join(f"{value:.2f}" for value in cores)
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="Optimizer steps of each run.")
    add_options(parser)
    options = parser.parse_args()
    publish(documents(options.rounds, options.steps), options, as_text)


if __name__ == "__main__":
    main()
