"""AdamW, or Muon for matrices, over full-precision masters, and LLaVA's cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from llavactl.training.muon import Muon


def cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at ``step`` (from 0) of ``steps``: linear warm-up over the first ``warmup``
    share, then half a cosine to 0 (transformers' ``get_cosine_schedule_with_warmup``, which LLaVA uses).
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Optimizer:
    """AdamW (no clipping, as LLaVA), for some matrices Muon, over float32 masters of the trained parameters.

    Where the model computes in bfloat16, small updates would be lost in its weights: they go to a
    float32 copy, which the weights then follow. Gradients of micro batches add up in float32 too. A
    float32 parameter is its own master.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Mapping[str, float],
        weight_decay: float,
        beta2: float = 0.999,
        blocks: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        """Rates of learning by the name of each trained parameter, and for Muon the shape of what it takes as one."""
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in rates}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        groups: dict[tuple[float, tuple[int, int] | None], list[str]] = {}
        for name, rate in rates.items():
            groups.setdefault((rate, blocks.get(name)), []).append(name)
        made: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for (rate, block), names in groups.items():
            made[block is not None].append(
                {"params": [self.masters[name] for name in names], "peak": rate, "block": block}
            )
        # Fused is one pass over memory: on a CPU with 135M weights 0.09 s a step, against 0.29 s one tensor at a time.
        adamw = torch.optim.AdamW(
            made[False], lr=0.0, betas=(0.9, beta2), eps=1e-8, weight_decay=weight_decay, fused=True
        )
        self.algorithms: list[torch.optim.Optimizer] = [adamw]
        if blocks:
            self.algorithms.append(Muon(made[True], weight_decay=weight_decay))
        self.algorithm = {name: self.algorithms[name in blocks] for name in rates}

    def accumulate(self) -> None:
        """Takes the gradients of one micro batch from the model."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += parameter.grad
            parameter.grad = None

    def step(self, share: float) -> float:
        """One update at ``share`` of the peak learning rates; returns the highest rate used."""
        groups = [group for algorithm in self.algorithms for group in algorithm.param_groups]
        for group in groups:
            group["lr"] = group["peak"] * share
        # A weight that this step gave no gradient has a gradient of zero, on one process as on several.
        self.gradients()
        for algorithm in self.algorithms:
            algorithm.step()
            # Set to zero, not freed: fresh memory for every step's gradients costs more than clearing the old.
            algorithm.zero_grad(set_to_none=False)
        self._follow()
        return max(group["lr"] for group in groups)

    @torch.no_grad()
    def _follow(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def gradients(self) -> list[torch.Tensor]:
        """The accumulated gradient of every master, zeros where a step gave none: equal in number on every process."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments as one flat mapping of tensors."""
        flat = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.algorithm[name].state.get(master, {}).items():
                flat[f"{key}.{name}"] = value
        return {name: tensor.contiguous() for name, tensor in flat.items()}

    @torch.no_grad()
    def load(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Restores what ``state`` gave, to the bit."""
        for name, master in self.masters.items():
            master.copy_(flat[f"master.{name}"])
            moments: dict[str, Any] = {
                key: flat[f"{key}.{name}"].to(device=master.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
                if f"{key}.{name}" in flat
            }
            if moments:
                self.algorithm[name].state[master] = moments
        self._follow()
