"""From a name or a file to a resolved recipe, and every problem at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llavactl.core import plugins
from llavactl.core.errors import PluginError, Problem, RecipeError
from llavactl.core.registry import Registration, registry
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import check, dump, load_recipe

SMALL = """\
name: small
vision: {name: clip, model: a/b}
connector: {name: linear}
language: {name: hf, model: c/d}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def small(extra: str = "", file: str = "recipe.yaml") -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SMALL + extra)
    return path


def problems(*overrides: str) -> list[str]:
    return [str(problem) for problem in check(None, overrides)]


class TestFinding:
    def test_recipe_yaml_is_the_default(self) -> None:
        small()
        assert load_recipe().name == "small"

    def test_without_one_the_recipes_are_listed(self) -> None:
        with pytest.raises(RecipeError, match=r"there is no \./recipe\.yaml here") as caught:
            load_recipe()
        assert "llava-v1.5-7b" in caught.value.hint

    def test_a_name_is_a_recipe_whatever_files_there_are(self) -> None:
        small(file="llava-v1-7b")
        assert load_recipe("llava-v1-7b").name == "llava-v1-7b"

    @pytest.mark.parametrize(
        "source", ["sub/mine.yaml", "./sub/mine.yaml", Path("sub/mine.yaml"), "sub/../sub/mine.yaml"]
    )
    def test_a_path_is_a_file(self, source: str | Path) -> None:
        small(file="sub/mine.yaml")
        assert load_recipe(source).name == "small"

    def test_a_suffix_makes_a_path(self) -> None:
        small(file="mine.yml")
        assert load_recipe("mine.yml").name == "small"

    def test_a_misspelt_name_gets_a_suggestion(self) -> None:
        with pytest.raises(RecipeError, match=r"no recipe named 'llava-v1\.5-7B'") as caught:
            load_recipe("llava-v1.5-7B")
        assert "did you mean 'llava-v1.5-7b'?" in caught.value.hint

    def test_a_file_without_suffix_is_pointed_at(self) -> None:
        small(file="mine")
        with pytest.raises(RecipeError) as caught:
            load_recipe("mine")
        assert caught.value.hint == "for the file write ./mine"
        assert load_recipe("./mine").name == "small"

    def test_a_missing_file_is_one_line(self) -> None:
        assert [str(problem) for problem in check("none.yaml")] == ["none.yaml: no such file"]


class TestResolving:
    def test_defaults_are_filled_in(self) -> None:
        small()
        recipe = load_recipe()
        assert recipe.vision.spec() == {
            "name": "clip",
            "model": "a/b",
            "layer": -2,
            "select": "patch",
            "image": "pad",
        }
        assert recipe.language.template == "vicuna-v1"
        assert "template" not in recipe.language.spec()
        assert recipe.stage1.batch_size == 256
        assert recipe.seed == 0

    def test_paths_of_a_file_are_relative_to_it(self, here: Path) -> None:
        small("data: {stage1: [{name: llava-json, path: x.json, images: ../i}]}\n", "sub/recipe.yaml")
        recipe = load_recipe("sub/recipe.yaml")
        (source,) = recipe.data.stage1
        assert source.spec()["path"] == str(here / "sub/x.json")
        assert source.spec()["images"] == str(here / "sub/../i")
        assert recipe.run_dir == here / "sub/runs/small"

    def test_paths_of_an_override_are_relative_to_the_working_directory(self, here: Path) -> None:
        small("data: {stage1: [{name: llava-json, path: x.json}]}\n", "sub/recipe.yaml")
        recipe = load_recipe("sub/recipe.yaml", ["data.stage1.0.path=y.json", "run_dir=out"])
        assert recipe.data.stage1[0].spec()["path"] == str(here / "y.json")
        assert recipe.run_dir == here / "out"

    def test_paths_of_a_named_recipe_are_relative_to_the_working_directory(self, here: Path) -> None:
        recipe = load_recipe("llava-v1.5-7b")
        assert recipe.data.stage2[0].spec()["images"].startswith(str(here))
        assert recipe.run_dir == here / "runs/llava-v1.5-7b"

    def test_a_model_folder_is_found_beside_the_recipe(self, here: Path) -> None:
        small(file="sub/recipe.yaml")
        (here / "sub/a/b").mkdir(parents=True)
        recipe = load_recipe("sub/recipe.yaml")
        assert recipe.vision.spec()["model"] == str(here / "sub/a/b")
        assert recipe.language.spec()["model"] == "c/d", "an id where no such folder is"

    def test_what_is_dumped_loads_to_the_same(self, tmp_path: Path) -> None:
        small(
            "stage1: {learning_rate: 2e-5, max_steps: 7}\ndata: {stage1: [{name: llava-json, path: x, weight: 2}]}\n"
            "eval: {tasks: [{name: scenes, scenes: 3}]}\n"
        )
        recipe = load_recipe()
        file = tmp_path / "elsewhere" / "recipe.yaml"
        file.parent.mkdir()
        file.write_text(dump(recipe))
        assert load_recipe(file) == recipe
        assert dump(load_recipe(file)) == dump(recipe)

    def test_a_recipe_is_json(self) -> None:
        small()
        assert Recipe.model_validate(json.loads(json.dumps(load_recipe().model_dump(mode="json")))) == load_recipe()

    def test_a_batch_size_alone_is_enough(self) -> None:
        small("stage1: {batch_size: 12}\n")
        assert load_recipe().stage1.micro_batch_size == 12
        assert load_recipe(None, ["stage1.batch_size=50"]).stage1.micro_batch_size == 25
        assert load_recipe(None, ["stage1.batch_size=512"]).stage1.micro_batch_size == 32

    def test_text_that_yaml_1_1_takes_for_a_switch_stays_text(self) -> None:
        small()
        assert load_recipe(None, ["name=no"]).name == "no"


