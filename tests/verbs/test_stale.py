"""A finished step is done again when anything that decides its result has changed, and only then.

A finished run is copied, one of its inputs is changed, and the run is asked for once more.
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
    """A finished run with an evaluation: the toys, and the user folder that it filled."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = toy_recipe(folder / "toy")
    questions = [
        {"question_id": at, "image": f"photo-{at:03d}.jpg", "text": "Is it red?", "label": "yes", "category": "random"}
        for at in range(4)
    ]
    (recipe.parent / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
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
    """A copy of the finished run, elsewhere: what files are called must not matter."""
    shutil.copytree(finished / "home", home)
    return Path(shutil.copytree(finished / "toy", tmp_path / "copy"))


def redone(folder: Path, *options: str) -> set[str]:
    """The steps that a further run did."""
    done = run_cli("run", "-r", str(folder / "recipe.yaml"), *QUICK, *options, "--json")
    assert done.exit_code == 0, done.stderr
    report = done.json()
    steps = {step for step in (STAGE1, STAGE2) if not report[step]["finished_before"]}
    steps |= {EVAL} if not report["eval"][0]["finished_before"] else set()
    return steps | ({EXTRACT} if report["extract"]["encoded"] else set())


def _invert(file: Path) -> None:
    """Another picture under the name, of the same age."""
    status = file.stat()
    ImageOps.invert(Image.open(file).convert("RGB")).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def images(folder: Path) -> None:
    for file in (folder / "images").glob("*.jpg"):
        _invert(file)


def _shifted(file: Path, by: float = 0.05) -> None:
    weights = load_file(file)
    save_file({name: each + by if each.is_floating_point() else each for name, each in weights.items()}, file,
              metadata={"format": "pt"})  # fmt: skip


def language_weights(folder: Path) -> None:
    _shifted(folder / "language" / "model.safetensors")


def vision_weights(folder: Path) -> None:
    _shifted(folder / "clip" / "model.safetensors")


def image_processor(folder: Path) -> None:
    file = folder / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.2, 0.3]}))


def tokenizer(folder: Path) -> None:
    file = folder / "language" / "tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    one, other = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(written))


def chat_template(folder: Path) -> None:
    (folder / "language" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def answers(folder: Path) -> None:
    file = folder / "records.json"
    file.write_text(file.read_text().replace("The picture is red.", "It is red."))


def plugin_version(_folder: Path) -> None:
    builtin_plugin.RESULTS_VERSION = "2"


def vision_configuration(folder: Path) -> None:
    file = folder / "clip" / "config.json"
    written = json.loads(file.read_text())
    (written.get("vision_config") or written)["hidden_act"] = "gelu"
    file.write_text(json.dumps(written))


def question_text(folder: Path) -> None:
    file = folder / "questions.jsonl"
    file.write_text(file.read_text().replace("Is it red?", "Is it blue?"))


def right_answer(folder: Path) -> None:
    file = folder / "questions.jsonl"
    file.write_text(file.read_text().replace('"label": "yes"', '"label": "no"', 1))


def first_connector(folder: Path) -> None:
    _shifted(folder / "runs" / "toy" / "stage1" / "model" / "connector.safetensors", 1.0)


def last_connector(folder: Path) -> None:
    _shifted(folder / "runs" / "toy" / "stage2" / "model" / "connector.safetensors", 1.0)


# A copy's folder of images has another name, by which scores are kept: EVAL is in each of these sets.
ALL = {EXTRACT, STAGE1, STAGE2, EVAL}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (images, ALL),
        (vision_weights, ALL),
        (image_processor, ALL),
        (vision_configuration, ALL),
        (language_weights, {STAGE1, STAGE2, EVAL}),
        (tokenizer, {STAGE1, STAGE2, EVAL}),
        (chat_template, {STAGE1, STAGE2, EVAL}),
        (answers, {STAGE1, STAGE2, EVAL}),
        (plugin_version, ALL),
        (first_connector, {STAGE1, EVAL}),
        (last_connector, {STAGE2, EVAL}),
        (question_text, {EVAL}),
        (right_answer, {EVAL}),
    ],
)
def test_what_depends_on_a_changed_input_is_done_again(
    copy: Path, change: Callable[[Path], None], wanted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin_plugin, "RESULTS_VERSION", builtin_plugin.RESULTS_VERSION)  # restores it after the test
    change(copy)
    assert redone(copy) == wanted
    assert redone(copy) == set()


