"""``llavactl train --dry-run`` and the warnings of ``recipes check``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavactl.core.errors import ModelError, RecipeError
from llavactl.core.plugins import BUILTIN
from llavactl.core.registry import registry
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli, toy_language
from llavactl.verbs import doctor
from llavactl.verbs import plan as plan_module
from llavactl.verbs.plan import plan_training
from llavactl.verbs.train import train

SCRATCH = ("-o", "stage2.init=scratch")


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_needs_configurations_and_records_only(toy: Path, home: Path) -> None:
    for weights in [*toy.glob("clip/*.safetensors"), *toy.glob("language/*.safetensors")]:
        weights.unlink()
    shutil.rmtree(toy / "images")
    before = files(toy)
    run = run_cli("train", "-r", str(toy / "recipe.yaml"), "--stage", "2", "--dry-run", "--json", *SCRATCH)
    assert run.exit_code == 0, run.stderr
    plan = json.loads(run.stdout)
    assert plan["fits"] is True
    assert plan["steps"] == 6
    assert type(plan["tokens"]) is type(plan["checkpoint_bytes"]) is int
    assert set(plan["parameters"]) == {"trainable", "frozen"}
    for where in ("device", "host"):
        assert type(plan["peak_bytes"][where]) is int
        assert plan["peak_bytes"][where] == sum(plan["peak_parts"][where].values())
    assert plan["placement"]["sharded"] is False
    assert any("not extracted" in note for note in plan["notes"])
    assert files(toy) == before
    assert not [path for path in files(home) if Path(path).is_file()]


@pytest.mark.parametrize("missing", ["records.json", "language/tokenizer.json"])
def test_without_records_or_tokenizer_the_memory_is_an_upper_bound(toy: Path, missing: str) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["stage2.init=scratch", "stage2.max_length=120"])
    known = plan_training(recipe, 2)
    for path in toy.glob(f"{Path(missing).parent}/tokenizer*" if "tokenizer" in missing else missing):
        path.unlink()
    bound = plan_training(recipe, 2)
    assert (bound.steps, bound.tokens, bound.time) == (None, None, None)
    assert any(Path(missing).name in note or "tokenizer" in note for note in bound.notes)
    assert bound.parameters == known.parameters
    assert bound.peak_bytes["device"] > known.peak_bytes["device"]


def test_longer_samples_are_bounded_and_only_the_data_make_a_difference(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["stage2.init=scratch", "stage2.max_length=120"])
    known = plan_training(recipe, 2)
    (toy / "records.json").unlink()
    unknown = plan_training(recipe, 2)
    assert known.upper_bound == unknown.upper_bound
    assert unknown.upper_bound["peak_bytes"] == unknown.peak_bytes
    assert unknown.upper_bound["fits"] == unknown.fits
    assert known.peak_bytes["device"] < known.upper_bound["peak_bytes"]["device"]
    assert known.upper_bound["tokens"] == 120
    assert known.upper_bound["samples"] == recipe.stage2.micro_batch_size
    assert known.assumption != unknown.assumption


def test_a_stage_that_does_not_fit_exits_with_1_and_names_what_fits(toy: Path) -> None:
    args = ["train", "-r", str(toy / "recipe.yaml"), "--stage", "2", *SCRATCH, "--dry-run", "--json"]
    args += ["-o", "optimizer_state=device"]
    needed = json.loads(run_cli(*args, "--device-memory", "1GB").stdout)["peak_bytes"]["device"]
    run = run_cli(*args, "--device-memory", f"{needed}")
    assert run.exit_code == 1
    plan = json.loads(run.stdout)
    assert plan["fits"] is False
    assert len(run.stderr.strip().splitlines()) == 2
    assert plan["alternatives"]
    options = [word for option in plan["alternatives"][0]["options"] for word in option.split(" ", 1)]
    assert run_cli(*args, "--device-memory", f"{needed}", *options).exit_code == 0


AUTO = ("stage2.gradient_checkpointing=auto", "stage2.micro_batch_tokens=auto")
FIXED = ("sharding=none", "optimizer_state=device")
PARTIAL = ("stage2.trainable_modules=[layers]", "sharding=full", "optimizer_state=device")


@pytest.mark.parametrize(
    ("cuda", "overrides", "shares"),
    [
        (False, AUTO, (0.45,)),
        (True, PARTIAL, (0.3,)),
        *(
            pytest.param(cuda, overrides, (0.9, 0.45, 0.22), marks=pytest.mark.slow)
            for cuda in (True, False)
            for overrides in (AUTO, FIXED, PARTIAL)
        ),
    ],
)
def test_a_stage_fits_with_the_options_of_each_hint(
    toy: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, overrides: tuple[str, ...], shares: tuple[float, ...]
) -> None:
    """``shares`` of the memory that the stage needs are there."""
    toy_language(toy / "wide", width=192)
    precision = "bfloat16" if cuda else "float32"  # on a CPU, kernels for bfloat16 need more than such a small model
    given = ["stage2.init=scratch", f"stage2.precision={precision}", f"language.model={toy / 'wide'}", *overrides]
    given += ["stage2.lora={r: 4, alpha: 4, dropout: 0.0}"]
    monkeypatch.setattr("llavactl.training.prediction.predict.process_bytes", lambda: 0)
    memory = 10**9
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory))

    def plan(overrides: list[str], devices: int = 1):
        recipe = load_recipe(toy / "recipe.yaml", overrides)
        return plan_training(recipe, 2, device_memory=memory if cuda else None, devices=devices)

    needed = plan(given).peak_bytes["device" if cuda else "host"]
    hints = []
    for share in shares:
        memory = round(share * needed)
        refused = plan(given)
        hints += [] if refused.fits else [(memory, each["options"]) for each in refused.alternatives]
    assert hints
    for memory, options in hints:  # noqa: B007 - `plan` reads it
        assert options
        counts = [int(option.split()[1]) for option in options if option.startswith("--devices")]
        changes = [option.removeprefix("-o ") for option in options if option.startswith("-o ")]
        assert plan([*given, *changes], *counts).fits, options


@pytest.mark.slow
def test_a_refusal_names_the_smallest_peak_and_its_placement(toy: Path) -> None:
    toy_language(toy / "wide", width=192)
    auto = ["stage2.init=scratch", "stage2.precision=bfloat16", f"language.model={toy / 'wide'}"]
    auto += ["stage2.gradient_checkpointing=auto", "stage2.micro_batch_tokens=auto"]

    def plan(memory: int, *overrides: str):
        return plan_training(load_recipe(toy / "recipe.yaml", [*auto, *overrides]), 2, device_memory=memory)

    refused = plan(10**6)
    assert not refused.fits
    assert refused.placement["optimizer_state"] == "host"
    assert refused.peak_bytes["device"] < plan(10**12).peak_bytes["device"] / 2
    checkpointing = refused.placement["gradient_checkpointing"]
    chosen = plan(10**12, "optimizer_state=host", f"stage2.gradient_checkpointing={str(checkpointing).lower()}")
    assert chosen.peak_bytes["device"] == refused.peak_bytes["device"]


@pytest.mark.slow
def test_no_hint_has_the_options_of_another_one_and_more(toy: Path) -> None:
    toy_language(toy / "deep", width=64, layers=4)
    overrides = ["stage2.init=scratch", "optimizer_state=device", "stage2.batch_size=16"]
    overrides += [f"language.model={toy / 'deep'}", "stage2.micro_batch_size=1"]
    recipe = load_recipe(toy / "recipe.yaml", [*overrides, "sharding=none"])
    needed = plan_training(recipe, 2, device_memory=10**9, devices=4).peak_bytes["device"]
    refused = plan_training(recipe, 2, device_memory=needed, devices=4)
    options = [set(each["options"]) for each in refused.alternatives]
    assert {"-o sharding=full"} in options
    assert not [(one, other) for one in options for other in options if one < other]


def test_the_text_of_a_plan_has_the_parts_of_the_peak(toy: Path) -> None:
    run = run_cli("train", "-r", str(toy / "recipe.yaml"), "--stage", "1", "--dry-run", "--device-memory", "24 GiB")
    assert run.exit_code == 0
    labels = [line.split("  ")[0] for line in run.stdout.splitlines()]
    assert {"fits", "placement", "parameters", "device peak", "host peak", "steps", "tokens"} <= set(labels)


def test_more_devices_share_the_work_of_a_step(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["stage2.init=scratch", "sharding=full"])
    one, two = (plan_training(recipe, 2, device_memory=10**9, devices=count) for count in (1, 2))
    assert (one.steps, one.tokens) == (two.steps, two.tokens)
    assert (one.placement["sharded"], two.placement["sharded"]) == (False, True)
    assert two.peak_parts["device"]["optimizer_state"] == pytest.approx(
        one.peak_parts["device"]["optimizer_state"] / 2, rel=0.01
    )


def test_the_time_follows_from_a_throughput(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["stage2.init=scratch"])
    assert plan_training(recipe, 2).time is None
    plan = plan_training(recipe, 2, tokens_per_s=100)
    assert plan.tokens is not None
    assert plan.time == {
        "seconds": round(plan.tokens / 100, 1),
        "tokens_per_s": 100,
        "source": "--tokens-per-second",
    }


@pytest.mark.slow
def test_the_throughput_of_an_earlier_run_is_that_of_the_same_model_method_and_devices(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["stage2.init=scratch"])
    report = train(load_recipe(toy / "recipe.yaml", [*SCRATCH[1:], "features.mode=live", "stage2.max_steps=1"]), 2)
    plan = plan_training(recipe, 2)
    assert plan.time is not None
    assert plan.time["tokens_per_s"] == report.tokens_per_s
    toy_language(toy / "deeper", layers=3)
    for override in (f"language.model={toy / 'deeper'}", "stage2.method=lora"):
        assert plan_training(load_recipe(toy / "recipe.yaml", [*SCRATCH[1:], override]), 2).time is None
    assert plan_training(recipe, 2, devices=2).time is None
    assert plan_training(recipe, 2, device_memory=10**9).time is None
    file = toy / "runs/toy/stage2/report.json"
    file.write_text(json.dumps({"tokens_per_s": report.tokens_per_s}))  # of an earlier version
    assert plan_training(recipe, 2).time is None


@pytest.mark.parametrize("size", ["0", "-1GB", "24 XB", "GB", "1e3", "", "24", "24.5", "80000"])
def test_an_invalid_size_is_a_usage_error(toy: Path, size: str) -> None:
    run = run_cli("train", "-r", str(toy / "recipe.yaml"), "--stage", "1", "--dry-run", "--device-memory", size)
    assert run.exit_code == 2


def test_options_of_the_plan_need_dry_run(toy: Path) -> None:
    run = run_cli("train", "-r", str(toy / "recipe.yaml"), "--stage", "1", "--devices", "2")
    assert run.exit_code == 2
    assert "--dry-run" in run.stderr


def test_a_model_that_is_not_here_is_a_typed_error(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(toy / "recipe.yaml", [f"language.model={toy / 'absent'}"])
    with pytest.raises(ModelError, match="absent"):
        plan_training(recipe, 1)


def test_a_stage_without_sources_is_refused(toy: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.stage2"):
        plan_training(load_recipe(toy / "recipe.yaml", ["data.stage2=[]"]), 2)


def test_recipes_check_warns_of_stages_that_do_not_fit(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*options: str):
        return run_cli("recipes", "check", str(toy / "recipe.yaml"), *options, "--json")

    small = check("--device-memory", "100KB")
    assert small.exit_code == 0
    warnings = json.loads(small.stdout)["warnings"]
    assert [warning.split(" doesn't")[0] for warning in warnings] == ["stage 1", "stage 2"]
    assert all(warning in small.stderr for warning in warnings)
    assert "warnings" not in json.loads(check("--device-memory", "80GB").stdout)
    assert "warnings" not in json.loads(check().stdout)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10**6))
    on_cpu = json.loads(check().stdout)["warnings"]
    assert [warning.split(" doesn't")[0] for warning in on_cpu] == ["stage 1", "stage 2"]


def test_a_recipe_is_valid_if_its_memory_cannot_be_predicted(toy: Path) -> None:
    (toy / "records.json").write_text("{")
    checked = run_cli("recipes", "check", str(toy / "recipe.yaml"), "--device-memory", "2MB", "--json")
    assert checked.exit_code == 0, checked.stderr
    document = json.loads(checked.stdout)
    assert document["ok"]
    assert all("records.json" in warning for warning in document["warnings"])
    assert len(document["warnings"]) == 2


def test_doctor_says_which_recipes_fit() -> None:
    small, large = (
        {each.what: each for each in doctor._recipes((doctor.Device(f"cuda:0 {size}", size, ()),) * count)}
        for size, count in ((25.4, 1), (85.0, 8))
    )
    recipes = registry().entries["recipes"].values()
    names = {f"recipe {each.name}" for each in recipes if each.name.startswith("llava") and each.plugin == BUILTIN}
    assert set(small) == names
    assert set(large) == {*names, *(f"{name} on 8 GPUs" for name in names)}
    assert not small["recipe llava-v1.5-13b"].works
    assert small["recipe llava-v1.5-7b-qlora"].works
    assert all(each.works for name, each in large.items() if name.endswith("GPUs"))
    assert list(doctor._recipes((doctor.Device("cpu", 64, ()),))) == []


def test_checking_a_recipe_reads_no_records_if_the_longest_samples_fit(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []

    def plan(_recipe: Recipe, stage: int, **_: int) -> SimpleNamespace:
        planned.append(stage)
        return SimpleNamespace(fits=True)

    monkeypatch.setattr(plan_module, "plan_training", plan)
    assert plan_module.check_memory(toy / "recipe.yaml", [], 10**12, 1) == ([], [])
    assert planned == []
    plan_module.check_memory(toy / "recipe.yaml", [], 10**7, 1)
    assert planned == [1, 2]