class TestProblems:
    def test_all_at_once_by_line(self) -> None:
        Path("recipe.yaml").write_text(
            """\
name: my run
vison: {name: clip}
vision: {name: clipp, model: x, image: padd}
connector:
  name: linear
  pixel_shuffle: abc
  pixel_shufle: 3
language: {name: hf, modle: y, template: vicuna}
features: null
data:
  stage1: [{name: llava-json, wieght: 3}]
  stage2: {name: x}
stage1: {learning_rte: 1e-3, batch_size: abc, epochs: -1}
stage1: {}
stage2: {method: fulll, batch_size: 30, micro_batch_size: 16, lora: {r: 0.5}}
eval: {tasks: [{name: scenez}, 3]}
seed: true
run_dir: 3
"""
        )
        assert problems("stage2.epochs=on", "seed2=1") == [
            "recipe.yaml:1: name: must be letters, digits, '.', '_', '-', not 'my run'",
            "recipe.yaml:2: vison: unknown key; did you mean 'vision'?",
            "recipe.yaml:3: vision.image: must be one of 'square', 'pad' or null, not 'padd'",
            "recipe.yaml:3: vision.name: there is no vision backbone named 'clipp'; "
            f"did you mean 'clip'? available: {', '.join(registry().names('vision'))}",
            "recipe.yaml:6: connector.pixel_shuffle: must be an integer ≥ 1, not 'abc'",
            "recipe.yaml:7: connector.pixel_shufle: unknown key; did you mean 'pixel_shuffle'?",
            "recipe.yaml:8: language.model: is missing: a string",
            "recipe.yaml:8: language.modle: unknown key; did you mean 'model'?",
            "recipe.yaml:8: language.template: there is no template named 'vicuna'; "
            f"did you mean 'vicuna-v1'? available: {', '.join(registry().names('templates'))}",
            "recipe.yaml:9: features: must be a mapping, not null",
            "recipe.yaml:11: data.stage1.0.path: is missing: a file or folder",
            "recipe.yaml:11: data.stage1.0.wieght: unknown key; did you mean 'weight'?",
            "recipe.yaml:12: data.stage2: must be a list, each a component, {name: …}, not {'name': 'x'}",
            "recipe.yaml:12: data.stage2.name: there is no source named 'x'; "
            f"available: {', '.join(registry().names('sources'))}",
            "recipe.yaml:13: stage1.batch_size: must be an integer ≥ 1, not 'abc'",
            "recipe.yaml:13: stage1.epochs: must be a number > 0, not -1",
            "recipe.yaml:13: stage1.learning_rte: unknown key; did you mean 'learning_rate'?",
            "recipe.yaml:14: stage1: said twice; first at recipe.yaml:13",
            "recipe.yaml:15: stage2.lora.r: must be an integer ≥ 1, not 0.5",
            "recipe.yaml:15: stage2.method: must be one of 'full', 'lora', 'qlora', not 'fulll'",
            "recipe.yaml:16: eval.tasks.0.name: there is no task named 'scenez'; "
            f"did you mean 'scenes'? available: {', '.join(registry().names('tasks'))}",
            "recipe.yaml:16: eval.tasks.1: must be a component, {name: …}, not 3",
            "recipe.yaml:17: seed: must be an integer, not true",
            "recipe.yaml:18: run_dir: must be a file or folder, not 3",
            "-o seed2=1: seed2: unknown key; did you mean 'seed'?",
            "-o stage2.epochs=on: stage2.epochs: must be a number > 0, not 'on'",
        ]

    def test_what_is_missing(self) -> None:
        Path("recipe.yaml").write_text("# nothing much\nseed: 1\nvision: {}\n")
        assert problems() == [
            "recipe.yaml:2: connector: is missing: a component, {name: …}",
            "recipe.yaml:2: language: is missing: a component, {name: …}",
            "recipe.yaml:2: name: is missing: letters, digits, '.', '_', '-'",
            "recipe.yaml:3: vision.name: is missing: a string",
        ]

    def test_they_are_the_errors_message_too(self) -> None:
        small("seed: x\nfoo: 1\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe()
        assert str(caught.value).splitlines() == problems()
        assert len(caught.value.problems) == 2

    def test_a_validators_own_words(self) -> None:
        small("stage2: {batch_size: 30, micro_batch_size: 16}\n")
        assert problems() == ["recipe.yaml:5: stage2: batch_size 30 is not a multiple of micro_batch_size 16"]
        small("stage1: {warmup: 0.3, cooldown: 0.8}\n")
        assert problems() == ["recipe.yaml:5: stage1: warmup 0.3 and cooldown 0.8 are more than all steps"]

    @pytest.mark.parametrize("value", ["on", "yes", "1", "'true'"])
    def test_a_switch_is_true_or_false(self, value: str) -> None:
        small()
        (problem,) = problems(f"stage1.gradient_checkpointing={value}")
        assert "must be true or false, not" in problem

    @pytest.mark.parametrize("value", [".nan", ".inf", "-1", "0"])
    def test_a_learning_rate_is_a_finite_positive_number(self, value: str) -> None:
        small()
        (problem,) = problems(f"stage1.learning_rate={value}")
        assert "must be a number > 0, not" in problem

    @pytest.mark.parametrize(
        ("override", "why"),
        [
            ("seed", "must be key.path=value"),
            ("=1", "must be key.path=value"),
            ("a..b=1", "must be key.path=value"),
            ("seed=[1", "not YAML: "),
            ("seed={x: 1}", "seed: must be an integer, not {'x': 1}"),
            ("name.x=1", "name is 'small'; there is nothing below it"),
            ("data.stage1.2.path=x", "data.stage1 is a list of 0"),
            ("data.stage1.0.path=x", "data.stage1.0.name: is missing"),
        ],
    )
    def test_overrides(self, override: str, why: str) -> None:
        small()
        (problem,) = problems(override)
        assert problem.startswith(f"-o {override}: ")
        assert why in problem

    @pytest.mark.parametrize(
        "override",
        [
            "generate={teacher: {name: openai, api_key: sk-hidden}}", 'generate.teacher={"token": "sk-hidden"}',
            "generate.teacher.password=sk-hidden", "generate={teacher: {base_url: 'http://me:sk-hidden@host/v1'}}",
        ],
    )  # fmt: skip
    def test_a_message_repeats_no_secret_of_an_override(self, override: str) -> None:
        small()
        found = problems(override)
        assert found
        assert not any("sk-hidden" in problem for problem in found), found

    def test_a_whole_component_by_override(self) -> None:
        small()
        assert load_recipe(None, ["connector={name: mlp2x-gelu, pixel_shuffle: 2}"]).connector.spec() == {
            "name": "mlp2x-gelu",
            "pixel_shuffle": 2,
            "norm": False,
        }

    def test_nothing_is_a_value(self) -> None:
        small("stage1: {max_steps: 3}\n")
        assert load_recipe(None, ["stage1.max_steps="]).stage1.max_steps is None

    def test_files_need_not_exist(self) -> None:
        small("data: {stage1: [{name: llava-json, path: none.json}]}\n")
        assert problems() == []


class TestPlugins:
    @pytest.fixture
    def add(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def add(options: str) -> None:
            entry = Registration("connectors", "broken", "no.such:thing", options, "", "stranger")
            monkeypatch.setitem(registry().entries["connectors"], "broken", entry)

        return add

    def test_the_component_itself_is_not_imported(self, add: Any) -> None:
        add("llavactl.core.registry:Options")
        small()
        assert load_recipe(None, ["connector.name=broken"]).connector.name == "broken"

    def test_an_options_model_that_cannot_be_imported_is_a_problem(self, add: Any) -> None:
        add("no.such:Options")
        small()
        (problem,) = problems("connector.name=broken", "seed=1")
        assert problem.startswith("-o connector.name=broken: connector.name: connector 'broken' of plugin stranger")

    def check_with(self, monkeypatch: pytest.MonkeyPatch, implementation: Any) -> list[str]:
        monkeypatch.setattr(plugins, "implementations", lambda hook: [("stranger", implementation)])
        small()
        return problems()

    def test_check_recipe_adds_problems_where_the_key_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry()

        def implementation(recipe: dict[str, Any]) -> list[Problem]:
            assert recipe["stage1"]["epochs"] == 1
            return [Problem("", "vision.model", "too small"), Problem("elsewhere:3", "x", "no")]

        assert self.check_with(monkeypatch, implementation) == [
            "elsewhere:3: x: no",
            "recipe.yaml:2: vision.model: too small",
        ]

    def test_check_recipe_may_be_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry()
        assert self.check_with(monkeypatch, lambda recipe: None) == []

    def test_check_recipe_that_raises_is_isolated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry()

        def implementation(recipe: dict[str, Any]) -> None:
            raise KeyError("oops")

        assert self.check_with(monkeypatch, implementation) == []
        monkeypatch.setenv("LLAVACTL_STRICT_PLUGINS", "1")
        with pytest.raises(PluginError, match="oops"):
            load_recipe()


def test_loading_does_not_depend_on_the_environment_beyond_the_working_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small()
    before = load_recipe(here / "recipe.yaml")
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    assert load_recipe(here / "recipe.yaml") == before
    assert os.environ.get("LLAVACTL_HOME")
