"""Packed rows give the loss and every gradient that plain forwards of transformers give, a conversation at a time."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, FeatureShape, ImageRef, Sample, Turn
from llavactl.data.encode import Encoding
from llavactl.data.micro_batches import Partition, packed_micro_batches, padded_micro_batches
from llavactl.data.packing import MicroBatchLimits
from llavactl.data.training_set import TrainingSet
from llavactl.images.image_file import ImageFile
from llavactl.model import loss
from llavactl.model.build import build
from llavactl.model.cpu.rms_norm import fused_rms_norms
from llavactl.model.inputs import token_count
from llavactl.model.last_layer import INDEX_MULTIPLE, padded_indices
from llavactl.model.llava import LlavaModel
from llavactl.model.packed import packed_attention, packing_blocker
from llavactl.model.quantized import quantize

SHAPE = FeatureShape((2, 2), 32)
TOLERANCE = 1e-5
REAL = Path(__file__).parents[3] / "shared/data/llava/llava_instruct_100.json"


class Features:
    """Numbers that hang on the image alone."""

    def stored(self, image: ImageRef) -> tuple[np.ndarray]:
        seed = sum(image.name.encode())
        return (np.random.default_rng(seed).standard_normal((SHAPE.patches, SHAPE.width)).astype(np.float32),)


def photo(name: str) -> ImageFile:
    return ImageFile("/photos", name)


def sample(name: str, *turns: tuple[Any, ...]) -> Sample:
    roles = ("user", "assistant")
    return Sample(name, tuple(Turn(roles[at % 2], content) for at, content in enumerate(turns)))


def asked(name: str, image: str, question: str = "What is it?", answer: str = "A dog.") -> Sample:
    return sample(name, (photo(image), "\n", question), (answer,))


TEXT = sample("text", ("Say something.",), ("Something, said at some length.",))
LATE = sample("late", ("Hello.",), ("Good day.",), ("And this?", "\n", photo("late.jpg")), ("A late picture.",))
TWO = sample("two", (photo("a.jpg"), photo("b.jpg"), "\nCompare."), ("One is red, one is blue.",))
TEN = sample(
    "ten",
    (photo("ten.jpg"), "\n", "First?"),
    ("The first.",),
    *(part for at in range(9) for part in ((f"Question {at}, and what of it?",), (f"Answer {at}.",))),
)
DIFFERENT = [asked(f"s{at}", f"{at}.jpg", "Why? " * (at + 1), "Because. " * (5 - at)) for at in range(5)]
ALIKE = [asked(f"{image}{at}", image, f"Question {at}?", "Yes. " * at) for image in "xy" for at in range(1, 5)]

CASES = {
    "different images": DIFFERENT,
    "shared images": ALIKE,
    "shared, and alone, and text": [ALIKE[0], TEXT, ALIKE[4], DIFFERENT[0], ALIKE[1], ALIKE[5], TEXT],
    "an image in the last turn": [LATE, DIFFERENT[1], LATE],
    "ten turns": [TEN, ALIKE[0], TEN],
    "two images": [TWO, asked("a", "a.jpg"), TWO],
    "text alone": [TEXT, TEXT],
}


@dataclass(frozen=True)
class Setting:
    """``samples`` under ``template`` and ``order``, cut to ``length``."""

    samples: Sequence[Sample]
    template: str = "vicuna-v1"
    order: Any = "first"
    length: int = 2048

    def data(self, tokenizer: Any) -> TrainingSet:
        template = registry().create("templates", {"name": self.template})
        encoding = Encoding(template, tokenizer, SHAPE.patches, self.length)
        count = len(self.samples)
        return TrainingSet(self.samples, [1.0] * count, [1] * count, encoding, Features(), self.order, 0)


@pytest.fixture(scope="module")
def parts(toys: Path) -> Any:
    return build({"name": "mlp2x-gelu"}, {"name": "hf", "model": str(toys / "language")}, SHAPE, dtype="float32")


def plain(model: LlavaModel, item: Encoded) -> torch.Tensor:
    """The summed loss of one conversation by transformers alone: all logits, no row but its own, no trick."""
    table = model.language.get_input_embeddings()
    pieces, images = [], iter(item.images)
    at = 0
    while at < len(item):
        if item.ids[at] == IMAGE_TOKEN:
            pieces.append(model.connector(torch.from_numpy(Features().stored(next(images))[0])[None])[0])
            at += SHAPE.patches
        else:
            pieces.append(table(torch.tensor([item.ids[at]])))
            at += 1
    logits = model.language(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits[:-1], torch.tensor(item.labels[1:]), ignore_index=IGNORE, reduction="sum")


def gradients(model: LlavaModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp(min=1e-12))


def compare(
    model: LlavaModel, setting: Setting, tokenizer: Any, limits: MicroBatchLimits | None = None, *, packed: bool = True
) -> list[Any]:
    """Asserts that both ways agree on ``setting``; returns the batches that ours was made of."""
    data = setting.data(tokenizer)
    members = [(0, index) for index in range(len(data))]
    theirs = copy.deepcopy(model).train()
    expected = sum(plain(theirs, data.encoded(*member)) for member in members)
    expected.backward()
    ours = copy.deepcopy(model).train()
    batches = (packed_micro_batches if packed else padded_micro_batches)(
        data, members, Partition(limits or MicroBatchLimits(len(members)))
    )
    total = torch.zeros(())
    with packed_attention(ours.language) if packed else nullcontext(), fused_rms_norms(ours.language):
        for batch in batches:
            part = ours(batch)
            part.backward()
            total += part.detach()
    assert difference(total, expected) < TOLERANCE
    wanted, found = gradients(theirs), gradients(ours)
    assert wanted.keys() - found.keys() == set()
    for name, gradient in found.items():
        assert difference(gradient, wanted[name]) < TOLERANCE, name
    return batches


@pytest.mark.parametrize("samples", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("template", ["vicuna-v1", "chatml", "plain"])
def test_one_row_is_plain_forwards(parts: Any, samples: list[Sample], template: str) -> None:
    compare(parts.model, Setting(samples, template), parts.tokenizer)


@pytest.mark.parametrize("order", ["random", "as-data"])
def test_whatever_the_order(parts: Any, order: str) -> None:
    mixed = [*ALIKE, *DIFFERENT, TEXT, LATE]
    batches = compare(parts.model, Setting(mixed, order=order), parts.tokenizer)
    assert any(span.after is not None for span in batches[0].spans)


@pytest.mark.parametrize("limits", [MicroBatchLimits(1), MicroBatchLimits(3), MicroBatchLimits(8, 200)], ids=str)
def test_several_rows_add_up(parts: Any, limits: MicroBatchLimits) -> None:
    compare(parts.model, Setting([*ALIKE, TEXT], length=400), parts.tokenizer, limits)


@pytest.mark.parametrize("length", [90, 130])
def test_cut_samples(parts: Any, length: int) -> None:
    setting = Setting([TEN, *ALIKE, *DIFFERENT], length=length)
    items = [setting.data(parts.tokenizer).encoded(0, index) for index in range(len(setting.samples))]
    assert max(map(len, items)) == length
    compare(parts.model, setting, parts.tokenizer)


def test_spans_longer_than_matrix_products_are_for(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.model.cpu.block_attention.MAX_PRODUCT_QUERIES", 20)
    compare(parts.model, Setting([*ALIKE, TEN, TEXT]), parts.tokenizer)


@pytest.mark.parametrize("crowd", [1, 60])
def test_spans_too_many_for_one_block(parts: Any, monkeypatch: pytest.MonkeyPatch, crowd: int) -> None:
    monkeypatch.setattr("llavactl.model.cpu.block_attention.MAX_BLOCK_TOKENS", crowd)
    compare(parts.model, Setting([*ALIKE, *ALIKE, TEN, TEXT]), parts.tokenizer)


def test_logits_in_chunks(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    compare(parts.model, Setting([*ALIKE, TEN, TEXT]), parts.tokenizer)


@pytest.mark.parametrize("samples", CASES.values(), ids=CASES.keys())
def test_padded_rows_are_plain_forwards(parts: Any, samples: list[Sample]) -> None:
    compare(parts.model, Setting(samples), parts.tokenizer, packed=False)


def checkpointed(model: LlavaModel) -> LlavaModel:
    model = copy.deepcopy(model)
    enable = getattr(model.language, "activation_checkpointing_enable", None)
    (enable or model.language.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def adapted(model: LlavaModel) -> LlavaModel:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model).requires_grad_(False)
    model.connector.requires_grad_(True)
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    model.language = get_peft_model(model.language, config)
    return model


def frozen(model: LlavaModel) -> LlavaModel:
    """As in stage 1."""
    model = copy.deepcopy(model)
    model.language.requires_grad_(False)
    return model


def quantized(model: LlavaModel) -> LlavaModel:
    pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(model)
    quantize(model.language)
    return adapted(model)


WAYS: dict[str, Callable[[LlavaModel], LlavaModel]] = {
    "checkpointing": checkpointed,
    "adapters": adapted,
    "adapters and checkpointing": lambda model: checkpointed(adapted(model)),
    "adapters on four bits": quantized,
    "adapters on four bits and checkpointing": lambda model: checkpointed(quantized(model)),
    "connector alone": frozen,
    "connector alone and checkpointing": lambda model: checkpointed(frozen(model)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("limits", [None, MicroBatchLimits(4, 300)], ids=["a row", "rows"])
def test_ways_to_train(parts: Any, way: Callable[[LlavaModel], LlavaModel], limits: MicroBatchLimits | None) -> None:
    mixed = [*ALIKE, TEN, TEXT, LATE, TWO, *DIFFERENT]
    model = way(parts.model)
    batches = compare(model, Setting(mixed, order="random", length=130), parts.tokenizer, limits)
    assert any(span.after is not None for batch in batches for span in batch.spans)
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad) == ("lora" in str(model))


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture(parts: Any, seed: int) -> None:
    chance = random.Random(seed)
    mixed = chance.choices([*ALIKE, *DIFFERENT, TEN, TEXT, LATE, TWO], k=12)
    setting = Setting(mixed, order=chance.choice(["first", "random", "as-data"]), length=chance.randint(70, 300))
    compare(
        parts.model, setting, parts.tokenizer, MicroBatchLimits(chance.randint(2, 12), chance.choice([None, 150, 400]))
    )


@pytest.mark.skipif(not REAL.is_file(), reason="no real records here")
def test_real_records(parts: Any) -> None:
    records = list(registry().create("sources", {"name": "llava-json", "path": str(REAL), "images": str(REAL.parent)}))
    setting = Setting(records[:6], order="as-data", length=700)
    data = setting.data(parts.tokenizer)
    assert len({len(data.encoded(0, index)) for index in range(6)}) > 3, "lengths as they come"
    compare(parts.model, setting, parts.tokenizer)


def test_the_last_layer_looks_where_something_is_predicted(parts: Any) -> None:
    model = copy.deepcopy(parts.model)
    layers, rows = model.language.model.layers, {}

    def counted(forward: Any, at: Any) -> Any:
        return lambda given: (rows.update({at: given.shape[:-1].numel()}), forward(given))[1]

    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"):
        for layer in (0, -1):
            part = layers[layer].get_submodule(name)
            part.forward = counted(part.forward, (layer, name))
    data = Setting([*ALIKE, TEXT]).data(parts.tokenizer)
    (batch,) = packed_micro_batches(data, [(0, index) for index in range(len(data))], Partition(MicroBatchLimits(9)))
    with packed_attention(model.language):
        model(batch)
    places, _ = loss.predictions(batch)
    predicting = len(padded_indices(places, batch.ids.shape[1]))
    assert predicting < len(places.unique()) + INDEX_MULTIPLE
    assert predicting < batch.ids.shape[1] / 2
    assert len(rows) == 8
    for (layer, name), count in rows.items():
        narrow = layer == -1 and name != "self_attn.k_proj"
        assert count == (predicting if narrow else batch.ids.shape[1]), name
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (layers[-1].mlp, layers[-1].self_attn))


@pytest.mark.parametrize(("places", "length"), [([], 40), ([3, 3, 39], 40), ([*range(20)], 24), ([*range(33)], 90)])
def test_places_are_filled_up(places: list[int], length: int) -> None:
    found = padded_indices(torch.tensor(places, dtype=torch.long), length).tolist()
    assert found == sorted(set(found))
    assert set(places) <= set(found) <= set(range(length))
    assert len(found) in (length, math.ceil(len(set(places)) / INDEX_MULTIPLE) * INDEX_MULTIPLE)


def toy(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, head_dim=12, vocab_size=400, **more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(
    ("kind", "more"), [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {})]
)
def test_every_model_type_that_is_packed(parts: Any, kind: str, more: dict[str, Any]) -> None:
    model = LlavaModel(copy.deepcopy(parts.model.connector), toy(kind, **more))
    assert packing_blocker(model.language) == ""
    compare(model, Setting([*ALIKE, TEN, TEXT]), parts.tokenizer)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("mistral", {"sliding_window": 32}, "window: 32"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "window: 32"),
        ("gemma2", {}, "gemma2"),
        ("llama", {"attention_dropout": 0.1}, "dropout"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_models_that_are_not_packed_say_why(kind: str, more: dict[str, Any], why: str) -> None:
    assert why in packing_blocker(toy(kind, **more))


def test_an_image_of_many_conversations_is_in_the_row_once(parts: Any) -> None:
    (batch,) = compare(parts.model, Setting(ALIKE), parts.tokenizer)
    assert batch.features.shape[0] == 2
    assert int((batch.ids == IMAGE_TOKEN).sum()) == 2 * SHAPE.patches
    data = Setting(ALIKE).data(parts.tokenizer)
    assert token_count(batch) == sum(len(data.encoded(0, index)) for index in range(len(data)))
    assert batch.ids.shape[1] < token_count(batch)


def test_attention_is_as_before_after_a_run(parts: Any) -> None:
    before = parts.model.language.config._attn_implementation
    with pytest.raises(KeyError), packed_attention(parts.model.language):
        raise KeyError
    assert parts.model.language.config._attn_implementation == before
