"""Muon: momentum made to go equally far in every direction, for matrices, or for the heads within them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

QUINTIC = (3.4445, -4.775, 2.0315)
"""Of Newton and Schulz's iteration, chosen for few steps (Jordan et al. 2024): singular values end at 0.7 to 1.2."""

STEPS = 5


class Muon(torch.optim.Optimizer):
    """Jordan's algorithm with Nesterov's momentum; a group's ``block`` (rows, columns) is made orthogonal as one.

    ``torch.optim.Muon`` knows whole matrices alone. Heads each by themselves are the units of attention, and take a
    fraction of the time: an iteration's work grows with the square of a block's shorter side.

    Steps are scaled to 0.2 times the learning rate a weight, in the mean square, which is what AdamW's mostly have
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                moving = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                direction = orthogonal(gradient.lerp(moving, momentum), group["block"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(direction, alpha=-0.2 * max(group["block"]) ** 0.5 * rate)


def orthogonal(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``matrix`` [R, C] with its blocks [r, c] each near the orthogonal one next to it, in bfloat16."""
    (rows, columns), (r, c) = matrix.shape, block
    split = matrix.bfloat16().view(rows // r, r, columns // c, c).transpose(1, 2)
    wide = split.reshape(-1, r, c) if r <= c else split.mT.reshape(-1, c, r)
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = QUINTIC
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), wide, beta=first)
    blocks = (wide if r <= c else wide.mT).reshape(split.shape)
    return blocks.transpose(1, 2).reshape(rows, columns)
