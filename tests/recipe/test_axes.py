"""Variants of a recipe: products, labels, folders, and all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.errors import RecipeError
from llavactl.recipe.axes import MAX_FOLDER_NAME, load_sweep
from llavactl.recipe.load import dump, load_recipe
from llavactl.testing import run_cli


def slugs(toy: Path, *axes: str, seeds: int | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    recipes = load_sweep(toy / "recipe.yaml", overrides, axes, seeds)
    return [variant.slug for variant in recipes.variants]


def problems(toy: Path, *axes: str, seeds: int | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load_sweep(toy / "recipe.yaml", overrides, axes, seeds)
    return [f"{problem.where} {problem.key}" for problem in raised.value.problems] or [raised.value.message]


def test_variants_are_all_combinations_with_all_seeds(toy: Path) -> None:
    recipes = load_sweep(toy / "recipe.yaml", ["seed=3"], ["vision.layer=-1,-2", "connector.name=linear,mlp2x-gelu"], 2)
    assert (recipes.axes, recipes.seeds) == (
        {"vision.layer": ("-1", "-2"), "connector.name": ("linear", "mlp2x-gelu")},
        (3, 4),
    )
    assert [(variant.recipe.vision.spec()["layer"], variant.recipe.connector.name, variant.recipe.seed)
            for variant in recipes.variants] == [
        (layer, connector, seed) for layer in (-1, -2) for connector in ("linear", "mlp2x-gelu") for seed in (3, 4)
    ]  # fmt: skip
    assert recipes.folder == toy / "runs" / "toy" / "sweep"
    assert recipes.variants[1].recipe.run_dir == recipes.folder / "layer=-1,connector=linear,seed=4"
    assert recipes.variants[1].name == "layer=-1,connector=linear"


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("connector=linear,mlp2x-gelu", ["connector=linear", "connector=mlp2x-gelu"]),
        ("connector=[{norm: true, name: linear}, linear]", ["connector=linear-norm", "connector=linear"]),
        ("vision.layer=[0, 1]", ["layer=0", "layer=1"]),
        ("vision.model=clip,./clip", ["model=clip", "model=clip+"]),
        ("stage2.trainable_modules=[], [q, norm]", ["trainable_modules=none", "trainable_modules=q+norm"]),
        ("stage1.image=pad,null", ["image=pad", "image=null"]),
        ("stage2.learning_rate=1e-3,2e-5", ["learning_rate=0.001", "learning_rate=2e-05"]),
    ],
)  # fmt: skip
def test_values_are_yaml_and_name_the_folders(toy: Path, axis: str, expected: list[str]) -> None:
    assert slugs(toy, axis) == [f"{name},seed=0" for name in expected]


def test_keys_with_the_same_last_part_keep_their_full_names(toy: Path) -> None:
    axes = ("stage1.learning_rate=1e-3", "stage2.learning_rate=1e-4")
    assert slugs(toy, *axes) == ["stage1.learning_rate=0.001,stage2.learning_rate=0.0001,seed=0"]


def test_long_names_are_shortened_and_stay_distinct(toy: Path) -> None:
    names = [f"{'x' * 300}{end}" for end in "ab"]
    folders = slugs(toy, "connector=linear", overrides=(
        f"sweep={{axes: {{vision.layer: {{{names[0]}: -1, {names[1]}: -2}}}}}}",
    ))  # fmt: skip
    assert len(set(folders)) == 2
    assert all(len(folder) <= MAX_FOLDER_NAME for folder in folders)


def test_a_component_by_name_has_default_options_and_an_option_is_set_in_all(toy: Path) -> None:
    base = ("connector={name: linear, norm: true}",)

    def norms(axis: str, *more: str) -> list[bool]:
        recipes = load_sweep(toy / "recipe.yaml", base, [*more, axis])
        return [variant.recipe.connector.spec()["norm"] for variant in recipes.variants]

    assert norms("connector=linear,mlp2x-gelu") == [False, False]
    assert norms("connector.name=linear,mlp2x-gelu") == [True, True]
    # The option is set after the component, in any order of the axes.
    assert norms("connector=linear", "connector.norm=true,false") == [True, False]


def test_the_section_has_paths_relative_to_its_file_and_options_replace_its_axes(toy: Path, tmp_path: Path) -> None:
    text = (toy / "recipe.yaml").read_text()
    section = """
