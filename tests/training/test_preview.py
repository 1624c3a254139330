"""Previews during training: answers about two images, a model to chat with, and unchanged results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavactl.core.errors import DataError
from llavactl.core.schema import Question, Turn
from llavactl.evaluation.periodic import FixedFeatures
from llavactl.images.image_file import ImageFile
from llavactl.model.folder import latest_model, newest_preview
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training.metrics import read, without_measured
from llavactl.verbs.preview import contrasted, remove_previews

TASK = "eval.tasks=[{name: scenes, scenes: 8}]"
STAGE2 = ("stage2.init=scratch", "stage2.max_steps=4", "stage2.validation=0.2", "eval.max_new_tokens=4")
PREVIEW = "stage2.preview_every=1e-9"


def command(toy: Path, folder: str, *settings: str) -> list[str]:
    words = [word for each in (f"run_dir={toy}/{folder}", *STAGE2, *settings) for word in ("-o", each)]
    return ["train", "--stage", "2", "-r", str(toy / "recipe.yaml"), "-o", "features.mode=live", *words]


def train(toy: Path, folder: str, *settings: str) -> Any:
    result = run_cli(*command(toy, folder, *settings), "--json")
    assert result.exit_code == 0, result.stderr
    return result


def previews(folder: Path) -> dict[int, list[dict[str, str]]]:
    files = sorted((folder / "stage2/preview").glob("step-*.json"))
    return {int(file.stem.removeprefix("step-")): json.loads(file.read_text()) for file in files}


def test_a_preview_does_not_change_training(toy: Path) -> None:
    plain = train(toy, "plain").json()
    result = train(toy, "shown", PREVIEW, TASK)
    assert result.json()["digest"] == plain["digest"]
    weights = [load_file(toy / name / "stage2/model/language/model.safetensors") for name in ("plain", "shown")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [without_measured(read(toy / name / "stage2/metrics.jsonl")) for name in ("plain", "shown")]
    assert lines[0] == lines[1]
    shown = previews(toy / "shown")
    assert list(shown) == [0, 1, 2, 3], "before the first step and after each but the last, which has the final model"
    for rows in shown.values():
        assert {row["question"] for row in rows} == {row["question"] for row in shown[0]}
        assert all(row["image"] != row["other_image"] and row["reference"] != row["other_reference"] for row in rows)
        assert rows[0]["other_reference"], "a question with different answers about two images comes first"
    lines_of_answers = [line for line in result.stderr.splitlines() if "after step" in line and "test-0" in line]
    assert len(lines_of_answers) == 4
    assert not (toy / "shown/stage2/preview/model").exists(), "the stage has its final model"
    assert 'http-equiv="refresh"' not in (toy / "shown/report.html").read_text()


def test_validation_samples_are_shown_without_a_task(toy: Path) -> None:
    train(toy, "shown", PREVIEW)
    assert all(rows for rows in previews(toy / "shown").values())


def test_the_model_of_a_preview_can_be_chatted_with_after_a_kill(toy: Path) -> None:
    """Kills the process after the first preview, then chats with the command that it printed."""
    words = [sys.executable, "-m", "llavactl", *command(toy, "killed", PREVIEW, TASK, "stage2.max_steps=10000")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "chat with" in line)
        process.send_signal(signal.SIGKILL)
    folder = toy / "killed/stage2/preview/model"
    assert f"--model {folder}" in line
    image = line.split()[-1]
    assert Path(image).is_file()
    for model in (["--model", str(folder)], ["-r", str(toy / "recipe.yaml"), "-o", f"run_dir={toy}/killed"]):
        result = run_cli("chat", *model, "--image", image, "--prompt", "What is this?", "--max-new-tokens", "2")
        assert result.exit_code == 0, result.stderr
    page = (toy / "killed/report.html").read_text()
    assert 'http-equiv="refresh"' in page
    assert "each about its image and about another one" in page


def test_a_failing_preview_is_a_warning(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.verbs import preview

    def fail(*_: Any) -> None:
        raise ValueError("no answer")

    for name in ("_answers", "_publish"):
        with monkeypatch.context() as patch:
            patch.setattr(preview.AnswerPreview, name, fail)
            result = train(toy, name, PREVIEW, TASK, "stage2.max_steps=2")
        assert "the preview after step 1 failed (ValueError: no answer)" in result.stderr


def test_questions_that_cannot_be_read_are_a_warning(toy: Path) -> None:
    broken = "eval.tasks=[{name: pope, questions: missing.jsonl, labels: missing.json, images: .}]"
    result = train(toy, "shown", PREVIEW, broken, "stage2.max_steps=2")
    assert "stage2: no previews: " in result.stderr
    assert previews(toy / "shown") == {}


@pytest.mark.parametrize("error", [ValueError("no features"), SystemExit(3), DataError("no features")], ids=repr)
def test_any_exception_while_a_preview_is_prepared_is_a_warning(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(FixedFeatures, "__init__", fail)
    result = train(toy, "shown", PREVIEW, TASK, "stage2.max_steps=2")
    (warning,) = (line for line in result.stderr.splitlines() if "stage2: no previews: " in line)
    assert warning.endswith(str(error))
    assert previews(toy / "shown") == {}
    assert (toy / "shown/stage2/model").is_dir()


@pytest.mark.slow
def test_stage_1_is_asked_questions(toy: Path) -> None:
    """The template of stage 1, ``plain``, has no questions; that of the language model has."""
    options = ["-o", f"run_dir={toy}/run", "-o", "stage1.preview_every=1e-9", "-o", TASK, "-o", "stage1.max_steps=5000"]
    words = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), "-o", "features.mode=live", *options]
    with subprocess.Popen([sys.executable, "-m", "llavactl", *words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("chat with" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
    described = json.loads((toy / "run/stage1/preview/model/llavactl.json").read_text())
    assert described["template"] == load_recipe(toy / "recipe.yaml", []).language.template != "plain"


def test_chat_uses_the_newest_weights_and_other_commands_finished_stages(toy: Path) -> None:
    run = toy / "run"
    for folder in ("stage1/model", "stage2/model", "stage1/preview/model"):
        (run / folder).mkdir(parents=True)
    assert latest_model(run) == run / "stage2/model"
    assert newest_preview(run) == run / "stage1/preview/model"
    (run / "stage2/preview/model").mkdir(parents=True)
    assert newest_preview(run) == run / "stage2/preview/model"
    remove_previews(run, 2)
    assert newest_preview(run) == run / "stage1/preview/model"
    (run / "stage2/preview/model").mkdir(parents=True)
    remove_previews(run, 1)
    assert newest_preview(run) is None


@pytest.mark.slow
def test_replicas_go_on_after_a_failing_preview(toy: Path) -> None:
    """Only the main process answers; the others must not wait for what it didn't reach."""
    script = toy / "failing.py"
    script.write_text(
        "import sys, llavactl.verbs.preview as module, llavactl.cli as cli\n"
        "def fail(*_): raise ValueError('no answer')\n"
        "module.AnswerPreview._answers = fail\n"
        "cli.main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, *command(toy, "two", PREVIEW, TASK)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "the preview after step 1 failed" in done.stderr
    assert (toy / "two/stage2/model").is_dir()


@pytest.mark.slow
def test_two_sharded_processes_show_the_same_answers(toy: Path) -> None:
    train(toy, "one", PREVIEW, TASK)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llavactl"]
    settings = ("sharding=full", PREVIEW, TASK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words, *command(toy, "two", *settings)], check=True, env=environment)
    answers = [[row["answer"] for row in rows] for name in ("one", "two") for rows in [previews(toy / name)[0]]]
    assert answers[0] == answers[1]


