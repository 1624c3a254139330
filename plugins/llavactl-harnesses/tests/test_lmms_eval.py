"""Local tasks run by lmms-eval on a toy model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llavactl import Assistant, Sampling, Turn, image_in_memory

pytest.importorskip("lmms_eval", reason="lmms_eval isn't installed: `make test-harnesses` installs it")

CHOICES = ["red", "green", "blue", "yellow"]
QUESTION = "Which color is it?"
VISUALS = """
from PIL import Image


def visuals(doc):
    return [Image.open(doc["file"])]
"""
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_visual: !function visuals.visuals
doc_to_text: "{{question}}"
"""
GENERATE = """
output_type: generate_until
doc_to_target: '{{CHOICES[label]}}'
generation_kwargs: {max_new_tokens: 9, temperature: 0, do_sample: false, num_beams: 1}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: CHOICES
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def output(folder: Path, photos: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two tasks, by lmms-eval's own command."""
    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "visuals.py").write_text(VISUALS)
    records = [{"question": QUESTION, "file": str(photo), "label": index} for index, photo in enumerate(photos)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, config in (("generate", GENERATE), ("choose", CHOOSE)):
        text = f"task: toy_{name}{COMMON}{config}".replace("DATA", json.dumps(str(tasks / "data.jsonl")))
        (tasks / f"{name}.yaml").write_text(text.replace("CHOICES", json.dumps(CHOICES)))
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "llavactl", "--model_args", f"model={folder}"),
        *("--include_path", str(tasks), "--tasks", "toy_generate,toy_choose", "--batch_size", "3"),
        *("--log_samples", "--output_path", str(tasks / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tasks)
    assert done.returncode == 0, done.stderr
    return tasks / "out"


def samples(output: Path, task: str) -> list[Any]:
    """What the model returned for each document."""
    (file,) = output.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line)["filtered_resps"] for line in file.read_text().splitlines()]


def scores(output: Path, task: str) -> dict[str, Any]:
    (file,) = output.rglob("*_results.json")
    return json.loads(file.read_text())["results"][task]


def conversations(photos: Sequence[Path]) -> list[list[Turn]]:
    from PIL import Image

    return [[Turn("user", (image_in_memory(Image.open(photo)), QUESTION))] for photo in photos]


def test_generation_equals_llavactl(output: Path, model: Assistant, photos: Sequence[Path]) -> None:
    assert samples(output, "toy_generate") == model.answer(conversations(photos), Sampling(9))


def test_multiple_choice_equals_llavactl(output: Path, model: Assistant, photos: Sequence[Path]) -> None:
    best = []
    for turns, sample in zip(conversations(photos), samples(output, "toy_choose"), strict=True):
        likelihoods = model.log_likelihoods([turns] * 4, CHOICES)
        losses = [-each.log_probability / each.tokens for each in likelihoods]
        # Samples are written as strings.
        assert [float(loss) for loss, _ in sample] == pytest.approx(losses, abs=1e-3)
        assert [greedy for _, greedy in sample] == [str(each.greedy) for each in likelihoods]
        best.append(losses.index(min(losses)))
    accuracy = sum(index == choice for index, choice in enumerate(best)) / 4
    assert scores(output, "toy_choose")["acc,none"] == pytest.approx(accuracy)
