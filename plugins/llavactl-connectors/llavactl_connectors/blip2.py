"""The Q-Former of BLIP-2, from transformers; new, or with the weights of a BLIP-2 model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Blip2Config, Blip2QFormerConfig, Blip2QFormerModel

from llavactl import ModelError


class QFormer(nn.Module):
    """Features [I, P, Dv] to embeddings [I, tokens, Dl] (arXiv 2301.12597, section 3.1).

    As in BLIP-2, the features are normalized (``ln_vision`` there), and a linear layer projects the output of the
    queries to Dl. The queries are random: if all were 0, as in a new model of transformers, they would stay equal.
    """

    def __init__(self, tokens: int, config: Blip2QFormerConfig, out: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.encoder_hidden_size, eps=epsilon)
        self.queries = nn.Parameter(torch.randn(1, tokens, config.hidden_size) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        self.projection = nn.Linear(config.hidden_size, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(len(features), -1, -1)
        output = self.qformer(query_embeds=queries, encoder_hidden_states=self.norm(features))
        embeddings: torch.Tensor = self.projection(output.last_hidden_state)
        return embeddings


def new_config(layers: int, hidden: int, heads: int, dropout: float, width: int) -> Blip2QFormerConfig:
    """A Q-Former with ``hidden`` channels for features of ``width`` Dv."""
    return Blip2QFormerConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        encoder_hidden_size=width,
        **_dropout(dropout),
    )


def pretrained_config(folder: Path) -> Blip2Config:
    """The configuration of the BLIP-2 model in ``folder``; raises ModelError if there is none."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("model_type") != Blip2Config.model_type:
            raise ModelError(f"{path} is not the configuration of a BLIP-2 model", hint="set `connector.model`")
        return Blip2Config.from_dict(values)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{path}: {error}", hint="set `connector.model` to the folder of a BLIP-2 model, or leave it out"
        ) from error


def pretrained(folder: Path, dropout: float, width: int, out: int) -> QFormer:
    """The Q-Former, queries and ``ln_vision`` of the BLIP-2 model in ``folder``, with a new projection to ``out``.

    Raises:
        ModelError: weights are missing, or their model was trained for features of another width than ``width``.
    """
    config = pretrained_config(folder)
    values = {**config.qformer_config.to_dict(), **_dropout(dropout), "use_qformer_text_input": False}
    qformer = Blip2QFormerConfig.from_dict(values)
    if qformer.encoder_hidden_size != width:
        raise ModelError(
            f"{folder}: its Q-Former needs features of width {qformer.encoder_hidden_size}, not {width}",
            hint="use the vision encoder of that model, or leave out `connector.model`",
        )
    module = QFormer(config.num_query_tokens, qformer, out, config.vision_config.layer_norm_eps)
    names = {name: _name_in_blip2(name) for name in module.state_dict() if not name.startswith("projection.")}
    weights = _weights(folder, set(names.values()))
    expected = module.state_dict()
    for name, source in names.items():
        if source not in weights or weights[source].shape != expected[name].shape:
            raise ModelError(f"{folder}: {source} is missing or has another shape than {tuple(expected[name].shape)}")
    module.load_state_dict({name: weights[source] for name, source in names.items()}, strict=False)
    return module


def _dropout(rate: float) -> dict[str, Any]:
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def _name_in_blip2(name: str) -> str:
    """The name of a weight of ``QFormer`` in a checkpoint of BLIP-2."""
    if name == "queries":
        return "query_tokens"
    return f"vision_model.post_layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name


def _weights(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """The tensors ``names`` in the safetensors files of ``folder``, as far as they exist."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: file.get_tensor(name) for name in names.intersection(file.keys())})
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {error}", hint="copy the file again") from error
    return found
