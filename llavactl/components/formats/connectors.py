"""The connectors that other programs support, and their weights under LLaVA's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

LINEAR_LAYERS = {"linear": 1, "mlp2x-gelu": 2}
"""Their number of linear layers."""


def refuse_connector(spec: Mapping[str, Any]) -> None:
    """Raises ModelError for a connector that other programs don't support."""
    extra = [key for key, plain in (("pixel_shuffle", 1), ("norm", False)) if spec.get(key, plain) != plain]
    if spec["name"] not in LINEAR_LAYERS or extra:
        options = f" with {' and '.join(f'{key}: {spec[key]}' for key in extra)}" if extra else ""
        raise ModelError(
            f"connector {spec['name']}{options} can't be exported: other programs don't support it",
            hint="train with connector linear or mlp2x-gelu, without pixel_shuffle and norm, to export the model",
        )


def connector_spec(projection: Mapping[str, torch.Tensor], where: Path) -> dict[str, Any]:
    """The connector with these weights, named as in LLaVA.

    Raises:
        ModelError: llavactl has no connector with such weights.
    """
    names = frozenset(projection)
    if names == {"weight", "bias"}:
        return {"name": "linear"}
    if names == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return {"name": "mlp2x-gelu"}
    raise ModelError(
        f"{where}: unsupported connector with tensors {', '.join(sorted(names))}",
        hint="llavactl reads linear and mlp2x_gelu projectors",
    )
