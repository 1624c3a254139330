"""Float32 master weights and the optimizers that update them.

Sharded parameters (``training.sharding``) are DTensors; so are their gradients and moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.component_calls import call_error
from llavactl.training.sharding import distributed_like

if TYPE_CHECKING:
    from llavactl.core.protocols import UpdateRule
    from llavactl.training.trainable import UntrainedState
    from llavactl.training.update_rules import AssignedWeights


_UNTRAINED_PREFIX = "untrained.connector."
_MASTER_PREFIX = "master."
_STEP = "step"
"""torch keeps the number of updates of a weight under this key, as a float32 scalar."""


class Optimizer:
    """Float32 master weights of the trainable parameters, and the algorithms that update them.

    In bfloat16 small updates would be lost to rounding. They are applied to a float32 master copy, which is then copied
    to the parameter. Gradients of micro-batches are accumulated in float32 as well. A float32 parameter is its own
    master, unless masters are kept in host memory: then gradients are copied there after each micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Mapping[str, float],
        assignments: Sequence[AssignedWeights],
        weight_decay: float,
        beta2: float = 0.999,
        untrained: UntrainedState | None = None,
        *,
        on_host: bool = False,
    ) -> None:
        """``rates`` has the learning rate of each trainable parameter by name, ``assignments`` their update rules.
        ``untrained`` is further state of the model to save and restore. ``on_host``: master weights, accumulated
        gradients and moments are kept in host memory.
        """
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in rates}
        self.untrained = untrained
        self.masters = {
            name: p if p.dtype == torch.float32 and not on_host else _master(p, on_host)
            for name, p in self.parameters.items()
        }
        self.betas = (0.9, beta2)
        self.assignments = assignments
        self.rule_of = {name: each.rule for each in assignments for name in each.names}
        self.algorithms: list[torch.optim.Optimizer] = []
        self.algorithm_of: dict[str, torch.optim.Optimizer] = {}
        self.threaded: list[torch.optim.Optimizer] = []
        for rule, names in ((each.rule, each.names) for each in assignments):
            parts = self._parts(rule, names)
            algorithms = [self._algorithm(rule, {name: rates[name] for name in part}, weight_decay) for part in parts]
            self.algorithms += algorithms
            self.threaded += algorithms if len(algorithms) > 1 else []
            for part, algorithm in zip(parts, algorithms, strict=True):
                self.algorithm_of |= dict.fromkeys(part, algorithm)
        self.thread_pool = _single_threaded_pool(len(self.threaded)) if self.threaded else None
        self._initial_settings: list[dict[str, str]] | None = [_settings(each) for each in self.algorithms]

    def _parts(self, rule: UpdateRule, names: Sequence[str]) -> list[Sequence[str]]:
        """``names`` in parts for one thread each.

        Small matrix products, such as Muon's of a model with 135M weights, don't scale to two threads.
        """
        on_cpu = all(self.masters[name].device.type == "cpu" for name in names)
        if rule.scope != "weight" or not on_cpu:
            return [names]
        by_size = sorted(names, key=lambda name: self.masters[name].numel())
        threads = min(torch.get_num_threads(), len(names))
        return [by_size[thread::threads] for thread in range(threads)]

    def _algorithm(self, rule: UpdateRule, rates: Mapping[str, float], weight_decay: float) -> torch.optim.Optimizer:
        groups = self._groups(rates, weight_decay)
        peaks = [group.pop("peak") for group in groups]
        algorithm = rule.build(groups)
        for group, peak in zip(algorithm.param_groups, peaks, strict=True):  # a rule keeps the keys that it needs
            group["peak"] = peak
        return algorithm

    def _groups(self, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups by learning rate; no weight decay for one-dimensional ones (norms, biases), as in LLaVA."""
        kinds = {name: (rate, weight_decay if self.masters[name].ndim > 1 else 0.0) for name, rate in rates.items()}
        return [
            {
                "params": [self.masters[name] for name in rates if kinds[name] == kind],
                "peak": kind[0],
                "weight_decay": kind[1],
                "betas": self.betas,
            }
            for kind in sorted(set(kinds.values()))
        ]

    def accumulate(self) -> None:
        """Adds the gradients of one micro-batch to those of the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += parameter.grad.to(master.device)
            parameter.grad = None

    def grad_norm(self) -> torch.Tensor:
        """The norm of the gradient of all weights, a scalar; sharded if the weights are."""
        return nn.utils.get_total_norm(self.gradients())

    def step(self, fraction: float, max_norm: float | None = None, norm: torch.Tensor | None = None) -> float:
        """Updates the weights with ``fraction`` of the peak learning rates; returns the highest rate used.

        With ``max_norm`` the gradient is clipped. ``norm`` is the result of ``grad_norm``, if it was called.
        """
        groups = [group for algorithm in self.algorithms for group in algorithm.param_groups]
        for group in groups:
            group["lr"] = group["peak"] * fraction
        # Weights without a gradient in this step get a zero gradient, on one process as on several.
        self.gradients()
        if max_norm is not None:
            norm = self.grad_norm() if norm is None else norm
            nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
        for algorithm in self.algorithms:
            if algorithm not in self.threaded:
                algorithm.step()
        if self.thread_pool is not None:
            list(self.thread_pool.map(lambda algorithm: algorithm.step(), self.threaded))
        if self._initial_settings is not None:
            self._check_all_state(self._initial_settings)
            self._initial_settings = None
        for algorithm in self.algorithms:
            # Set to zero, not freed: allocating new memory in every step costs more than clearing it.
            algorithm.zero_grad(set_to_none=False)
        self._copy_masters()
        return max(group["lr"] for group in groups)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replaces the values of some parameters, by name; the same values in all processes."""
        for name, weight in weights.items():
            self.masters[name].copy_(distributed_like(weight, self.masters[name]))
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        """Copies the masters to the model's parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def gradients(self) -> list[torch.Tensor]:
        """The accumulated gradients of all masters, zeros if there are none: the same number on every process."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def state(self) -> dict[str, torch.Tensor]:
        """Master weights, moments and untrained state as one flat mapping; the tensors are not copies."""
        flat = {_MASTER_PREFIX + name: master.detach() for name, master in self.masters.items()}
        if self.untrained:
            flat |= {_UNTRAINED_PREFIX + name: tensor for name, tensor in self.untrained.state().items()}
        for name, master in self.masters.items():
            for key, value in self.algorithm_of[name].state.get(master, {}).items():
                self._check_state(name, key, value)
                flat[f"{key}.{name}"] = value
        return flat

    def _check_all_state(self, initial_settings: Sequence[Mapping[str, str]]) -> None:
        """Raises PluginError if checkpoints wouldn't contain the complete state, or if state was declared that isn't
        kept; called after the first step.
        """
        self.state()
        for rule, names in ((each.rule, each.names) for each in self.assignments):
            kept = {key for name in names for key in self.algorithm_of[name].state.get(self.masters[name], {})}
            if names and (missing := [key for key in rule.moments if key not in kept]):
                raise call_error(
                    rule,
                    "build",
                    f"`moments` declares {missing[0]!r}, but the optimizer keeps no such state for any weight after "
                    f"the first step; it keeps {', '.join(sorted(kept)) or 'none'}",
                )
        for algorithm, before in zip(self.algorithms, initial_settings, strict=True):
            after = _settings(algorithm)
            if changed := [key for key in after if after[key] != before.get(key)]:
                raise call_error(
                    algorithm,
                    "step",
                    f"keeps {changed[0].partition('.')[2]!r} in the parameter groups, which checkpoints don't contain; "
                    "expected state per weight",
                )

    def _check_state(self, name: str, key: str, value: Any) -> None:
        """Raises PluginError if an algorithm keeps state that can't be restored from a checkpoint."""
        rule, shape = self.rule_of[name], () if key == _STEP else self.masters[name].shape
        if (key == _STEP or key in rule.moments) and isinstance(value, torch.Tensor) and value.shape == shape:
            return
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise call_error(
            rule,
            "build",
            f"the optimizer keeps the state {key!r} ({got}) for {name}; expected tensors of its shape "
            f"{tuple(self.masters[name].shape)} in `moments` ({', '.join(rule.moments)}), or the scalar {_STEP!r}",
        )

    @torch.no_grad()
    def load(self, names: Collection[str], read: Callable[[Mapping[str, torch.Tensor]], object]) -> None:
        """Restores a result of ``state`` bit for bit.

        ``names`` are its keys. ``read`` is called with the tensors to be filled, by name, so that no copy is needed.
        """
        for name, master in self.masters.items():
            state = self.algorithm_of[name].state
            saved = [key for key in (_STEP, *self.rule_of[name].moments) if f"{key}.{name}" in names]
            if saved:
                state[master] = {
                    key: torch.zeros((), device=master.device) if key == _STEP else torch.zeros_like(master)
                    for key in saved
                }
            else:
                state.pop(master, None)
        read({name: tensor for name, tensor in self.state().items() if name in names})
        self._copy_masters()


def _settings(algorithm: torch.optim.Optimizer) -> dict[str, str]:
    """The values in the parameter groups that no step may change, as text."""
    return {
        f"{index}.{key}": repr(value)
        for index, group in enumerate(algorithm.param_groups)
        for key, value in group.items()
        if key not in ("params", "lr")
    }


def _master(parameter: torch.Tensor, on_host: bool) -> nn.Parameter:
    """A float32 copy of ``parameter`` on its device, or in host memory."""
    return nn.Parameter(parameter.detach().to("cpu" if on_host else parameter.device, torch.float32, copy=True))


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """A pool of ``threads`` threads in each of which torch uses a single thread."""
    previous = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "optimizer", initializer=torch.set_num_threads, initargs=(1,))
    barrier = Barrier(threads)
    list(pool.map(lambda _: barrier.wait(), range(threads)))
    # Unlike OpenMP's, MKL's number of threads is global: restore it for this thread.
    torch.set_num_threads(previous)
    return pool
