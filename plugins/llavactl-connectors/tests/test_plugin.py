"""The package as a plugin: what it registers, what it imports, its README, and training with the toy models."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from llavactl_connectors import components
from safetensors.torch import load_file

from llavactl import FeatureShape, load_recipe
from llavactl.testing import check_plugin, run_cli, toy_clip, toy_recipe

HEAVY = ["torch", "transformers", "safetensors", "numpy"]
CONNECTORS = {
    "average-pooling": "AveragePooling",
    "pixel-shuffle": "PixelShuffle",
    "c-abstractor": "CAbstractor",
    "ldp-v2": "LdpV2",
    "perceiver-resampler": "PerceiverResampler",
    "q-former": "QFormer",
}
README = Path(__file__).parents[1] / "README.md"


def create(name: str, **options: Any) -> Any:
    """The connector ``name``, with default values for other options."""
    return getattr(components, CONNECTORS[name])(getattr(components, f"{CONNECTORS[name]}Options")(**options))


@pytest.mark.parametrize("module", ["llavactl_connectors", "llavactl_connectors.components"])
def test_the_entry_point_and_the_options_import_nothing_heavy(module: str):
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_components_conform():
    small: dict[str, dict[str, Any]] = {
        "average-pooling": {},
        "pixel-shuffle": {},
        "c-abstractor": {"tokens": 9, "hidden": 32},
        "ldp-v2": {},
        "perceiver-resampler": {"layers": 2},
        "q-former": {"layers": 2, "hidden": 24, "heads": 4},
    }
    assert check_plugin("connectors", small) == []
    checked = run_cli("plugins", "check", "connectors", "--json")
    assert checked.exit_code == 0, checked.stderr
    assert checked.json()["ok"]
    assert {"conformance", "recipe"} <= {each["check"] for each in checked.json()["checks"]}
    listed = {each["name"] for each in run_cli("components", "connectors", "--json").json()}
    assert CONNECTORS.keys() <= listed


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy recipe with a grid of 4x4 patches."""
    recipe = toy_recipe(tmp_path_factory.mktemp("toys"))
    toy_clip(recipe.parent / "clip", size=56)
    return recipe


@pytest.mark.slow
def test_both_stages_are_trained(case: Any, toys: Path, tmp_path: Path):
    """The connector's weights change, and the model of stage 2 answers."""
    values = [f"connector.{key}={value}" for key, value in case.values.items()]
    settings = [f"connector.name={case.name}", *values, f"run_dir={tmp_path}/run", "features.mode=live"]
    options = ["-r", str(toys), *(word for each in settings for word in ("-o", each))]
    checked = run_cli("recipes", "check", *options)
    assert checked.exit_code == 0, checked.stderr
    weights = []
    for stage in ("1", "2"):
        trained = run_cli("train", "--stage", stage, *options, "-o", f"stage{stage}.max_steps=3", "--json")
        assert trained.exit_code == 0, trained.stderr
        weights.append(load_file(tmp_path / f"run/stage{stage}/model/connector.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    model, photo = tmp_path / "run/stage2/model", next((toys.parent / "images").iterdir())
    answered = run_cli("chat", "--model", str(model), "--image", str(photo), "--prompt", "What colour?", "--json")
    assert answered.exit_code == 0, answered.stderr
    assert isinstance(answered.json()["answer"], str)


def test_a_grid_that_does_not_fit_stops_before_training(toys: Path, tmp_path: Path):
    settings = ["connector.name=average-pooling", "connector.factor=3", f"run_dir={tmp_path}/run", "features.mode=live"]
    options = ["-r", str(toys), *(word for each in settings for word in ("-o", each))]
    for words in (["recipes", "check"], ["train", "--stage", "1"]):
        result = run_cli(*words, *options)
        assert result.exit_code == 1
        assert "4x4" in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_table_in_the_readme_is_correct():
    """Tokens for grids of 24x24 and 16x16 patches, and parameters for Dv = 1024 and Dl = 4096."""
    rows = [line.split("|")[1:-1] for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[2:]] for cells in rows if len(cells) == 5}
    assert table.keys() == CONNECTORS.keys()
    for name, (tokens_24, tokens_16, parameters) in table.items():
        connector, shape = create(name), FeatureShape((24, 24), 1024)
        assert connector.tokens(shape) == int(tokens_24)
        assert connector.tokens(FeatureShape((16, 16), 1024)) == int(tokens_16)
        with torch.device("meta"):
            count = sum(weight.numel() for weight in connector.build(shape, 4096).parameters())
        assert f"{count / 1e6:.1f} M" == parameters, name


needs_demo = pytest.mark.skipif(find_spec("llavactl_demo") is None, reason="the recipe extends one of llavactl-demo")


@needs_demo
def test_all_connectors_of_the_comparison_have_64_tokens():
    shown = run_cli("recipes", "show", "connector-comparison")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("# llavactl sweep -r connector-comparison\n")
    variants = list(load_recipe("connector-comparison").sweep.axes["connector"].values())
    assert {spec["name"] for spec in variants} == {"mlp2x-gelu", *CONNECTORS}
    for name, options in ((spec["name"], spec) for spec in variants if spec["name"] in CONNECTORS):
        values = {key: value for key, value in options.items() if key != "name"}
        assert create(name, **values).tokens(FeatureShape((16, 16), 384)) == 64


@needs_demo
@pytest.mark.slow
def test_all_variants_of_the_comparison_fit_the_models():
    """Converts the demo's weights first."""
    from llavactl_demo.weights import LANGUAGE, VISION

    if any(find_spec(weights.module) is None for weights in (VISION, LANGUAGE)):
        pytest.skip("the demo's weights are not installed")
    planned = run_cli("sweep", "-r", "connector-comparison", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert planned.json()["computed"] == {"extract": 1, "stage1": 7, "stage2": 7}
