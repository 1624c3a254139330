"""Perceiver resampler and Q-Former, compared with transformers; the weights of a BLIP-2 model."""

from pathlib import Path

import pytest
import torch
from llavactl_connectors import components
from llavactl_connectors.flamingo import PerceiverResampler
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from llavactl import FeatureShape, ModelError

WIDTH = 20


def test_the_perceiver_resampler_is_that_of_idefics():
    """Idefics reimplements Flamingo's, with ReLU instead of GELU and without the projection."""
    config = IdeficsConfig(vision_config={"embed_dim": 16})
    other = IdeficsPerceiverResampler(config, 16, 2, 2, 4, 5)
    with torch.no_grad():
        for weight in other.parameters():
            weight.normal_(std=0.5)
    module = PerceiverResampler(16, 5, 2, 2, 4, WIDTH)
    weights = {f"norm.{name}": value for name, value in other.layer_norm.state_dict().items()}
    for index, (attention, mlp) in enumerate(other.blocks):
        mine = f"attention.{index}."
        weights |= {
            f"{mine}feature_norm.{name}": value for name, value in attention.context_layer_norm.state_dict().items()
        }
        weights |= {
            f"{mine}latent_norm.{name}": value for name, value in attention.latents_layer_norm.state_dict().items()
        }
        weights[f"{mine}query.weight"] = attention.q_proj.weight
        weights[f"{mine}key_value.weight"] = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        weights[f"{mine}output.weight"] = attention.output_proj.weight
        mine = f"feed_forward.{index}."
        weights |= {f"{mine}0.{name}": value for name, value in mlp.ln.state_dict().items()}
        weights |= {f"{mine}1.weight": mlp.fc.weight, f"{mine}3.weight": mlp.c_proj.weight}
    projection = {f"projection.{name}": value for name, value in module.projection.state_dict().items()}
    module.load_state_dict({"latents": other.latents, **weights, **projection})
    for layers in module.feed_forward:
        layers[2] = nn.ReLU()
    features = torch.randn(3, 24, 16)
    torch.testing.assert_close(module(features), module.projection(other(features)), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP-2 model with random weights and vision features of width 16."""
    torch.manual_seed(0)
    config = Blip2Config(
        num_query_tokens=7,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "encoder_hidden_size": 16,
        },
        text_config={
            "model_type": "opt",
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 100,
        },
    )
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("blip2")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_the_weights_of_a_blip2_model_are_loaded(blip2: Path):
    connector = components.QFormer(components.QFormerOptions(model=str(blip2)))
    shape = FeatureShape((2, 2), 16, prefix=1)
    assert connector.tokens(shape) == 7
    module = connector.build(shape, WIDTH).eval()
    other = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        vision = other.vision_model(pixels, output_hidden_states=True)
        outputs = other.qformer(
            query_embeds=other.query_tokens.expand(2, -1, -1), encoder_hidden_states=vision.last_hidden_state
        )
        expected = module.projection(outputs.last_hidden_state)
    torch.testing.assert_close(module(vision.hidden_states[-1]), expected, rtol=1e-4, atol=1e-5)
    assert not any("dropout" in name for name in module.state_dict())


def test_features_of_another_width_are_refused(blip2: Path):
    connector = components.QFormer(components.QFormerOptions(model=str(blip2)))
    with pytest.raises(ModelError, match="width 16"):
        connector.build(FeatureShape((2, 2), 24), WIDTH)


@pytest.mark.parametrize("damage", ["none", "another", "broken", "no-weights", "weight", "shape", "file"])
def test_a_damaged_model_folder_is_an_error_of_one_line(blip2: Path, tmp_path: Path, damage: str):
    folder = tmp_path / "model"
    folder.mkdir()
    if damage != "none":
        text = (blip2 / "config.json").read_text(encoding="utf-8")
        text = {"another": '{"model_type": "clip"}', "broken": text[:40]}.get(damage, text)
        (folder / "config.json").write_text(text, encoding="utf-8")
    if damage in ("weight", "shape", "file"):
        weights = {name: value for path in blip2.glob("*.safetensors") for name, value in load_file(path).items()}
        if damage == "weight":
            del weights["query_tokens"]
        if damage == "shape":
            weights["query_tokens"] = weights["query_tokens"][:, 1:].contiguous()
        save_file(weights, folder / "model.safetensors")
        if damage == "file":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    connector = components.QFormer(components.QFormerOptions(model=str(folder)))
    with pytest.raises(ModelError) as error:
        connector.build(FeatureShape((2, 2), 16), WIDTH)
    assert str(folder) in error.value.message
    assert "\n" not in error.value.message


def test_sizes_and_a_model_exclude_each_other(blip2: Path):
    with pytest.raises(ValueError, match="layers"):
        components.QFormerOptions(model=str(blip2), layers=6)
    with pytest.raises(ValueError, match="multiple"):
        components.QFormerOptions(hidden=100, heads=12)
    assert components.QFormerOptions(model=str(blip2), dropout=0.1).dropout == 0.1


def test_dropout_is_an_option(shape: FeatureShape):
    values = {"tokens": 3, "layers": 2, "hidden": 24, "heads": 4}
    features = torch.randn(1, shape.patches, shape.width)
    for rate in (0.0, 0.5):
        module = components.QFormer(components.QFormerOptions(**values, dropout=rate)).build(shape, WIDTH)
        module.train()
        assert torch.equal(module(features), module(features)) is (rate == 0)
        module.eval()
        assert torch.equal(module(features), module(features))