sweep:
  seeds: 2
  axes:
    vision:
      small: {name: clip, model: clip, layer: -1}
      large: {name: clip, model: clip, layer: -2}
    connector.name: [linear]
"""
    (toy / "recipe.yaml").write_text(text + section)
    recipes = load_sweep(toy / "recipe.yaml", [], ["connector.name=mlp2x-gelu"], 1)
    assert recipes.axes == {"vision": ("small", "large"), "connector.name": ("mlp2x-gelu",)}
    assert {variant.recipe.vision.spec()["model"] for variant in recipes.variants} == {str(toy / "clip")}
    assert [variant.slug for variant in recipes.variants] == [
        "vision=small,connector=mlp2x-gelu,seed=0",
        "vision=large,connector=mlp2x-gelu,seed=0",
    ]
    assert len(load_sweep(toy / "recipe.yaml").variants) == 4
    # A run is one variant: its recipe has no axes, whose relative paths would have another meaning in its folder.
    assert "sweep" not in dump(load_recipe(toy / "recipe.yaml"))
    (tmp_path / "resolved.yaml").write_text(dump(recipes.variants[0].recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipes.variants[0].recipe


def test_shared_steps_are_left_out_of_the_variants(toy: Path) -> None:
    generate = "{source: {name: scenes, scenes: 1}, teacher: {name: rules}, kinds: {detail: 1}, out: data.jsonl}"
    recipes = load_sweep(
        toy / "recipe.yaml", [f"generate={generate}", "export=[{format: hf, to: out/}]"], ["vision.layer=-1,-2"]
    )
    assert recipes.base.generate is not None
    assert recipes.base.run_dir == toy / "runs" / "toy"
    assert all(variant.recipe.generate is None and variant.recipe.export == () for variant in recipes.variants)


def test_all_problems_of_all_variants_are_reported(toy: Path) -> None:
    found = problems(toy, "vision.layr=1,2", "connector=no-such,linear", "stage1.epochs=1,-1")
    assert sorted(found) == [
        "--axis connector=no-such,linear connector.name",
        "--axis stage1.epochs=1,-1 stage1.epochs",
        "--axis vision.layr=1,2 vision.layr",
    ]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("vision.layer", "--axis vision.layer "),
        ("=1", "--axis =1 "),
        ("vision..layer=1", "--axis vision..layer=1 sweep.axes.vision..layer"),
        ("vision.layer=", "--axis vision.layer= sweep.axes.vision.layer"),
        ("vision.layer=-1,-1", "--axis vision.layer=-1,-1 sweep.axes.vision.layer"),
        ("vision.layer={", "--axis vision.layer={ "),
        *(
            (f"{key}=a,b", f"--axis {key}=a,b sweep.axes.{key}")
            for key in ("seed", "name", "run_dir", "generate.out", "export", "sweep.seeds")
        ),
    ],
)
def test_an_invalid_axis_is_refused(toy: Path, axis: str, expected: str) -> None:
    assert problems(toy, axis) == [expected]


def test_an_invalid_section_is_refused_with_its_line(toy: Path) -> None:
    with (toy / "recipe.yaml").open("a") as file:
        file.write("sweep:\n  axes: {vision.layer: 3}\n  sedes: 2\n")
    lines = len((toy / "recipe.yaml").read_text().splitlines())
    found = [place.rpartition("/")[2] for place in problems(toy)]
    assert found == [f"recipe.yaml:{lines - 1} sweep.axes.vision.layer", f"recipe.yaml:{lines} sweep.sedes"]
    assert run_cli("recipes", "check", cwd=toy).exit_code == 1


def test_recipes_check_covers_the_variants(toy: Path) -> None:
    with (toy / "recipe.yaml").open("a") as file:
        file.write("sweep: {axes: {connector.name: [linear, no-such]}}\n")
    checked = run_cli("recipes", "check", "--json", cwd=toy)
    assert checked.exit_code == 1
    (problem,) = checked.json()["problems"]
    lines = len((toy / "recipe.yaml").read_text().splitlines())
    assert (problem["where"], problem["key"]) == (f"recipe.yaml:{lines}", "connector.name")


def test_a_sweep_without_axes_needs_seeds(toy: Path) -> None:
    assert len(problems(toy)) == 1
    assert slugs(toy, seeds=2) == ["seed=0", "seed=1"]
    assert load_sweep(toy / "recipe.yaml", seeds=2).variants[0].name == "toy"
