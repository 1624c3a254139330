"""Rows of many samples train what rows of one do, and the report says which they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.testing import run_cli
from llavactl.training.metrics import read

SHORT = ["-o", "stage2.init=scratch", "-o", "stage2.max_steps=4", "-o", "features.mode=live"]


def trained(toy: Path, name: str, *more: str, code: int = 0) -> Any:
    options = [word for option in (f"run_dir={toy}/{name}", *more) for word in ("-o", option)]
    result = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *SHORT, *options, "--json")
    assert result.exit_code == code, result.stderr
    return result if code else result.json()


def losses(toy: Path, name: str) -> list[float]:
    return [line["loss"] for line in read(toy / name / "stage2/metrics.jsonl") if "loss" in line]


def tokens(toy: Path, name: str) -> list[int]:
    return [line["tokens"] for line in read(toy / name / "stage2/metrics.jsonl") if "loss" in line]


def with_more_questions(toy: Path) -> None:
    """Three records an image, of different lengths, and one without any."""
    records = json.loads((toy / "records.json").read_text())
    more = []
    for record in records:
        for again in range(3):
            answer = {"from": "gpt", "value": "It is. " * (again + 1)}
            said = [record["conversations"][0], answer]
            more.append({**record, "id": f"{record['id']}-{again}", "conversations": said})
    text = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "A word."}]
    more.append({"id": "text", "conversations": text})
    (toy / "records.json").write_text(json.dumps(more))


@pytest.mark.parametrize("shuffle", ["samples", "images"])
def test_packed_rows_train_what_padded_ones_do(toy: Path, shuffle: str) -> None:
    with_more_questions(toy)
    more = [f"stage2.shuffle={shuffle}", "stage2.batch_size=8", "stage2.micro_batch_size=8"]
    packed = trained(toy, "packed", *more)
    padded = trained(toy, "padded", *more, "stage2.packing=never")
    budget = trained(toy, "budget", *more, "stage2.micro_batch_tokens=150")
    assert (packed["packing"], padded["packing"]) == ("packed", "padded: disabled by `packing: never`")
    assert 0 < packed["padding"] < 0.1
    assert padded["prefix_sharing"] == 0
    if shuffle == "images":
        assert packed["prefix_sharing"] > 0.2
    for name in ("packed", "budget"):
        assert tokens(toy, name) == tokens(toy, "padded")
        assert losses(toy, name) == pytest.approx(losses(toy, "padded"), rel=1e-4)
    for report in (packed, budget):
        assert report["val_loss"] == pytest.approx(padded["val_loss"], rel=1e-4)


def test_a_model_that_is_not_packed_trains_on_padded_rows(toy: Path) -> None:
    config = toy / "language/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    report = trained(toy, "auto")["packing"]
    assert report.startswith("padded: ")
    assert "dropout" in report
    refused = trained(toy, "always", "stage2.packing=always", code=1)
    assert "packing: always" in refused.stderr
    assert "dropout" in refused.stderr


def test_shuffling_images_says_where_it_is_of_little_use(toy: Path) -> None:
    options = ["stage2.shuffle=images", "stage2.packing=never"]
    result = run_cli(
        "train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *SHORT, *(w for o in options for w in ("-o", o))
    )
    assert "shuffle: images" in result.stderr
    assert "packing: never" in result.stderr
