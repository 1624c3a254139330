"""The predicted memory of a whole process on a CPU, against the peak that the system measured for ``train``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavactl.testing import toy_language

SCENES = [f"data.stage{stage}=[{{name: scenes, content: descriptions, scenes: 60}}]" for stage in (1, 2)]
SHORT = ["stage1.max_steps=4", "stage2.max_steps=4", "stage2.init=scratch", "stage1.box_alignment_steps=0"]
SHORT += ["stage1.preview_every=null", "stage2.preview_every=null"]
MEASURED = """
import resource, sys
from llavactl.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


def llavactl(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("stage", [1, 2])
def test_the_resident_memory_of_the_demo(tmp_path: Path, stage: int) -> None:
    overrides = [word for value in (*SCENES, *SHORT) for word in ("-o", value)]
    train = ["train", "-r", "demo", "--stage", str(stage), *overrides]
    llavactl("extract", "-r", "demo", *overrides, folder=tmp_path)
    plan = json.loads(llavactl(*train, "--dry-run", "--json", folder=tmp_path).stdout)
    measured = int(llavactl(*train, folder=tmp_path).stderr.split()[-1])
    assert plan["peak_bytes"]["host"] == pytest.approx(measured, rel=0.15)
    assert sum(plan["peak_parts"]["host"].values()) == plan["peak_bytes"]["host"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("settings", [["method=lora"], ["method=full"], ["method=full", "precision=bfloat16"]])
def test_the_resident_memory_of_a_llama(toy: Path, settings: list[str], checkpointing: str) -> None:
    records = json.loads((toy / "records.json").read_text())
    extended = []
    for number, record in enumerate(records * 20):
        turns = [record["conversations"][0], {"from": "gpt", "value": "It is. " * (1 + number % 12)}]
        extended.append({**record, "id": str(number), "conversations": turns})
    (toy / "records.json").write_text(json.dumps(extended))
    toy_language(toy / "language", width=512, layers=8)
    common = ["features.mode=live", "stage2.init=scratch", "stage2.max_steps=6", "stage2.batch_size=32"]
    common += ["stage2.micro_batch_size=32", "stage2.epochs=9", f"stage2.gradient_checkpointing={checkpointing}"]
    words = [word for value in (*common, *(f"stage2.{each}" for each in settings)) for word in ("-o", value)]
    train = ["train", "-r", "recipe.yaml", "--stage", "2", *words]
    plan = json.loads(llavactl(*train, "--dry-run", "--json", folder=toy).stdout)
    measured = int(llavactl(*train, folder=toy).stderr.split()[-1])
    assert plan["peak_bytes"]["host"] == pytest.approx(measured, rel=0.15)
