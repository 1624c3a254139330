"""Image embeddings in llama.cpp are those of llavactl."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from llavactl import ModelError
from llavactl.testing import toy_clip

from .conftest import Toys, difference, embeddings, llama, logits, siglip, square

PROMPT = "USER: <image>\nWhat? ASSISTANT:"


def image_embeddings(export: Path, size: int = 56) -> torch.Tensor:
    """The embeddings of ``square`` in llama.cpp."""
    (found,) = (chunk for chunk in llama(export).chunks(PROMPT, [square(size)]) if not isinstance(chunk, list))
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("connector", "options"),
    [
        ("mlp2x-gelu", {}),
        ("linear", {}),
        ("linear", {"layer": 1}),
        ("mlp2x-gelu", {"layer": -1}),
        ("mlp2x-gelu", {"layer": [-1, 1]}),
        ("mlp2x-gelu", {"select": "cls-patch"}),
    ],
)
def test_siglip(toys: Toys, connector: str, options: dict[str, Any]) -> None:
    """The largest difference is that of GELU, which llama.cpp rounds to float16."""
    model = toys.model(connector={"name": connector}, **options)
    actual, expected = image_embeddings(toys.export(model)), embeddings(model, square())
    assert cosine_similarity(actual, expected, dim=-1).min() > 1 - 2e-6
    assert difference(actual, expected) < 2e-3


@pytest.mark.parametrize("connector", ["mlp2x-gelu", "linear"])
def test_clip(toys: Toys, connector: str) -> None:
    """llama.cpp gives the patches from the second on, and the class token as the last."""
    model = toys.model(vision="clip", connector={"name": connector})
    actual, expected = image_embeddings(toys.export(model)), embeddings(model, square())
    assert cosine_similarity(actual[:-1], expected[1:], dim=-1).min() > 1 - 2e-6
    assert difference(actual[:-1], expected[1:]) < 2e-3
    assert cosine_similarity(actual[-1:], expected[:1]).item() < 0.9
    # The same file for builds with the class token first is wrong here: each patch has the position of the next one.
    wrong = image_embeddings(toys.export(model, for_build="cls-first"))
    assert cosine_similarity(wrong[:-1], expected[1:], dim=-1).min() < 1 - 1e-4


def test_for_build_changes_positions_only(toys: Toys) -> None:
    model = toys.model(vision="clip")
    last, first = (
        {
            tensor.name: tensor.data
            for tensor in GGUFReader(toys.export(model, for_build=build) / "mmproj-f32.gguf").tensors
        }
        for build in ("cls-last", "cls-first")
    )
    assert {name for name in first if (first[name] != last[name]).any()} == {"v.position_embd.weight"}
    positions = first["v.position_embd.weight"]
    assert (last["v.position_embd.weight"] == [*positions[1:], positions[0]]).all()


def test_the_activation_of_the_encoder(toys: Toys, tmp_path: Path) -> None:
    for activation in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        folder = siglip(tmp_path / activation, size=56, hidden_act=activation)
        model = toys.model(vision=folder)
        assert difference(image_embeddings(toys.export(model)), embeddings(model, square())) < 2e-3


@pytest.mark.parametrize(("kind", "smallest"), [("f16", 1 - 1e-5), ("bf16", 1 - 1e-3), ("q8_0", 1 - 2e-3)])
def test_types(toys: Toys, kind: str, smallest: float) -> None:
    model = toys.model()
    export = toys.export(model, mmproj_type=kind)
    assert (export / f"mmproj-{kind}.gguf").is_file()
    assert cosine_similarity(image_embeddings(export), embeddings(model, square()), dim=-1).min() > smallest


def test_the_language_model_reads_the_embeddings(toys: Toys) -> None:
    model = toys.model()
    images = [square(seed=1), square(seed=2)]
    outputs = llama(toys.export(model)).run("USER: <image>\n<image>\nWhich? ASSISTANT:", images, 3)
    assert outputs["embeddings"].shape == (2, 16, 64)
    given = torch.from_numpy(outputs["embeddings"]).flatten(0, 1)
    expected = logits(model, outputs["ids"].tolist(), given)
    assert difference(outputs["logits"], expected[torch.from_numpy(outputs["ids"]) >= 0]) < 1e-5
    assert outputs["said"][0] == expected[-1].argmax()


def test_a_prompt_that_ends_with_an_image(toys: Toys) -> None:
    model = toys.model()
    outputs = llama(toys.export(model)).run("USER: <image>", [square()], 1)
    given = torch.from_numpy(outputs["embeddings"])[0]
    expected = logits(model, outputs["ids"].tolist(), given)
    assert outputs["ids"][-1] < 0
    assert outputs["said"][0] == expected[-1].argmax()


def test_images_are_encoded_unchanged(toys: Toys) -> None:
    """llama.cpp pads, but doesn't crop: a wide image keeps the content of its ends."""
    program = llama(toys.export(toys.model()))
    wide = Image.new("RGB", (168, 56))
    ends = wide.copy()
    ends.paste((255, 255, 255), (0, 0, 30, 56))
    one, other = program.embeddings([wide, ends])
    assert one.shape == (16, 64)
    assert np.abs(one - other).max() > 1e-3


def dinov2(folder: Path) -> Path:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**settings)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"connector": {"name": "mlp2x-gelu", "pixel_shuffle": 2}}, "pixel_shuffle: 2"),
        ({"connector": {"name": "mlp2x-gelu", "norm": True}}, "norm: True"),
        ({"vision": "clip", "select": "cls-patch"}, "cls-patch"),
        ({"layer": 0}, "layer 0"),
        ({"vision": dinov2}, "dinov2"),
        ({"vision": lambda folder: siglip(folder, hidden_act="relu")}, "relu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_lacks_is_refused(toys: Toys, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    if callable(make := options.get("vision")):
        options = {**options, "vision": make(tmp_path / "vision")}
    with pytest.raises(ModelError, match=named):
        toys.export(toys.model(**options))
    assert not list(tmp_path.glob("model-*-export-*/*"))


def test_images_of_another_size_are_refused(toys: Toys, tmp_path: Path) -> None:
    folder = toy_clip(tmp_path / "clip", size=28)
    config = folder / "preprocessor_config.json"
    config.write_text(config.read_text().replace("28", "42"))
    with pytest.raises(ModelError, match="28"):
        toys.export(toys.model(vision=folder))
