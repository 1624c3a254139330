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

    def test_without_recipe_yaml_the_hint_lists_recipes(self) -> None:
        with pytest.raises(RecipeError, match=r"recipe\.yaml") as caught:
            load_recipe()
        assert "llava-v1.5-7b" in caught.value.hint

    def test_a_name_is_a_registered_recipe_even_if_a_file_has_that_name(self) -> None:
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

    def test_a_misspelled_name_gets_a_suggestion(self) -> None:
        with pytest.raises(RecipeError, match=r"llava-v1\.5-7B") as caught:
            load_recipe("llava-v1.5-7B")
        assert "did you mean 'llava-v1.5-7b'?" in caught.value.hint

    def test_the_hint_for_a_file_without_suffix_is_a_path(self) -> None:
        small(file="mine")
        with pytest.raises(RecipeError) as caught:
            load_recipe("mine")
        assert "./mine" in caught.value.hint
        assert load_recipe("./mine").name == "small"

    def test_a_missing_file_is_one_problem(self) -> None:
        (problem,) = check("none.yaml")
        assert problem.where == "none.yaml"
        assert "\n" not in str(problem)


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

    def test_a_model_folder_is_relative_to_the_recipe_file(self, here: Path) -> None:
        small(file="sub/recipe.yaml")
        (here / "sub/a/b").mkdir(parents=True)
        recipe = load_recipe("sub/recipe.yaml")
        assert recipe.vision.spec()["model"] == str(here / "sub/a/b")
        assert recipe.language.spec()["model"] == "c/d", "an id where no such folder is"

    def test_a_dumped_recipe_loads_as_an_equal_one(self, tmp_path: Path) -> None:
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

    def test_a_recipe_round_trips_through_json(self) -> None:
        small()
        assert Recipe.model_validate(json.loads(json.dumps(load_recipe().model_dump(mode="json")))) == load_recipe()

    def test_the_default_micro_batch_size_divides_batch_size(self) -> None:
        small("stage1: {batch_size: 12}\n")
        assert load_recipe().stage1.micro_batch_size == 12
        assert load_recipe(None, ["stage1.batch_size=50"]).stage1.micro_batch_size == 25
        assert load_recipe(None, ["stage1.batch_size=512"]).stage1.micro_batch_size == 32

    def test_yaml_1_1_booleans_are_strings(self) -> None:
        small()
        assert load_recipe(None, ["name=no"]).name == "no"


