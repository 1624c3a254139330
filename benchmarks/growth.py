"""Time and memory from ``llavactl train`` to its first optimizer step, by number of records.

    python benchmarks/growth.py                                              # 1,000 and 10,000 records
    python benchmarks/growth.py --records 1000 10000 100000 665000 1000000 --out benchmarks/results/growth-2-cores.json

Records have the sizes of LLaVA's v1.5 mix (665,000 records, 1.05 GB, 380,000 distinct images; see mix.py): their texts
are slices of the real ones in ``../shared/data/llava``. Images are files of 70 bytes, features random and small (4x8),
the language model has one layer of width 32 and a byte-level BPE tokenizer. So the time depends on the number and size
of records, not on the model. Before the first start, features are stored and images hashed, as after ``llavactl
extract``. Files are in the page cache. Each start is a process of its own, interrupted after step 1:

- first    nothing is cached but the features and the hashes of images
- second   the same command with ``--resume never``
- resumed  the same command, after the checkpoint of step 1

``seconds`` is from launch to the first step. Phases are seconds of the main process; ``imports`` includes the start of
Python. ``cpu_seconds`` is of all processes. ``peak_mb`` is the largest sum of their proportional set sizes (PSS), in
which a page that they share counts once. ``json.load`` of the records is measured for comparison.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rounds import Document, Documents, add_options, publish

PHASES = {
    "features": "llavactl.verbs.train:open_features",
    "model": "llavactl.verbs.train:initial_model",
    "read": "llavactl.data.split:sample_table",
    "images": "llavactl.features.reader:CachedFeatures.contents",
    "tokenize": "llavactl.data.split:token_lengths",
    "split": "llavactl.data.split:_image_groups",
    "hold out": "llavactl.data.split:choose_held_out",
    "digest": "llavactl.data.split:_digest",
    "choose": "llavactl.verbs.train:choice_for_training",
    "plan": "llavactl.training.loop:batch_plan",
    "trial save": "llavactl.verbs.train:trial_save",
}
"""The function of each phase."""

RECIPE = """\
name: growth
vision: {name: clip, model: clip, layer: -1, select: patch, image: pad}
connector: {name: mlp2x-gelu}
language: {name: hf, model: language, template: vicuna-v1}
features: {shard_images: 20000}
data: {stage2: [{name: llava-json, path: records.json, images: images/}]}
stage2: {batch_size: 128, learning_rate: 1e-3, precision: float32, init: scratch}
run_dir: run
"""

STARTS = {"first": "never", "second": "never", "resumed": "auto"}
"""The value of ``--resume`` of each start."""


def prepared(folder: Path, count: int) -> dict[str, Any]:
    """The numbers of records, images and megabytes in ``folder``, without results of an earlier benchmark."""
    description = folder / "prepared.json"
    if not description.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        description.write_text(json.dumps(prepare(folder, count)), encoding="utf-8")
    for path in ("run", "home/cache/samples", "home/cache/token-lengths"):
        shutil.rmtree(folder / path, ignore_errors=True)
    return dict(json.loads(description.read_text(encoding="utf-8")))


def prepare(folder: Path, count: int) -> dict[str, Any]:
    """Writes records, images, features and models to ``folder``."""
    from mix import write_features, write_language, write_records

    from llavactl import load_recipe
    from llavactl.features.keys import ContentKeys
    from llavactl.images.image_file import ImageFile
    from llavactl.testing import toy_clip

    file = folder / "records.json"
    keys = write_records(file, count, folder / "images")
    write_language(folder / "language")
    toy_clip(folder / "clip", width=8, layers=1)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_features(load_recipe(folder / "recipe.yaml"), list(keys.values()))
    time.sleep(2)  # hashes of younger files are not cached
    ContentKeys().keys_of([ImageFile(str(folder / "images"), name) for name in keys])
    return {"records": count, "images": len(keys), "megabytes": round(file.stat().st_size / 1e6)}


def json_load(file: Path) -> float:
    """Seconds that ``json.load`` takes."""
    code = f"import json, time; t = time.perf_counter(); json.load(open({str(file)!r})); print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def measure(folder: Path, resume: str) -> dict[str, Any]:
    """One start of stage 2, in a process that ends after its first step."""
    result = folder / "start.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", str(folder), "--resume", resume]
    environment = {**os.environ, "GROWTH_LAUNCHED": repr(time.time())}
    peak = 0.0
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                peak = max(peak, pss_mb(process.pid))
                time.sleep(0.25)
        except BaseException:
            process.kill()
            raise
    if not result.is_file():
        raise SystemExit("a start failed:\n" + (folder / "log.txt").read_text(encoding="utf-8"))
    return {**json.loads(result.read_text(encoding="utf-8")), "peak_mb": round(peak)}


def pss_mb(pid: int) -> float:
    """The proportional set size of process ``pid`` and its children, in megabytes."""
    total = 0
    for each in (pid, *children(pid)):
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in text.split("\n") if line.startswith("Pss:"))
    return total / 1024


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def child(folder: Path, resume: str) -> None:
    """Runs ``llavactl train --stage 2``, writes ``start.json`` when the first step begins, and stops after it."""
    from llavactl.cli import main
    from llavactl.core import plugins

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start jobs with signals ignored
    launched, imported = float(os.environ["GROWTH_LAUNCHED"]), time.time()
    phases: dict[str, float] = {"imports": imported - launched}
    for phase, target in PHASES.items():
        time_calls(target, phase, phases)

    def train_started(steps: int) -> None:
        seconds = time.time() - launched
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result = {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
            "steps": steps,
            "phases": {phase: round(duration, 2) for phase, duration in phases.items()},
        }
        result["phases"]["other"] = round(seconds - sum(phases.values()), 2)
        (folder / "start.json").write_text(json.dumps(result), encoding="utf-8")

    def train_logged() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    observer = SimpleNamespace(train_started=plugins_hook(train_started), train_logged=plugins_hook(train_logged))
    plugins.manager().register(observer, "growth")
    main(["train", "--stage", "2", "-r", str(folder / "recipe.yaml"), "--resume", resume])


def plugins_hook(function: Callable[..., None]) -> Callable[..., None]:
    from llavactl import hookimpl

    return hookimpl(function)


def time_calls(target: str, phase: str, seconds: dict[str, float]) -> None:
    """Adds the duration of every call of ``target`` to ``seconds``."""
    module, path = target.split(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    function = getattr(owner, name)

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

    setattr(owner, name, timed)


def documents(options: argparse.Namespace) -> Documents:
    """The results so far, after each start."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    results: list[dict[str, Any]] = []
    for count in options.records:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)) / f"{count}"
            os.environ["LLAVACTL_HOME"] = str(folder / "home")
            print(f"{count:,} records: preparing", file=sys.stderr, flush=True)
            result = prepared(folder, count)
            results.append(result)
            result["json.load seconds"] = round(json_load(folder / "records.json"), 1)
            for start, resume in STARTS.items():
                load = os.getloadavg()[0]
                result[start] = {**measure(folder, resume), "load_before": round(load, 1)}
                print(f"{count:,} records: {start} {result[start]}", file=sys.stderr, flush=True)
                yield {**machine, "results": results}


def as_text(document: Document) -> str:
    lines = []
    for result in document["results"]:
        lines.append(
            f"{result['records']:,} records ({result['megabytes']} MB, {result['images']:,} images); "
            f"json.load {result['json.load seconds']} s"
        )
        for start in STARTS:
            if measured := result.get(start):
                phases = ", ".join(f"{phase} {seconds}" for phase, seconds in measured["phases"].items())
                total = f"{measured['seconds']} s (CPU {measured['cpu_seconds']} s), peak {measured['peak_mb']} MB"
                lines.append(f"  {start:8} {total}; {phases}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000], help="numbers of records")
    parser.add_argument("--folder", type=Path, help="folder that keeps the data for other runs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.resume)
    else:
        publish(documents(options), options, as_text)


if __name__ == "__main__":
    main()
