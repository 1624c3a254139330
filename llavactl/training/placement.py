"""Where the weights, gradients and optimizer state of a training stage are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Placement:
    """``sharded``: each process keeps a share of weights, gradients and optimizer state, instead of all of them.

    ``optimizer_state``: whether master weights, accumulated gradients and moments are on the device or in host memory.
    """

    sharded: bool = False
    optimizer_state: Literal["device", "host"] = "device"
