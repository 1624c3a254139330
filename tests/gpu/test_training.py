"""Training on the device: each method, cached and live features, resuming, and collectives."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from llavactl.core.schema import FeatureShape
from llavactl.model.build import build
from llavactl.testing import run_cli
from llavactl.training.metrics import Metrics, read

LORA = "lora={r: 4, alpha: 8, dropout: 0.0}"
METHODS = {
    "connector": (1, []),
    "full": (2, ["method=full"]),
    "lora with checkpointing": (2, ["method=lora", LORA, "gradient_checkpointing=true"]),
    "qlora": (2, ["method=qlora", LORA]),
}


def train(toy: Path, stage: int, folder: str, *options: str, code: int = 0) -> Any:
    """The report of a stage trained in bfloat16 from live features, unless ``options`` say otherwise."""
    stage_options = ["precision=bfloat16", "learning_rate=1e-2", "validation=0.2", *options]
    if stage == 2:
        stage_options.append("init=scratch")
    words = [f"run_dir={toy}/{folder}", *(f"stage{stage}.{option}" for option in stage_options)]
    words += ["features.mode=live", "eval.max_new_tokens=2"]  # of the sample answers after training
    overrides = [word for option in words for word in ("-o", option)]
    result = run_cli("train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *overrides, "--json")
    assert result.exit_code == code, result.stderr
    return result.json() if code == 0 else result


def losses(toy: Path, folder: str, stage: int) -> list[float]:
    return [line["loss"] for line in read(toy / folder / f"stage{stage}/metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(("stage", "options"), METHODS.values(), ids=METHODS.keys())
def test_each_method_packs_and_learns(toy: Path, device: torch.device, stage: int, options: list[str]) -> None:
    if "method=qlora" in options:
        pytest.importorskip("bitsandbytes", exc_type=ImportError)
    report = train(toy, stage, "run", "epochs=3", *options)
    assert report["packing"] == "packed"
    assert report["val_loss"] < 7
    first, *_, last = losses(toy, "run", stage)
    assert last < first - 0.1
    assert (toy / f"run/stage{stage}/samples.json").is_file(), "the trained model answers"


def test_cached_features_train_like_live_ones(toy: Path, device: torch.device) -> None:
    recipe = str(toy / "recipe.yaml")
    extracted = run_cli("extract", "-r", recipe, "--json")
    assert extracted.exit_code == 0, extracted.stderr
    cached = ["train", "--stage", "1", "-r", recipe, "-o", f"run_dir={toy}/cached"]
    options = [
        f"stage1.{option}" for option in ("precision=bfloat16", "learning_rate=1e-2", "validation=0.2", "epochs=1")
    ]
    result = run_cli(*cached, *(word for option in [*options, "eval.max_new_tokens=2"] for word in ("-o", option)))
    assert result.exit_code == 0, result.stderr
    train(toy, 1, "live", "epochs=1")
    assert losses(toy, "cached", 1) == pytest.approx(losses(toy, "live", 1), rel=5e-3)


def test_a_resumed_run_equals_an_uninterrupted_one(
    toy: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA up to rounding: the backward pass of attention adds gradients in any order."""
    options = ["epochs=2", "checkpoint_every=3"]
    train(toy, 2, "uninterrupted", *options)
    write = Metrics.write

    def interrupt(self: Metrics, line: Any) -> None:
        write(self, line)
        if line["step"] == 4 and "loss" in line:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "write", interrupt)
        train(toy, 2, "run", *options, code=130)
    report = train(toy, 2, "run", *options)
    assert report["resumed_from"] == 4
    tolerance = {"rel": 2e-2} if device.type == "cuda" else {"rel": 0, "abs": 0}
    assert losses(toy, "run", 2) == pytest.approx(losses(toy, "uninterrupted", 2), **tolerance)


def test_weights_in_4_bits_are_on_the_device(toy: Path, device: torch.device) -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    spec = {"name": "hf", "model": str(toy / "language")}
    bundle = build({"name": "linear"}, spec, FeatureShape((2, 2), 32), dtype="bfloat16", quantize_on=str(device))
    language = bundle.model.language
    assert {parameter.device.type for parameter in language.parameters()} == {device.type}
    assert language.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.uint8
    ids = torch.tensor([[1, 5, 9]], device=device)
    embedded = language.get_input_embeddings()(ids).detach().requires_grad_()
    language(inputs_embeds=embedded).logits.float().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
