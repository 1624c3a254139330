"""Muon (Jordan et al. 2024) for the matrices of the language model except embeddings and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from llavactl.core.protocols import Weight
from llavactl.core.registry import Options


class Muon:
    """Muon for the matrices inside the language model, those of LoRA adapters included.

    Its updates are scaled to the typical RMS of AdamW's, 0.2 times the learning rate (Liu et al. 2025, "Muon is
    scalable for LLM training", section 2.2), so that both use the same learning rate.
    """

    scope: Literal["weight"] = "weight"
    moments = ("momentum_buffer",)

    def __init__(self, options: Options) -> None:
        pass

    def selects(self, weight: Weight) -> bool:
        return weight.part == "language" and len(weight.shape) == 2

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
