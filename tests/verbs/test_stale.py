"""A finished step runs again if and only if an input that affects its result has changed.

Each test copies a finished run, changes one input and runs it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from llavactl.core import builtin_plugin
from llavactl.model.folder import load
from llavactl.testing import run_cli, toy_recipe

QUICK = ("-o", "stage1.max_steps=1", "-o", "stage2.max_steps=1", "-o", "eval.blind_baseline=false")

EXTRACT, STAGE1, STAGE2, EVAL = "extract", "stage1", "stage2", "eval"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an evaluation: the folder of the toy recipe and LLAVACTL_HOME."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = toy_recipe(folder / "toy")
    questions = [
        {
            "question_id": index,
            "image": f"photo-{index:03d}.jpg",
            "text": "Is it red?",
            "label": "yes",
            "category": "random",
        }
        for index in range(4)
    ]
    (recipe.parent / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    recipe.write_text(
        recipe.read_text()
        + "eval: {max_new_tokens: 2, tasks: [{name: pope, questions: questions.jsonl, labels: questions.jsonl, "
        + "images: images}]}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(folder / "home"))
        assert run_cli("run", "-r", str(recipe), *QUICK, "--json").json()["stage1"]["finished_before"] is False
    return folder


@pytest.fixture
def copy(finished: Path, home: Path, tmp_path: Path) -> Path:
    """A copy of the finished run in another folder: file names must not matter."""
    shutil.copytree(finished / "home", home)
    return Path(shutil.copytree(finished / "toy", tmp_path / "copy"))


def rerun(folder: Path, *options: str) -> set[str]:
    """Runs the recipe again; returns the steps that were not skipped."""
    done = run_cli("run", "-r", str(folder / "recipe.yaml"), *QUICK, *options, "--json")
    assert done.exit_code == 0, done.stderr
    report = done.json()
    steps = {step for step in (STAGE1, STAGE2) if not report[step]["finished_before"]}
    steps |= {EVAL} if not report["eval"][0]["finished_before"] else set()
    return steps | ({EXTRACT} if report["extract"]["encoded"] else set())


def _invert(file: Path) -> None:
    """Replaces the image, keeping its name and time stamps."""
    status = file.stat()
    ImageOps.invert(Image.open(file).convert("RGB")).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def images(folder: Path) -> None:
    for file in (folder / "images").glob("*.jpg"):
        _invert(file)


def _shift_weights(file: Path, by: float = 0.05) -> None:
    weights = load_file(file)
    shifted = {name: weight + by if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(shifted, file, metadata={"format": "pt"})


def language_weights(folder: Path) -> None:
    _shift_weights(folder / "language" / "model.safetensors")


def vision_weights(folder: Path) -> None:
    _shift_weights(folder / "clip" / "model.safetensors")


def image_processor(folder: Path) -> None:
    file = folder / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.2, 0.3]}))


def tokenizer(folder: Path) -> None:
    file = folder / "language" / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(document))


def chat_template(folder: Path) -> None:
    (folder / "language" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def answers(folder: Path) -> None:
    file = folder / "records.json"
    file.write_text(file.read_text().replace("The picture is red.", "It is red."))


def plugin_version(_folder: Path) -> None:
    builtin_plugin.RESULTS_VERSION = "2"


def vision_configuration(folder: Path) -> None:
    file = folder / "clip" / "config.json"
    config = json.loads(file.read_text())
    (config.get("vision_config") or config)["hidden_act"] = "gelu"
    file.write_text(json.dumps(config))


def question_text(folder: Path) -> None:
    file = folder / "questions.jsonl"
    file.write_text(file.read_text().replace("Is it red?", "Is it blue?"))


def right_answer(folder: Path) -> None:
    file = folder / "questions.jsonl"
    file.write_text(file.read_text().replace('"label": "yes"', '"label": "no"', 1))


def first_connector(folder: Path) -> None:
    _shift_weights(folder / "runs" / "toy" / "stage1" / "model" / "connector.safetensors", 1.0)


def last_connector(folder: Path) -> None:
    _shift_weights(folder / "runs" / "toy" / "stage2" / "model" / "connector.safetensors", 1.0)


# Scores are stored by the name of the image folder, which differs in a copy: EVAL is in each of these sets.
ALL = {EXTRACT, STAGE1, STAGE2, EVAL}


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (images, ALL),
        pytest.param(vision_weights, ALL, marks=pytest.mark.slow),
        pytest.param(image_processor, ALL, marks=pytest.mark.slow),
        pytest.param(vision_configuration, ALL, marks=pytest.mark.slow),
        pytest.param(language_weights, {STAGE1, STAGE2, EVAL}, marks=pytest.mark.slow),
        pytest.param(tokenizer, {STAGE1, STAGE2, EVAL}, marks=pytest.mark.slow),
        (chat_template, {STAGE1, STAGE2, EVAL}),
        pytest.param(answers, {STAGE1, STAGE2, EVAL}, marks=pytest.mark.slow),
        pytest.param(plugin_version, ALL, marks=pytest.mark.slow),
        pytest.param(first_connector, {STAGE1, EVAL}, marks=pytest.mark.slow),
        pytest.param(last_connector, {STAGE2, EVAL}, marks=pytest.mark.slow),
        pytest.param(question_text, {EVAL}, marks=pytest.mark.slow),
        pytest.param(right_answer, {EVAL}, marks=pytest.mark.slow),
    ],
)
def test_steps_that_depend_on_a_changed_input_run_again(
    copy: Path, change: Callable[[Path], None], steps: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin_plugin, "RESULTS_VERSION", builtin_plugin.RESULTS_VERSION)  # restores it after the test
    change(copy)
    assert rerun(copy) == steps
    assert rerun(copy) == set()


def test_names_and_times_of_files_do_not_matter(copy: Path, tmp_path: Path) -> None:
    for file in copy.rglob("*"):
        os.utime(file)
    (copy / "language").rename(copy / "renamed")
    (copy / "images").rename(copy / "photos")
    recipe = (copy / "recipe.yaml").read_text().replace("model: language,", "model: renamed,")
    (copy / "recipe.yaml").write_text(recipe.replace("images: images", "images: photos"))
    # The scores of a task are stored by the name of the image folder; the answers are reused.
    assert rerun(copy) <= {EVAL}
    answers = list((copy / "runs" / "toy" / "eval" / "answers").iterdir())
    assert len([file for file in answers if file.suffix == ".jsonl"]) == 1


def test_other_images_with_the_same_names(copy: Path) -> None:
    other = Path(shutil.copytree(copy / "images", copy / "inverted"))
    for file in other.glob("*.jpg"):
        _invert(file)
    moved = "data.{0}=[{{name: llava-json, path: {1}/records.json, images: {1}/inverted}}]"
    options = [part for stage in (STAGE1, STAGE2) for part in ("-o", moved.format(stage, copy))]
    assert rerun(copy, *options) == ALL


def test_a_model_is_identified_by_its_content(copy: Path) -> None:
    """A model that replaces another one at the same path is evaluated again."""

    def evaluated() -> dict[str, Any]:
        task = ("-t", f"questions={copy}/questions.jsonl", "-t", f"labels={copy}/questions.jsonl")
        model = ("-t", f"images={copy}/images", "--model", str(copy / "runs" / "toy" / "stage2" / "model"))
        done = run_cli("eval", "pope", *task, *model, "-o", "eval.max_new_tokens=4", "--json", cwd=copy)
        assert done.exit_code == 0, done.stderr
        report: dict[str, Any] = done.json()
        return report

    assert evaluated()["finished_before"] is False
    assert evaluated()["finished_before"] is True
    _shift_weights(copy / "runs" / "toy" / "stage2" / "model" / "language" / "model.safetensors", 0.3)
    assert evaluated()["finished_before"] is False


def test_a_model_is_loaded_with_the_attention_of_its_training(copy: Path) -> None:
    eager = ("-o", "language.attention=eager")
    assert STAGE2 in rerun(copy, *eager)
    loaded = load(copy / "runs" / "toy" / "stage2" / "model")
    assert loaded.bundle.model.language.config._attn_implementation == "eager"


def test_a_project_can_be_moved(copy: Path) -> None:
    """A moved project, models included, runs no step again and uses the files in the new folder."""
    there = copy.parent / "far" / "away" / "project"
    there.parent.mkdir(parents=True)
    copy.rename(there)
    assert rerun(there) <= {EVAL}  # scores are stored by the name of the image folder
    assert len(list((there / "runs" / "toy" / "eval" / "answers").glob("*.jsonl"))) == 1
    model = there / "runs" / "toy" / "stage2" / "model"
    loaded = load(model)
    assert loaded.description["vision"]["model"] == str(there / "clip")
    for name in ("llava", "hf"):
        to = ("--format", name, "--to", str(there / name))
        done = run_cli("export", "--model", str(model), *to, "--no-verify", cwd=there)
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    "damage", [pytest.param("missing", marks=pytest.mark.slow), "cut", pytest.param("changed", marks=pytest.mark.slow)]
)
def test_a_stage_with_a_damaged_model_runs_again(copy: Path, damage: str) -> None:
    file = copy / "runs" / "toy" / "stage2" / "model" / "language" / "model.safetensors"
    original = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(original[:-10] if damage == "cut" else original[:-1] + bytes([original[-1] ^ 1]))
    assert rerun(copy) == {STAGE2, EVAL}  # from its last checkpoint
    assert file.read_bytes() == original
