"""AdamW (Loshchilov and Hutter 2019, "Decoupled weight decay regularization")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from llavactl.core.protocols import Weight
from llavactl.core.registry import Options


class AdamW:
    """AdamW for all weights."""

    scope: Literal["element"] = "element"
    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, options: Options) -> None:
        pass

    def selects(self, weight: Weight) -> bool:  # noqa: ARG002 - all of them
        return True

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        # Fused is one pass over memory: with 135M weights on a CPU 0.09 s per step instead of 0.29 s.
        return torch.optim.AdamW(groups, lr=0.0, eps=1e-8, fused=True)
