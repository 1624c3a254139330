"""DINOv2 ViT-S/14 out of an ONNX graph, as the folder that ``Dinov2Model.from_pretrained`` reads.

The graph was exported from transformers' own ``Dinov2Model`` with a decoder on top. Most weights kept
their module's name. The exporter renamed those it had transposed or cut in two (``onnx::MatMul_1966``):
these are named after the node that uses them.
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
    # A parameter of DINOv2's training that the exported graph never touches.
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
    "image_mean": [0.485, 0.456, 0.406],  # ImageNet's, which both DINOv2 and the wheel's own detector use
    "image_std": [0.229, 0.224, 0.225],
}


def write(source: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json of the ONNX file ``source``."""
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    state = state_dict(onnx.load(source))
    state[POSITIONS] = resized(state[POSITIONS], CONFIG["image_size"] // CONFIG["patch_size"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(**CONFIG).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", encoding="utf-8")


def state_dict(model: ModelProto) -> dict[str, Array]:
    """The backbone's weights by the names that DINOv2 checkpoints carry on the hub; the decoder's are left out."""
    import numpy as np
    from onnx import numpy_helper

    initial = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = {name.removeprefix("backbone."): array for name, array in initial.items() if name.startswith("backbone.")}
    positions: dict[str, Any] = {}
    for node, anonymous in _anonymous(model):
        if node.op_type == "MatMul":
            # x @ W in the graph is Linear with weight Wᵀ [out, in].
            state[_key(node)] = initial[anonymous].T
        else:
            positions[node.op_type] = initial[anonymous]
    # Class token [1, 1, 384] is joined to the (interpolated) patch grid [1, 37·37, 384].
    state[POSITIONS] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return {key: np.ascontiguousarray(array) for key, array in state.items()}


def resized(positions: Array, side: int) -> Array:
    """Position embeddings [1, 1 + h·h, Dv] for a grid of ``side`` × ``side`` patches; the class token's is kept.

    The same bicubic resampling as in the graph and in transformers, which would do it anew for every batch.
    """
    import numpy as np
    import torch

    first, grid = positions[:, :1], torch.from_numpy(positions[:, 1:].copy())
    before = round(grid.shape[1] ** 0.5)
    channels = grid.view(1, before, before, -1).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(channels, size=(side, side), mode="bicubic", align_corners=False)
    return np.concatenate([first, scaled.flatten(2).transpose(1, 2).numpy()], axis=1)


def _anonymous(model: ModelProto) -> Iterator[tuple[NodeProto, str]]:
    """The backbone's nodes that use a weight which lost its name, with that weight."""
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input:
            if name in known and name.startswith("onnx::") and node.name.startswith("/backbone/"):
                yield node, name


def _key(node: NodeProto) -> str:
    """``/backbone/encoder/layer.0/mlp/fc1/MatMul`` → ``encoder.layer.0.mlp.fc1.weight``."""
    module: str = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
    return module.replace("/", ".") + ".weight"
