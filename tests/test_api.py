"""The Python API matches the commands; the code blocks of docs/reference/python.md run."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llavactl
from llavactl.testing import run_cli

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy project in which the code of docs/reference/python.md was run as a script."""
    from llavactl.testing import toy_recipe

    folder = tmp_path_factory.mktemp("project")
    toy_recipe(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(folder / "home"))
        exec("\n".join(blocks), {})
    (folder / "page.out").write_text(out.getvalue(), encoding="utf-8")
    return folder


def test_output_of_the_documented_code(trained: Path) -> None:
    out = (trained / "page.out").read_text(encoding="utf-8")
    assert "12 images encoded, 0 skipped" in out
    assert re.search(r"stage2: \d+ of \d+ steps \{.*loss", out)
    assert "epochz" in out
    assert "VerificationResult(" in out


def test_answers_match_the_command(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    chat = llavactl.Chat(llavactl.load_model(trained / "runs/toy/stage2/model"))
    answer = chat.ask("What colour is it?", images=["images/photo-000.jpg"], max_new_tokens=12).text
    arguments = ("chat", "--model", "runs/toy/stage2/model", "--max-new-tokens", "12")
    image = ("--image", "images/photo-000.jpg")
    assert (
        run_cli(*arguments, *image, "--prompt", "What colour is it?", "--json", cwd=trained).json()["answer"] == answer
    )
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    data = (trained / "images/photo-000.jpg").read_bytes()
    assert (
        llavactl.Chat(llavactl.load_model(trained / "runs/toy/stage2/model"))
        .ask("What colour is it?", data, max_new_tokens=12)
        .text
        == answer
    )


def test_overrides_of_all_types(trained: Path) -> None:
    overrides = {
        "stage1.epochs": 3,
        "stage1.learning_rate": 1e-4,
        "data.stage1": [],
        "stage2.method": "lora",
        "seed": 7,
    }
    recipe = llavactl.load_recipe(trained / "recipe.yaml", overrides)
    assert (recipe.stage1.epochs, recipe.stage1.learning_rate, recipe.seed) == (3, 1e-4, 7)
    assert (recipe.data.stage1, recipe.stage2.method) == ((), "lora")
    assert llavactl.load_recipe(trained / "recipe.yaml", ["stage1.epochs=3"]).stage1.epochs == 3


def test_problems_match_the_command(trained: Path) -> None:
    overrides = ["vision.layer=9", "export=[{format: hf, to: out}]"]
    (problem,) = llavactl.check(trained / "recipe.yaml", overrides)
    arguments = [part for override in overrides for part in ("-o", override)]
    listed = run_cli("recipes", "check", str(trained / "recipe.yaml"), *arguments, "--json").json()["problems"]
    assert [problem.key, problem.why] == [listed[0]["key"], listed[0]["why"]]
    assert len(listed) == 1


class StopEarlyError(Exception):
    pass


def test_an_exception_in_progress_stops_training_which_resumes(toy: Path) -> None:
    recipe = llavactl.load_recipe(toy / "recipe.yaml", {"run_dir": str(toy / "run")})
    llavactl.extract(recipe)
    updates: list[llavactl.Progress] = []

    def stop(progress: llavactl.Progress) -> None:
        updates.append(progress)
        if progress.what == "stage1" and progress.done == 3:
            raise StopEarlyError

    with pytest.raises(StopEarlyError):
        llavactl.train(recipe, 1, progress=stop)
    assert [update.done for update in updates] == [1, 2, 3]
    resumed: list[llavactl.Progress] = []
    llavactl.train(recipe, 1, progress=resumed.append)
    assert resumed[0].start == 2, "the last checkpoint"
    assert (resumed[-1].done, resumed[-1].total) == (6, 6)
    lines = [json.loads(line) for line in (toy / "run/stage1/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_progress_is_called_only_during_its_own_call(toy: Path) -> None:
    recipe = llavactl.load_recipe(toy / "recipe.yaml", {"run_dir": str(toy / "run")})
    updates: list[Any] = []
    llavactl.extract(recipe, dry_run=True, progress=updates.append)
    before = len(updates)
    llavactl.extract(recipe)
    assert len(updates) == before


def test_retry_samples_another_answer_unless_a_seed_is_given(trained: Path) -> None:
    chat = llavactl.Chat(llavactl.load_model(trained / "runs/toy/stage2/model"))
    sampled = {"temperature": 50.0, "max_new_tokens": 8}
    first = chat.ask("What?", None, seed=3, **sampled).text
    assert chat.retry(seed=3, **sampled).text == first
    second = chat.retry(**sampled).text
    assert second != first
    assert chat.retry(seed=4, **sampled).text == second


def test_a_failed_turn_is_removed(trained: Path) -> None:
    chat = llavactl.Chat(llavactl.load_model(trained / "runs/toy/stage2/model"))
    with pytest.raises(llavactl.DataError):
        chat.ask("What?", images=[trained / "recipe.yaml"])
    assert chat.turns == ()


@pytest.mark.parametrize("argument", ["source", "overrides", "recipe", "stage", "resume", "model"])
def test_invalid_arguments_are_recipe_errors(toy: Path, argument: str) -> None:
    file = toy / "recipe.yaml"
    calls: dict[str, Callable[[Any], object]] = {
        "source": lambda _: llavactl.load_recipe(42),
        "overrides": lambda _: llavactl.check(file, "seed=1"),
        "recipe": lambda _: llavactl.train(str(file), 1),
        "stage": lambda recipe: llavactl.train(recipe, 3),
        "resume": lambda recipe: llavactl.train(recipe, 1, resume="maybe"),
        "model": lambda recipe: llavactl.Chat(recipe),
    }
    with pytest.raises(llavactl.RecipeError, match=f"^{argument}: expected "):
        calls[argument](llavactl.load_recipe(file, {"run_dir": str(toy / "run")}))
    assert not (toy / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "invalid"),
    [
        ({"prompt": 3}, "prompt"),
        ({"images": [3]}, "images"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_invalid_arguments_of_a_question(trained: Path, arguments: dict[str, Any], invalid: str) -> None:
    chat = llavactl.Chat(llavactl.load_model(trained / "runs/toy/stage2/model"))
    with pytest.raises(llavactl.RecipeError, match=f"^{invalid}: expected "):
        chat.ask(**{"prompt": "What?", **arguments})
    assert chat.turns == ()


def test_a_missing_model_folder(tmp_path: Path) -> None:
    with pytest.raises(llavactl.ModelError, match="no such folder"):
        llavactl.load_model(tmp_path / "missing")
