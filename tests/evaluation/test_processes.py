"""Several processes answer part of the questions each; the result equals that of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from llavactl.evaluation import runner
from llavactl.evaluation.processes import SINGLE_PROCESS
from llavactl.testing import run_cli

from ..preloaded import Interpreters

WORDS = ("eval", "scenes", "-t", "scenes=3", "-o", "eval.max_new_tokens=4", "--json")
MAIN = "from llavactl.cli import main; main()"


@pytest.fixture
def run(toy: Path) -> Path:
    short = ("-o", "features.mode=live", "-o", "stage1.max_steps=1")
    assert run_cli("train", "--stage", "1", *short, cwd=toy).exit_code == 0
    return toy


def evaluate_in_two_processes(interpreters: Interpreters, folder: Path) -> Any:
    """The report of the first of two processes with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    output, errors = [folder / f"{rank}.out" for rank in (0, 1)], [folder / f"{rank}.err" for rank in (0, 1)]
    processes = [
        interpreters.start(
            MAIN,
            *WORDS,
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            output=output[rank],
            errors=errors[rank],
        )
        for rank in (0, 1)
    ]
    assert [process.wait() for process in processes] == [0, 0], [file.read_text()[-3000:] for file in errors]
    assert not output[1].read_text()
    return json.loads(output[0].read_text())


def test_two_processes_give_the_result_of_one(interpreters: Interpreters, run: Path) -> None:
    """Answers in part files of a killed run with another number of processes are not generated again."""
    single = run_cli(*WORDS, cwd=run).json()
    answers = Path(single["answers"])
    lines = answers.read_text().splitlines(keepends=True)
    shutil.rmtree(run / "runs/toy/eval")
    answers.parent.mkdir(parents=True)
    marked = {**json.loads(lines[0]), "text": "kept from before"}
    part = answers.with_name(f"{answers.name}.2.part")
    part.write_text(json.dumps(marked) + "\n" + lines[1][:9])
    report = evaluate_in_two_processes(interpreters, run)
    assert report["n"] == single["n"] == 18
    baseline = {file.name for file in answers.parent.glob("scenes*")} - {answers.name}
    assert [name.endswith(".jsonl") for name in baseline] == [True]
    assert report["baselines"] == single["baselines"]
    answered = {json.loads(line)["id"]: json.loads(line)["text"] for line in answers.read_text().splitlines()}
    expected = {json.loads(line)["id"]: json.loads(line)["text"] for line in lines}
    assert answered.pop(marked["id"]) == "kept from before"
    del expected[marked["id"]]
    assert answered == expected


def test_part_files_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "x[1].jsonl"
    file.write_text('{"id": "1", "text": "a"}\n')
    for rank in (0, 1):
        runner._part_file(file, rank).write_text(f'{{"id": "{rank + 2}", "text": "b"}}\n{{"id"')
    assert set(runner._merge_parts(file, SINGLE_PROCESS)) == {"1", "2", "3"}
    assert [each for each in tmp_path.iterdir() if each.is_file()] == [file]
    assert len(file.read_text().splitlines()) == 3