def test_nothing_is_done_again_where_nothing_has_changed_but_names_and_times(copy: Path, tmp_path: Path) -> None:
    for file in copy.rglob("*"):
        os.utime(file)
    (copy / "language").rename(copy / "speaker")
    (copy / "images").rename(copy / "photos")
    recipe = (copy / "recipe.yaml").read_text().replace("model: language,", "model: speaker,")
    (copy / "recipe.yaml").write_text(recipe.replace("images: images", "images: photos"))
    # A folder of images is known by its name where a task's scores are kept; its answers are not asked for again.
    assert redone(copy) <= {EVAL}
    answers = list((copy / "runs" / "toy" / "eval" / "answers").iterdir())
    assert len([file for file in answers if file.suffix == ".jsonl"]) == 1


def test_images_elsewhere_with_the_same_names_are_other_images(copy: Path) -> None:
    other = Path(shutil.copytree(copy / "images", copy / "inverted"))
    for file in other.glob("*.jpg"):
        _invert(file)
    moved = "data.{0}=[{{name: llava-json, path: {1}/records.json, images: {1}/inverted}}]"
    options = [part for stage in (STAGE1, STAGE2) for part in ("-o", moved.format(stage, copy))]
    assert redone(copy, *options) == ALL


def test_a_model_named_by_a_path_is_known_by_its_content(copy: Path) -> None:
    """Of two models in one place, one after the other, each gives its own answers."""

    def answered() -> dict[str, Any]:
        asked = ("-t", f"questions={copy}/questions.jsonl", "-t", f"labels={copy}/questions.jsonl")
        where = ("-t", f"images={copy}/images", "--model", str(copy / "runs" / "toy" / "stage2" / "model"))
        done = run_cli("eval", "pope", *asked, *where, "-o", "eval.max_new_tokens=4", "--json", cwd=copy)
        assert done.exit_code == 0, done.stderr
        found: dict[str, Any] = done.json()
        return found

    assert answered()["finished_before"] is False
    assert answered()["finished_before"] is True
    _shifted(copy / "runs" / "toy" / "stage2" / "model" / "language" / "model.safetensors", 0.3)
    assert answered()["finished_before"] is False


def test_attention_is_the_one_that_was_trained_with(copy: Path) -> None:
    eager = ("-o", "language.attention=eager")
    assert STAGE2 in redone(copy, *eager)
    loaded = load(copy / "runs" / "toy" / "stage2" / "model")
    assert loaded.bundle.model.language.config._attn_implementation == "eager"


def test_a_project_can_be_moved(copy: Path) -> None:
    """With its models, and to another depth: nothing is done again, and all of it is used from the new place."""
    there = copy.parent / "far" / "away" / "project"
    there.parent.mkdir(parents=True)
    copy.rename(there)
    assert redone(there) <= {EVAL}  # as above: a folder of images has another name
    assert len(list((there / "runs" / "toy" / "eval" / "answers").glob("*.jsonl"))) == 1
    model = there / "runs" / "toy" / "stage2" / "model"
    loaded = load(model)
    assert loaded.description["vision"]["model"] == str(there / "clip")
    for asked in (("--format", "llava"), ("--format", "hf")):
        done = run_cli("export", "--model", str(model), *asked, "--to", str(there / asked[1]), "--no-verify", cwd=there)
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_model_is_no_finished_one(copy: Path, damage: str) -> None:
    file = copy / "runs" / "toy" / "stage2" / "model" / "language" / "model.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:-10] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert redone(copy) == {STAGE2, EVAL}  # from its last checkpoint
    assert file.read_bytes() == whole
