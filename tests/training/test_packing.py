"""Training with packed sequences equals training with padding; the report says which was used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.testing import run_cli
from llavactl.training.metrics import read

SHORT = ["-o", "stage2.init=scratch", "-o", "stage2.max_steps=4", "-o", "features.mode=live"]


def train(toy: Path, name: str, *settings: str, code: int = 0) -> Any:
    options = [word for option in (f"run_dir={toy}/{name}", *settings) for word in ("-o", option)]
    result = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *SHORT, *options, "--json")
    assert result.exit_code == code, result.stderr
    return result if code else result.json()


def losses(toy: Path, name: str) -> list[float]:
    return [line["loss"] for line in read(toy / name / "stage2/metrics.jsonl") if "loss" in line]


def tokens(toy: Path, name: str) -> list[int]:
    return [line["tokens"] for line in read(toy / name / "stage2/metrics.jsonl") if "loss" in line]


def add_records(toy: Path) -> None:
    """Three records per image, of different lengths, and one without an image."""
    records = json.loads((toy / "records.json").read_text())
    extended = []
    for record in records:
        for copy in range(3):
            answer = {"from": "gpt", "value": "It is. " * (copy + 1)}
            turns = [record["conversations"][0], answer]
            extended.append({**record, "id": f"{record['id']}-{copy}", "conversations": turns})
    text = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "A word."}]
    extended.append({"id": "text", "conversations": text})
    (toy / "records.json").write_text(json.dumps(extended))


@pytest.mark.parametrize("shuffle", ["samples", "images"])
def test_packing_equals_padding(toy: Path, shuffle: str) -> None:
    add_records(toy)
    settings = [f"stage2.shuffle={shuffle}", "stage2.batch_size=8", "stage2.micro_batch_size=8"]
    packed = train(toy, "packed", *settings)
    padded = train(toy, "padded", *settings, "stage2.packing=never")
    budget = train(toy, "budget", *settings, "stage2.micro_batch_tokens=150")
    assert packed["packing"] == "packed"
    assert padded["packing"].startswith("padded: ")
    assert "packing: never" in padded["packing"]
    assert 0 < packed["padding"] < 0.1
    assert padded["prefix_sharing"] == 0
    if shuffle == "images":
        assert packed["prefix_sharing"] > 0.2
    for name in ("packed", "budget"):
        assert tokens(toy, name) == tokens(toy, "padded")
        assert losses(toy, name) == pytest.approx(losses(toy, "padded"), rel=1e-4)
    for report in (packed, budget):
        assert report["val_loss"] == pytest.approx(padded["val_loss"], rel=1e-4)


def test_a_model_that_cannot_be_packed_trains_with_padding(toy: Path) -> None:
    config = toy / "language/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    packing = train(toy, "auto")["packing"]
    assert packing.startswith("padded: ")
    assert "dropout" in packing
    refused = train(toy, "always", "stage2.packing=always", code=1)
    assert "packing: always" in refused.stderr
    assert "dropout" in refused.stderr


def test_shuffling_images_without_packing_is_a_warning(toy: Path) -> None:
    options = ["stage2.shuffle=images", "stage2.packing=never"]
    result = run_cli(
        "train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *SHORT, *(w for o in options for w in ("-o", o))
    )
    assert "shuffle: images" in result.stderr
    assert "packing: never" in result.stderr
