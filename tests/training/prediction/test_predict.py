"""Predicted memory against the storages of a real training step, and the extrapolation over layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llavactl.core.schema import FeatureShape
from llavactl.recipe.load import load_recipe
from llavactl.recipe.stages import Lora, Stage1, Stage2
from llavactl.testing import toy_language
from llavactl.training import checkpoints, loop
from llavactl.training.placement import Placement
from llavactl.training.prediction import step
from llavactl.training.prediction.fake import as_fake, fake_tensors
from llavactl.training.prediction.model import stage_model
from llavactl.training.prediction.predict import Choice, StagePredictor
from llavactl.training.prediction.storage import StorageMeter
from llavactl.training.prediction.target import Target
from llavactl.training.prediction.weights import Weights
from llavactl.training.update_rules import moments_by_weight
from llavactl.verbs.plan import plan_training
from llavactl.verbs.train import train

HERE = ["features.mode=live", "stage1.max_steps=3", "stage2.max_steps=3", "stage2.init=scratch"]
BFLOAT16 = "stage2.precision=bfloat16"
LORA = ("stage2.method=lora", "stage2.lora={r: 8, alpha: 8, dropout: 0.1}")
CHECKPOINTING = "stage2.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("stage", "shape", "settings"),
    [
        (1, (64, 7, 400), ()),
        pytest.param(2, (64, 7, 400), (BFLOAT16,), marks=pytest.mark.slow),
        (2, (96, 2, 1500), (BFLOAT16, *LORA, CHECKPOINTING)),
        pytest.param(2, (96, 2, 1500), (CHECKPOINTING, "stage2.image_order=random"), marks=pytest.mark.slow),
        pytest.param(2, (48, 6, 400), (*LORA, "features.dtype=int8", "features.mode=cached"), marks=pytest.mark.slow),
        pytest.param(
            2, (48, 6, 400), (BFLOAT16, "stage2.optimizer=muon", "stage2.packing=never"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_predicted_peak_is_the_measured_one(
    toy: Path, monkeypatch: pytest.MonkeyPatch, stage: int, shape: tuple[int, int, int], settings: tuple[str, ...]
) -> None:
    width, layers, vocabulary = shape
    toy_language(toy / "shaped", width=width, layers=layers, vocabulary=vocabulary)
    recipe = load_recipe(toy / "recipe.yaml", [*HERE, f"language.model={toy / 'shaped'}", *settings])
    if recipe.features.mode == "cached":
        from llavactl.verbs.extract import extract

        extract(recipe)
    plan = plan_training(recipe, stage)
    peaks = _measured_peaks(monkeypatch)
    report = train(recipe, stage)
    assert plan.peak_bytes["device"] == pytest.approx(max(peaks), rel=0.02)
    assert plan.fits
    assert (plan.steps, plan.tokens) == (report.steps, report.tokens)
    assert (plan.padding, plan.prefix_sharing) == (report.padding, report.prefix_sharing)
    assert plan.parameters["trainable"] == report.trainable_parameters
    folder = checkpoints.checkpoint_path(recipe.run_dir / f"stage{stage}" / "checkpoints", report.steps)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert plan.checkpoint_bytes == pytest.approx(size, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("stage2.method=lora", "stage2.lora.dropout=0", CHECKPOINTING)])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 7, "n_head": 4}),
        ("mixtral", {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_local_experts": 4}),
    ],
)
def test_the_predicted_peak_of_other_families_is_the_measured_one(
    toy: Path, monkeypatch: pytest.MonkeyPatch, family: str, sizes: dict[str, int], settings: tuple[str, ...]
) -> None:
    config = AutoConfig.for_model(family, **sizes, vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(toy / "language")
    recipe = load_recipe(toy / "recipe.yaml", [*HERE, *settings])
    predicted = plan_training(recipe, 2).peak_bytes["device"]
    peaks = _measured_peaks(monkeypatch)
    train(recipe, 2)
    assert predicted == pytest.approx(max(peaks), rel=0.01)


def _measured_peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the peak bytes of tensors of each optimizer step that is trained from now on."""
    meter, peaks = StorageMeter(), []

    def measured(inner):
        def step(run, *args, **kwargs):
            meter.add([*run.model.parameters(), *run.model.buffers(), *run.optimizer.masters.values()], "static")
            meter.restart()
            with meter:
                result = inner(run, *args, **kwargs)
            peaks.append(sum(meter.peak().values()))
            return result

        return step

    for name in ("accumulate", "update"):
        monkeypatch.setattr(loop, name, measured(getattr(loop, name)))
    return peaks


