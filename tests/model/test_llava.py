"""LlavaModel equals transformers' LlavaForConditionalGeneration with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from llavactl.core.errors import ModelError
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Batch, FeatureShape
from llavactl.model.build import ModelBundle, build
from llavactl.model.generate import Sampling, generate, next_tokens

SHAPE = FeatureShape((2, 2), 32)


@pytest.fixture
def bundle(toys: Path) -> ModelBundle:
    built = build({"name": "mlp2x-gelu"}, {"name": "hf", "model": str(toys / "language")}, SHAPE, dtype="float32")
    built.model.eval()
    return built


def hugging_face(bundle: ModelBundle, clip: Path) -> nn.Module:
    """LlavaForConditionalGeneration with the same weights."""
    from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

    tower, language = CLIPVisionModel.from_pretrained(clip), bundle.model.language
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=len(bundle.tokenizer) - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.model.language_model.load_state_dict(language.model.state_dict())
    llava.lm_head.load_state_dict(language.lm_head.state_dict())
    projector = llava.model.multi_modal_projector
    projector.linear_1.load_state_dict(bundle.model.connector[0].state_dict())
    projector.linear_2.load_state_dict(bundle.model.connector[2].state_dict())
    return llava


def batch_of(rows: list[list[int]], features: torch.Tensor | None, side: str = "right") -> Batch:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, at], mask[index, at] = torch.tensor(row), True
    labels = torch.where((ids == IMAGE_TOKEN) | ~mask, IGNORE, ids)
    return Batch(ids, mask, labels, features, tuple(f"row {i}" for i in range(len(rows))))


IMAGE = [IMAGE_TOKEN] * 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_transformers(bundle: ModelBundle, toys: Path, side: str) -> None:
    from llavactl.core.registry import registry

    llava = hugging_face(bundle, toys / "clip")
    encoder = registry().create("vision", {"name": "clip", "model": str(toys / "clip")}).load("cpu", "float32")
    pixels = torch.randn(3, 3, 28, 28)
    rows = [[0, *IMAGE, 40, 41, 42, *IMAGE, 50], [0, 60, 61, *IMAGE, 62], [0, 70, 71, 72]]
    batch = batch_of(rows, encoder.encode(pixels), side)
    with torch.no_grad():
        ours = bundle.model.logits(batch)
        theirs = llava(
            input_ids=batch.ids.masked_fill(batch.ids == IMAGE_TOKEN, llava.config.image_token_id),
            attention_mask=batch.mask.long(),
            position_ids=(batch.mask.long().cumsum(-1) - 1).clamp(min=0),
            pixel_values=pixels,
        ).logits
    assert (ours - theirs)[batch.mask].abs().max() < 1e-4


def test_the_loss_is_the_sum_over_conversations(bundle: ModelBundle) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 4, 32)
    rows = [[0, *IMAGE, 40, 41, 42], [0, 60, 61, *IMAGE, 62, 63, 64, 65]]
    batch = batch_of(rows, features)
    bundle.model(batch).backward()
    ours = {name: p.grad.clone() for name, p in bundle.model.named_parameters()}
    bundle.model.zero_grad()
    total = torch.zeros(())
    for index, row in enumerate(rows):
        single = batch_of([row], features[index : index + 1])
        logits = bundle.model.language(inputs_embeds=bundle.model.embed(single.ids, single.features)).logits[0, :-1]
        total = total + functional.cross_entropy(logits, single.labels[0, 1:], reduction="sum")
    total.backward()
    for name, parameter in bundle.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_image_tokens_and_features_must_match(bundle: ModelBundle) -> None:
    with pytest.raises(ModelError, match=r"3 image tokens.*connector.* 4"):
        bundle.model.logits(batch_of([[0, *IMAGE[:3], 40]], torch.randn(1, 4, 32)))


def answers(bundle: ModelBundle, batch: Batch, count: int = 12, **sampling: float) -> list[list[int | None]]:
    steps = list(generate(bundle.model, batch, Sampling(count, **sampling), stop={bundle.tokenizer.eos_token_id}))
    return [list(row) for row in zip(*steps, strict=True)]


def test_a_batch_generates_the_same_as_single_questions(bundle: ModelBundle) -> None:
    torch.manual_seed(1)
    features = torch.randn(2, 4, 32)
    rows = [[0, *IMAGE, 40, 41, 42, 43, 44], [0, *IMAGE, 62]]
    together = answers(bundle, batch_of(rows, features, "left"))
    for index, row in enumerate(rows):
        assert answers(bundle, batch_of([row], features[index : index + 1], "left"))[0] == together[index]


def test_greedy_decoding_equals_transformers(bundle: ModelBundle) -> None:
    batch = batch_of([[0, *IMAGE, 40, 41, 42]], torch.randn(1, 4, 32))
    embeds = bundle.model.embed(batch.ids, batch.features)
    theirs = bundle.model.language.generate(
        inputs_embeds=embeds, attention_mask=batch.mask.long(), max_new_tokens=12, do_sample=False, use_cache=True
    )[0].tolist()
    ours = [token for token in answers(bundle, batch)[0] if token is not None]
    assert ours == [token for token in theirs if token != bundle.tokenizer.eos_token_id]


def test_equal_probabilities_are_in_the_order_of_token_ids() -> None:
    """So rounding that only swaps equal logits, as it may in bfloat16, doesn't change a sampled answer."""
    logits = torch.zeros(1, 50_000).index_fill(1, torch.arange(40_000, 40_010), 9.0)
    sampling = Sampling(temperature=1.0, top_p=0.3)
    chosen = {int(next_tokens(logits, sampling, torch.Generator().manual_seed(seed))) for seed in range(50)}
    within = {40_000 + index for index in range(len(chosen))}
    assert chosen == within


def test_sampling_is_seeded_and_a_tiny_top_p_is_greedy(bundle: ModelBundle) -> None:
    batch = batch_of([[0, 40, 41, 42]], None)
    assert answers(bundle, batch, temperature=1.0, seed=3) == answers(bundle, batch, temperature=1.0, seed=3)
    assert answers(bundle, batch, temperature=1.0, seed=3) != answers(bundle, batch, temperature=1.0, seed=4)
    assert answers(bundle, batch, temperature=1.0, top_p=1e-6) == answers(bundle, batch)


def test_non_finite_logits_are_an_error(bundle: ModelBundle) -> None:
    with torch.no_grad():
        bundle.model.language.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        answers(bundle, batch_of([[0, 40, 41]], None))
