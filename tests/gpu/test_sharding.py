"""One process that communicates by NCCL (gloo on a CPU): collectives, and a sharded step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from llavactl.core.schema import Batch, FeatureShape
from llavactl.model.build import build
from llavactl.model.inputs import to_device
from llavactl.model.packed import packed_attention
from llavactl.recipe.stages import AnyStage, Stage1, Stage2
from llavactl.training.optimizer import Optimizer
from llavactl.training.sharding import gathered, is_sharded, shard
from llavactl.training.trainable import configure_trainable
from llavactl.training.update_rules import assign_update_rules


@pytest.fixture
def process_group(device: torch.device) -> Iterator[None]:
    """As in ``training.launch``."""
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_collectives(device: torch.device, process_group: None) -> None:
    tensor = torch.arange(4.0, device=device)
    distributed.all_reduce(tensor)
    distributed.broadcast(tensor, 0)
    assert tensor.tolist() == [0, 1, 2, 3]
    outcomes: list[Any] = [None]
    distributed.all_gather_object(outcomes, {"reason": "none"})
    assert outcomes == [{"reason": "none"}]


@pytest.mark.parametrize("settings", [Stage1(), Stage2()], ids=["connector", "full"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "optimizer state in host memory"])
def test_a_sharded_step_equals_a_replicas(
    toy: Path,
    device: torch.device,
    process_group: None,
    shape: FeatureShape,
    packed_batch: Batch,
    settings: AnyStage,
    offload: bool,
) -> None:
    def weights_after_a_step(sharded: bool) -> tuple[float, dict[str, torch.Tensor]]:
        language = {"name": "hf", "model": str(toy / "language")}
        model = build({"name": "mlp2x-gelu"}, language, shape, dtype="bfloat16").model
        rates = configure_trainable(model, settings, seed=0)
        assignments = assign_update_rules(model, settings)
        if sharded:
            shard(model, device, offload=offload)
        else:
            model.to(device)
        assert is_sharded(model) == sharded
        optimizer = Optimizer(model, dict.fromkeys(rates, 1e-3), assignments, 0.0, on_host=offload and not sharded)
        with packed_attention(model.language):
            loss = model(to_device(packed_batch, device)) / 100
            loss.backward()
        optimizer.accumulate()
        optimizer.step(1.0)
        return loss.item(), {name: gathered(master.detach()).cpu() for name, master in optimizer.masters.items()}

    (loss, weights), (expected_loss, expected) = weights_after_a_step(True), weights_after_a_step(False)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert weights.keys() == expected.keys()
    differences = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert differences.mean() < 1e-4, "a tenth of the learning rate, which AdamW's first update moves every weight by"