@pytest.mark.parametrize(
    ("method", "gradient_checkpointing", "cuda"),
    [
        ("full", False, True),
        pytest.param("full", True, False, marks=pytest.mark.slow),
        pytest.param("lora", True, False, marks=pytest.mark.slow),
        pytest.param("lora", False, True, marks=pytest.mark.slow),
        pytest.param("connector", False, False, marks=pytest.mark.slow),
        pytest.param("connector", True, True, marks=pytest.mark.slow),
    ],
)
def test_extrapolating_layers_is_exact(
    toy: Path, monkeypatch: pytest.MonkeyPatch, method: str, gradient_checkpointing: bool, cuda: bool
) -> None:
    toy_language(toy / "deep", layers=9)
    recipe = load_recipe(toy / "recipe.yaml", [*HERE, f"language.model={toy / 'deep'}"])
    common = {"precision": "bfloat16", "gradient_checkpointing": gradient_checkpointing, "max_length": 100}
    number = 1 if method == "connector" else 2
    settings = Stage1(**common) if number == 1 else Stage2(method=method, lora=Lora(r=4), **common)
    choice = Choice(Placement(), gradient_checkpointing, None)
    predictions = []
    for traced in (step.TRACED_LAYERS, (100, 101)):
        monkeypatch.setattr(step, "TRACED_LAYERS", traced)
        predictor = StagePredictor(recipe, number, FeatureShape((2, 2), 32), 4, None, 1, cuda=cuda)
        predictions.append(predictor.with_settings(settings, 1).predict(choice).device)
    assert predictions[0] == predictions[1]
    assert predictions[0]["activations"] > 0


def test_sharding_divides_what_is_kept_and_adds_what_is_gathered(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", HERE)
    settings = Stage2(precision="bfloat16")
    model = stage_model(recipe, 2, settings, FeatureShape((2, 2), 32))
    weights = Weights(model, 2, moments_by_weight(model, settings))
    replicated, sharded = (weights.memory(Placement(shard), 4) for shard in (False, True))
    for part in ("masters", "gradients", "optimizer_state"):
        assert sharded.device[part] == pytest.approx(replicated.device[part] / 4, rel=0.01)
    layers = weights.model.language.get_decoder().layers
    largest = sum(weight.numel() for weight in layers[0].parameters())
    root = weights.trainable - len(layers) * largest
    # In bfloat16 the root group and two layers, and gradients of both; in float32 the gradients that are reduced.
    assert sharded.device["gathered"] >= 2 * (root + 2 * largest) + 2 * root + 4 * min(root, largest)
    host = weights.memory(Placement(optimizer_state="host"), 4)
    assert host.device.keys() == {"weights"}
    assert host.host["masters"] + host.host["gradients"] + host.host["optimizer_state"] == 16 * weights.trainable


def test_weights_in_4_bits_take_half_a_byte(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", HERE)
    shape = FeatureShape((2, 2), 32)
    stages = Stage2(method="lora"), Stage2(method="qlora")
    models = [(stage_model(recipe, 2, stage, shape), stage) for stage in stages]
    both = [Weights(m, 2, moments_by_weight(m, stage), stage.method == "qlora") for m, stage in models]
    lora, qlora = (each.memory(Placement(), 1).device["weights"] for each in both)
    layers = both[0].model.language.get_decoder().layers
    linear = sum(weight.numel() for name, weight in layers.named_parameters() if "base_layer" in name)
    assert lora - qlora == pytest.approx(linear * (2 - 0.5158), rel=0.01)
    assert both[0].trainable == both[1].trainable


def test_the_meter_counts_storages_once_and_forgets_released_ones() -> None:
    meter = StorageMeter()
    with meter:
        tensor = torch.zeros(1000)
        view = tensor[10:].view(-1, 2)
        del tensor
        other = view + 1
        del other
        other = view.double()
    assert meter.bytes_by_part["activations"] == 4000 + 990 * 8
    assert sum(meter.peak().values()) == 4000 + 990 * 8
    del view, other
    assert meter.bytes_by_part["activations"] == 0


def test_fake_tensors_have_shapes_and_integers_have_values() -> None:
    with fake_tensors():
        module = torch.nn.Linear(1000, 10**7, bias=False)  # 40 GB
        as_fake(module, torch.bfloat16)
        ids = torch.tensor([0, 3, 0, 5])
        (chosen,) = ids.nonzero(as_tuple=True)
        output = module(torch.empty(4, 1000, dtype=torch.bfloat16))[chosen]
    assert chosen.tolist() == [1, 3]
    assert (tuple(output.shape), output.dtype) == ((2, 10**7), torch.bfloat16)


def test_a_device_keeps_a_reserve() -> None:
    assert Target(True, 1000).usable_bytes == Target(False, 1000).usable_bytes < 1000