class TestProblems:
    def test_all_problems_are_reported_in_line_order(self) -> None:
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
        expected = [
            ("recipe.yaml:1", "name", "my run"),
            ("recipe.yaml:2", "vison", "did you mean 'vision'?"),
            ("recipe.yaml:3", "vision.image", "padd"),
            ("recipe.yaml:3", "vision.name", "did you mean 'clip'?"),
            ("recipe.yaml:6", "connector.pixel_shuffle", "integer"),
            ("recipe.yaml:7", "connector.pixel_shufle", "did you mean 'pixel_shuffle'?"),
            ("recipe.yaml:8", "language.model", "missing"),
            ("recipe.yaml:8", "language.modle", "did you mean 'model'?"),
            ("recipe.yaml:8", "language.template", "did you mean 'vicuna-v1'?"),
            ("recipe.yaml:9", "features", "null"),
            ("recipe.yaml:11", "data.stage1.0.path", "missing"),
            ("recipe.yaml:11", "data.stage1.0.wieght", "did you mean 'weight'?"),
            ("recipe.yaml:12", "data.stage2", "list"),
            ("recipe.yaml:12", "data.stage2.name", "llava-json"),
            ("recipe.yaml:13", "stage1.batch_size", "'abc'"),
            ("recipe.yaml:13", "stage1.epochs", "-1"),
            ("recipe.yaml:13", "stage1.learning_rte", "did you mean 'learning_rate'?"),
            ("recipe.yaml:14", "stage1", "recipe.yaml:13"),
            ("recipe.yaml:15", "stage2.lora.r", "0.5"),
            ("recipe.yaml:15", "stage2.method", "fulll"),
            ("recipe.yaml:16", "eval.tasks.0.name", "did you mean 'scenes'?"),
            ("recipe.yaml:16", "eval.tasks.1", "component"),
            ("recipe.yaml:17", "seed", "integer"),
            ("recipe.yaml:18", "run_dir", "3"),
            ("-o seed2=1", "seed2", "did you mean 'seed'?"),
            ("-o stage2.epochs=on", "stage2.epochs", "'on'"),
        ]
        found = check(None, ["stage2.epochs=on", "seed2=1"])
        assert [(problem.where, problem.key) for problem in found] == [(where, key) for where, key, _ in expected]
        for problem, (_, _, term) in zip(found, expected, strict=True):
            assert term in problem.why

    def test_missing_keys(self) -> None:
        Path("recipe.yaml").write_text("# only a seed\nseed: 1\nvision: {}\n")
        found = check()
        assert [(problem.where, problem.key) for problem in found] == [
            ("recipe.yaml:2", "connector"),
            ("recipe.yaml:2", "language"),
            ("recipe.yaml:2", "name"),
            ("recipe.yaml:3", "vision.name"),
        ]
        assert all("missing" in problem.why for problem in found)

    def test_the_error_message_lists_all_problems(self) -> None:
        small("seed: x\nfoo: 1\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe()
        assert str(caught.value).splitlines() == problems()
        assert len(caught.value.problems) == 2

    @pytest.mark.parametrize(
        ("stage", "terms"),
        [
            ("stage2: {batch_size: 30, micro_batch_size: 16}", ("batch_size 30", "micro_batch_size 16")),
            ("stage1: {warmup: 0.3, cooldown: 0.8}", ("warmup 0.3", "cooldown 0.8")),
            ("stage2: {method: lora, trainable_modules: [norm]}", ("trainable_modules", "lora")),
        ],
    )
    def test_settings_that_contradict_each_other(self, stage: str, terms: tuple[str, ...]) -> None:
        small(f"{stage}\n")
        (problem,) = check()
        assert (problem.where, problem.key) == ("recipe.yaml:5", stage.partition(":")[0])
        assert all(term in problem.why for term in terms)

    @pytest.mark.parametrize("stage", ["stage1", "stage2"])
    def test_training_in_float16_is_refused_with_the_alternatives(self, stage: str) -> None:
        small("features: {compute: float16}\n")
        (problem,) = check(None, [f"{stage}.precision=float16"])
        assert problem.key == f"{stage}.precision"
        assert "bfloat16" in problem.why
        assert "float32" in problem.why

    @pytest.mark.parametrize("value", ["on", "yes", "1", "'true'"])
    def test_booleans_are_true_or_false(self, value: str) -> None:
        small()
        (problem,) = check(None, [f"stage1.gradient_checkpointing={value}"])
        assert problem.key == "stage1.gradient_checkpointing"
        assert "true or false" in problem.why

    @pytest.mark.parametrize("value", [".nan", ".inf", "-1", "0"])
    def test_a_learning_rate_is_a_finite_positive_number(self, value: str) -> None:
        small()
        (problem,) = check(None, [f"stage1.learning_rate={value}"])
        assert problem.key == "stage1.learning_rate"
        assert "number > 0" in problem.why

    @pytest.mark.parametrize(
        ("override", "key", "term"),
        [
            ("seed", "", "key.path=value"),
            ("=1", "", "key.path=value"),
            ("a..b=1", "", "key.path=value"),
            ("seed=[1", "", "YAML"),
            ("seed={x: 1}", "seed", "integer"),
            ("name.x=1", "name.x", "'small'"),
            ("data.stage1.2.path=x", "data.stage1.2.path", "data.stage1"),
            ("data.stage1.0.path=x", "data.stage1.0.name", "missing"),
        ],
    )
    def test_overrides(self, override: str, key: str, term: str) -> None:
        small()
        (problem,) = check(None, [override])
        assert (problem.where, problem.key) == (f"-o {override}", key)
        assert term in problem.why

    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("stage2.restore_best=vqa.accuracy", "stage2"),
            ("stage2.micro_batch_size=3", "stage2"),
            ("stage1.warmup=0.9", "stage1"),
            ("stage1.box_alignment_steps=4", "stage1.box_alignment_steps"),
        ],
    )
    def test_a_section_that_an_override_made_invalid_names_the_override(self, override: str, key: str) -> None:
        """The section is in the file, and a validator of the section reports the problem."""
        small("stage1: {cooldown: 0.4}\nstage2: {batch_size: 4, micro_batch_size: 2}\n")
        (problem,) = check(None, [override])
        assert (problem.where, problem.key) == (f"-o {override}", key)

    def test_a_section_that_is_invalid_in_the_file_names_its_line(self) -> None:
        small("stage1: {cooldown: 0.4, warmup: 0.9}\n")
        (problem,) = check(None, ["stage1.epochs=2", "stage2.warmup=0.5"])
        assert (problem.where, problem.key) == ("recipe.yaml:5", "stage1")

    @pytest.mark.parametrize(
        "override",
        [
            "generate={teacher: {name: openai, api_key: sk-hidden}}", 'generate.teacher={"token": "sk-hidden"}',
            "generate.teacher.password=sk-hidden", "generate={teacher: {base_url: 'http://me:sk-hidden@host/v1'}}",
        ],
    )  # fmt: skip
    def test_problems_of_overrides_hide_secrets(self, override: str) -> None:
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

    def test_an_empty_override_is_null(self) -> None:
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
        monkeypatch.setattr(
            plugins, "implementations", lambda hook: [("stranger", implementation)] if hook == "check_recipe" else []
        )
        small()
        return problems()

    def test_check_recipe_problems_get_the_line_of_their_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry()

        def implementation(recipe: dict[str, Any]) -> list[Problem]:
            assert recipe["stage1"]["epochs"] == 1
            return [Problem("", "vision.model", "too small"), Problem("elsewhere:3", "x", "no")]

        assert self.check_with(monkeypatch, implementation) == [
            "elsewhere:3: x: no",
            "recipe.yaml:2: vision.model: too small",
        ]

    def test_check_recipe_may_return_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_loading_a_file_does_not_depend_on_the_working_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small()
    before = load_recipe(here / "recipe.yaml")
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    assert load_recipe(here / "recipe.yaml") == before
    assert os.environ.get("LLAVACTL_HOME")


class TestNames:
    """A component may be given by its name: ``x`` is ``{name: x}``."""

    def test_a_name_is_a_component_without_options(self) -> None:
        small("eval: {tasks: [scenes]}\n")
        named = load_recipe(None, ["connector=linear", "stage1.evaluate_every={steps: 5, tasks: [scenes]}"])
        mapped = load_recipe(
            None,
            [
                "connector={name: linear}",
                "eval.tasks=[{name: scenes}]",
                "stage1.evaluate_every={steps: 5, tasks: [{name: scenes}]}",
            ],
        )
        assert named == mapped
        assert dump(named) == dump(mapped)

    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("vision=nope", "vision.name"),
            ("language=nope", "language.name"),
            ("data.stage1=[nope]", "data.stage1.0.name"),
            ("export=[nope]", "export.0.format"),
            ("connector=3", "connector"),
            ("vision=clip", "vision.model"),
        ],
    )
    def test_problems_have_the_key_of_the_component(self, override: str, key: str) -> None:
        small()
        found = check(None, [override])
        assert key in [each.key for each in found]
        assert {each.where for each in found} == {f"-o {override}"}
