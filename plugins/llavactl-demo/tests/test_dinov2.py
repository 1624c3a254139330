"""The converted encoder has the hidden states of the ONNX graph and loads without missing weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from llavactl_demo.dinov2 import state_dict
from llavactl_demo.weights import VISION
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Model

# The graph's names of hidden_states[0], [1] … [12] and last_hidden_state in transformers.
NODES = [
    "/backbone/embeddings/Add_output_0",
    *(f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in range(12)),
    "/backbone/layernorm/Add_1_output_0",
]


@pytest.fixture(scope="module")
def model(vision: Path) -> Dinov2Model:
    model, report = Dinov2Model.from_pretrained(vision, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def graph(vision: Path):
    """The ONNX model with all hidden states as outputs: pixels [I, 3, 224, 224] to 14 × [I, 257, 384]."""
    runtime = pytest.importorskip("onnxruntime")
    exposed = onnx.load(VISION.path())
    exposed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in NODES)
    session = runtime.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(NODES, {"input_image": pixels.numpy()})


def assert_equal_states(model: Dinov2Model, graph, pixels: torch.Tensor) -> None:
    """Every layer is equal within 2e-5 of its largest value; measured: 3e-6."""
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    states = [*output.hidden_states, output.last_hidden_state]
    references = graph(pixels)
    assert len(states) == len(references) == 14
    for name, state, reference in zip(NODES, states, references, strict=True):
        assert np.abs(state.numpy() - reference).max() < 2e-5 * np.abs(reference).max(), name
    # The default layer, by its negative index.
    np.testing.assert_allclose(output.hidden_states[-3], references[10], atol=2e-5 * np.abs(references[10]).max())


def test_random_pixels(model: Dinov2Model, graph):
    assert_equal_states(model, graph, torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))


def test_real_photos(model: Dinov2Model, graph, vision: Path, photos: list[Path]):
    processor = AutoImageProcessor.from_pretrained(vision)
    images = [Image.open(photo).convert("RGB") for photo in photos]
    assert_equal_states(model, graph, processor(images, return_tensors="pt").pixel_values)


def test_all_weights_are_finite(model: Dinov2Model):
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == 21_628_800


def test_the_processor_normalizes_with_imagenet_statistics(vision: Path):
    """An image of one color [320×240] becomes (color / 255 - mean) / std of ImageNet at 224×224."""
    processor = AutoImageProcessor.from_pretrained(vision)
    pixels = processor(Image.new("RGB", (320, 240), (255, 128, 0)), return_tensors="pt").pixel_values
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(1, 3, 224, 224), atol=1e-5, rtol=0)


def test_renamed_weights_are_named_after_their_nodes():
    """A graph as the exporter writes it, with two matrices of the same shape in another order; needs no wheel."""
    fc1, fc2 = np.arange(6, dtype=np.float32).reshape(2, 3), -np.arange(6, dtype=np.float32).reshape(2, 3)
    cls, grid = np.full((1, 1, 2), 7, np.float32), np.full((1, 4, 2), 8, np.float32)
    tensors = {"onnx::MatMul_9": fc1, "onnx::MatMul_8": fc2, "onnx::Concat_1": cls, "onnx::Reshape_2": grid}
    tensors |= {"backbone.layernorm.bias": fc1[0], "decoder.bn1.bias": fc1[0]}
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_9"], ["a"], "/backbone/encoder/layer.0/mlp/fc1/MatMul"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_8"], ["b"], "/backbone/encoder/layer.0/mlp/fc2/MatMul"),
        helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["c"], "/backbone/embeddings/Reshape_1"),
        helper.make_node("Concat", ["onnx::Concat_1", "c"], ["d"], "/backbone/embeddings/Concat_6", axis=1),
    ]
    initial = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    state = state_dict(helper.make_model(helper.make_graph(nodes, "toy", [], [], initial)))
    assert state.keys() == {
        "layernorm.bias",
        "encoder.layer.0.mlp.fc1.weight",
        "encoder.layer.0.mlp.fc2.weight",
        "embeddings.position_embeddings",
    }
    np.testing.assert_array_equal(state["encoder.layer.0.mlp.fc1.weight"], fc1.T)
    np.testing.assert_array_equal(state["encoder.layer.0.mlp.fc2.weight"], fc2.T)
    np.testing.assert_array_equal(state["embeddings.position_embeddings"][0, :, 0], [7, 8, 8, 8, 8])