def question(number: int, text: str, reference: str, category: str, image: str = "") -> Question:
    content = (ImageFile("", image or f"{number}.png"), text)
    return Question(str(number), (Turn("user", content),), reference, category)


def test_questions_with_different_answers_about_two_images_are_preferred() -> None:
    questions = [
        question(0, "What color?", "red", "color"),
        question(1, "How many?", "1", "count"),
        question(2, "How many?", "1", "count"),
        question(3, "How many?", "2", "count"),
        question(4, "How many?", "3", "count", image="1.png"),
    ]
    count, color = contrasted(questions, 2)
    assert (count.question.id, count.other.name, count.other_reference) == ("1", "3.png", "2")
    assert (color.question.id, color.other.name, color.other_reference) == ("0", "1.png", "")
    own, other = count.conversations()
    assert own == questions[1].turns
    assert [turn.text for turn in other] == ["How many?"]
    assert [image.name for turn in other for image in turn.images] == ["3.png"]


def test_the_reference_of_the_same_question_about_another_image_is_known() -> None:
    shown = contrasted([question(number, "Describe it.", f"caption {number}", "") for number in range(3)], 3)
    assert [(each.question.reference, each.other_reference) for each in shown] == [
        ("caption 0", "caption 1"),
        ("caption 1", "caption 2"),
        ("caption 2", "caption 0"),
    ]


def test_questions_without_two_images_are_not_shown() -> None:
    text_only = Question("0", (Turn("user", ("Why?",)),), "because")
    assert contrasted([text_only, question(1, "How many?", "1", "")], 3) == []
    same = [question(number, "How many?", str(number), "", image="a.png") for number in range(3)]
    assert contrasted(same, 3) == []
