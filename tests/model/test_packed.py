"""Packed sequences have the loss and gradients of one forward pass of transformers per conversation."""

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
from llavactl.data.sample_set import SampleSet
from llavactl.images.image_file import ImageFile
from llavactl.model import loss
from llavactl.model.build import build
from llavactl.model.cpu.rms_norm import fused_rms_norms
from llavactl.model.cuda import varlen_attention
from llavactl.model.inputs import token_count
from llavactl.model.last_layer import INDEX_MULTIPLE, padded_indices
from llavactl.model.llava import LlavaModel
from llavactl.model.packed import packed_attention, packed_layout, packing_blocker
from llavactl.model.quantized import load_quantized

SHAPE = FeatureShape((2, 2), 32)
TOLERANCE = 1e-5
FIXTURE = Path(__file__).parents[1] / "fixtures/instruct.json"
REAL = Path(__file__).parents[3] / "shared/data/llava/llava_instruct_100.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")


class FeaturesFromName:
    """Random features that depend only on the image's name."""

    def arrays(self, image: ImageRef) -> tuple[np.ndarray]:
        seed = sum(image.name.encode())
        return (np.random.default_rng(seed).standard_normal((SHAPE.patches, SHAPE.width)).astype(np.float32),)


def photo(name: str) -> ImageFile:
    return ImageFile("/photos", name)


def sample(name: str, *turns: tuple[Any, ...]) -> Sample:
    roles = ("user", "assistant")
    return Sample(name, tuple(Turn(roles[at % 2], content) for at, content in enumerate(turns)))


def about(name: str, image: str, question: str = "What is it?", answer: str = "A dog.") -> Sample:
    return sample(name, (photo(image), "\n", question), (answer,))


TEXT = sample("text", ("Say something.",), ("Something, said at some length.",))
LATE = sample("late", ("Hello.",), ("Good day.",), ("And this?", "\n", photo("late.jpg")), ("A late picture.",))
TWO = sample("two", (photo("a.jpg"), photo("b.jpg"), "\nCompare."), ("One is red, one is blue.",))
TEN = sample(
    "ten",
    (photo("ten.jpg"), "\n", "First?"),
    ("The first.",),
    *(part for at in range(9) for part in ((f"Question {at}, and the next one?",), (f"Answer {at}.",))),
)
DIFFERENT_IMAGES = [about(f"s{at}", f"{at}.jpg", "Why? " * (at + 1), "Because. " * (5 - at)) for at in range(5)]
ALIKE = [about(f"{image}{at}", image, f"Question {at}?", "Yes. " * at) for image in "xy" for at in range(1, 5)]

CASES = {
    "different images": DIFFERENT_IMAGES,
    "shared images": ALIKE,
    "shared images, different images, text": [ALIKE[0], TEXT, ALIKE[4], DIFFERENT_IMAGES[0], ALIKE[1], ALIKE[5], TEXT],
    "an image in the last turn": [LATE, DIFFERENT_IMAGES[1], LATE],
    "ten turns": [TEN, ALIKE[0], TEN],
    "two images": [TWO, about("a", "a.jpg"), TWO],
    "text only": [TEXT, TEXT],
}


@dataclass(frozen=True)
class Setting:
    """``samples`` encoded with ``template`` and image ``order``, truncated to ``length``."""

    samples: Sequence[Sample]
    template: str = "vicuna-v1"
    order: Any = "first"
    length: int = 2048

    def data(self, tokenizer: Any) -> SampleSet:
        template = registry().create("templates", {"name": self.template})
        encoding = Encoding(template, tokenizer, SHAPE.patches, self.length)
        count = len(self.samples)
        return SampleSet(self.samples, [1.0] * count, [1] * count, encoding, FeaturesFromName(), self.order, 0)


@pytest.fixture(scope="module")
def bundle(toys: Path) -> Any:
    return build({"name": "mlp2x-gelu"}, {"name": "hf", "model": str(toys / "language")}, SHAPE, dtype="float32")


def reference_loss(model: LlavaModel, item: Encoded) -> torch.Tensor:
    """The summed loss of one conversation with all logits, by a plain forward pass of transformers."""
    table = model.language.get_input_embeddings()
    pieces, images = [], iter(item.images)
    at = 0
    while at < len(item):
        if item.ids[at] == IMAGE_TOKEN:
            pieces.append(model.connector(torch.from_numpy(FeaturesFromName().arrays(next(images))[0])[None])[0])
            at += SHAPE.patches
        else:
            pieces.append(table(torch.tensor([item.ids[at]])))
            at += 1
    logits = model.language(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits[:-1], torch.tensor(item.labels[1:]), ignore_index=IGNORE, reduction="sum")


def gradients(model: LlavaModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm().clamp(min=1e-12))


def compare(
    model: LlavaModel, setting: Setting, tokenizer: Any, limits: MicroBatchLimits | None = None, *, packed: bool = True
) -> list[Any]:
    """Asserts that loss and gradients equal the reference; returns the batches."""
    data = setting.data(tokenizer)
    indices = [(0, index) for index in range(len(data))]
    reference = copy.deepcopy(model).train()
    expected_loss = sum(reference_loss(reference, data.encoded(*index)) for index in indices)
    expected_loss.backward()
    tested = copy.deepcopy(model).train()
    partition = Partition(limits or MicroBatchLimits(len(indices)))
    batches = (packed_micro_batches if packed else padded_micro_batches)(data, indices, partition)
    total_loss = torch.zeros(())
    with packed_attention(tested.language) if packed else nullcontext(), fused_rms_norms(tested.language):
        for batch in batches:
            batch_loss = tested(batch)
            batch_loss.backward()
            total_loss += batch_loss.detach()
    assert relative_error(total_loss, expected_loss) < TOLERANCE
    expected, actual = gradients(reference), gradients(tested)
    assert expected.keys() - actual.keys() == set()
    for name, gradient in actual.items():
        assert relative_error(gradient, expected[name]) < TOLERANCE, name
    return batches


@pytest.mark.parametrize("samples", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("template", ["vicuna-v1", "chatml", "plain"])
def test_one_packed_sequence_equals_the_reference(bundle: Any, samples: list[Sample], template: str) -> None:
    compare(bundle.model, Setting(samples, template), bundle.tokenizer)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kernel_for_cuda_gets_the_right_arguments(
    bundle: Any, varlen_kernel: Any, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """And the index tensors are built once per batch, not in every layer or again in the backward pass."""
    layouts = []
    build_layout = varlen_attention.varlen_layout
    monkeypatch.setattr(
        varlen_attention, "varlen_layout", lambda *arguments: layouts.append(arguments) or build_layout(*arguments)
    )
    model = with_checkpointing(bundle.model) if checkpointing else bundle.model
    batches = compare(model, Setting([*ALIKE, *DIFFERENT_IMAGES, TEXT, LATE]), bundle.tokenizer)
    assert len(layouts) == len(batches)


@pytest.mark.parametrize("order", ["random", "as-data"])
def test_image_orders(bundle: Any, order: str) -> None:
    mixed = [*ALIKE, *DIFFERENT_IMAGES, TEXT, LATE]
    batches = compare(bundle.model, Setting(mixed, order=order), bundle.tokenizer)
    assert any(span.after is not None for span in batches[0].spans)


@pytest.mark.parametrize("limits", [MicroBatchLimits(1), MicroBatchLimits(3), MicroBatchLimits(8, 200)], ids=str)
def test_several_sequences_add_up(bundle: Any, limits: MicroBatchLimits) -> None:
    compare(bundle.model, Setting([*ALIKE, TEXT], length=400), bundle.tokenizer, limits)


@pytest.mark.parametrize("length", [90, 130])
def test_truncated_samples(bundle: Any, length: int) -> None:
    setting = Setting([TEN, *ALIKE, *DIFFERENT_IMAGES], length=length)
    items = [setting.data(bundle.tokenizer).encoded(0, index) for index in range(len(setting.samples))]
    assert max(map(len, items)) == length
    compare(bundle.model, setting, bundle.tokenizer)


def test_spans_too_long_for_matrix_products(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.model.cpu.block_attention.MAX_PRODUCT_QUERIES", 20)
    compare(bundle.model, Setting([*ALIKE, TEN, TEXT]), bundle.tokenizer)


@pytest.mark.parametrize("max_tokens", [1, 60])
def test_spans_of_several_blocks(bundle: Any, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    monkeypatch.setattr("llavactl.model.cpu.block_attention.MAX_BLOCK_TOKENS", max_tokens)
    compare(bundle.model, Setting([*ALIKE, *ALIKE, TEN, TEXT]), bundle.tokenizer)


def test_logits_in_chunks(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    compare(bundle.model, Setting([*ALIKE, TEN, TEXT]), bundle.tokenizer)


@pytest.mark.parametrize("samples", CASES.values(), ids=CASES.keys())
def test_padded_batches_equal_the_reference(bundle: Any, samples: list[Sample]) -> None:
    compare(bundle.model, Setting(samples), bundle.tokenizer, packed=False)


def with_checkpointing(model: LlavaModel) -> LlavaModel:
    model = copy.deepcopy(model)
    enable = getattr(model.language, "activation_checkpointing_enable", None)
    (enable or model.language.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def with_adapters(model: LlavaModel) -> LlavaModel:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model).requires_grad_(False)
    model.connector.requires_grad_(True)
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    model.language = get_peft_model(model.language, config)
    return model


def with_frozen_language(model: LlavaModel) -> LlavaModel:
    """As in stage 1."""
    model = copy.deepcopy(model)
    model.language.requires_grad_(False)
    return model


def with_quantized_adapters(model: LlavaModel) -> LlavaModel:
    pytest.importorskip("bitsandbytes")
    spec = {"name": "hf", "model": model.language.name_or_path}
    language = load_quantized(registry().create("languages", spec), "float32", "cpu")
    return with_adapters(LlavaModel(model.connector, language))


METHODS: dict[str, Callable[[LlavaModel], LlavaModel]] = {
    "checkpointing": with_checkpointing,
    "adapters": with_adapters,
    "adapters and checkpointing": lambda model: with_checkpointing(with_adapters(model)),
    "QLoRA": with_quantized_adapters,
    "QLoRA and checkpointing": lambda model: with_checkpointing(with_quantized_adapters(model)),
    "connector only": with_frozen_language,
    "connector only and checkpointing": lambda model: with_checkpointing(with_frozen_language(model)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("limits", [None, MicroBatchLimits(4, 300)], ids=["one sequence", "several sequences"])
def test_training_methods(
    bundle: Any, method: Callable[[LlavaModel], LlavaModel], limits: MicroBatchLimits | None
) -> None:
    mixed = [*ALIKE, TEN, TEXT, LATE, TWO, *DIFFERENT_IMAGES]
    model = method(bundle.model)
    batches = compare(model, Setting(mixed, order="random", length=130), bundle.tokenizer, limits)
    assert any(span.after is not None for batch in batches for span in batch.spans)
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad) == ("lora" in str(model))


@pytest.mark.parametrize("seed", range(4))
def test_random_mixtures(bundle: Any, seed: int) -> None:
    rng = random.Random(seed)
    mixed = rng.choices([*ALIKE, *DIFFERENT_IMAGES, TEN, TEXT, LATE, TWO], k=12)
    setting = Setting(mixed, order=rng.choice(["first", "random", "as-data"]), length=rng.randint(70, 300))
    compare(bundle.model, setting, bundle.tokenizer, MicroBatchLimits(rng.randint(2, 12), rng.choice([None, 150, 400])))


@pytest.mark.parametrize(
    "file",
    [FIXTURE, pytest.param(REAL, marks=needs_real)],
    ids=["fixture", "real"],
)
def test_instruct_records(file: Path, bundle: Any) -> None:
    records = list(registry().create("sources", {"name": "llava-json", "path": str(file), "images": str(file.parent)}))
    setting = Setting(records[:6], order="as-data", length=700)
    data = setting.data(bundle.tokenizer)
    assert len({len(data.encoded(0, index)) for index in range(6)}) > 3, "different lengths"
    compare(bundle.model, setting, bundle.tokenizer)


def test_the_last_layer_is_computed_only_where_targets_are_predicted(bundle: Any) -> None:
    model = copy.deepcopy(bundle.model)
    layers, positions = model.language.model.layers, {}

    def counted(forward: Any, key: Any) -> Any:
        return lambda hidden: (positions.update({key: hidden.shape[:-1].numel()}), forward(hidden))[1]

    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"):
        for layer in (0, -1):
            part = layers[layer].get_submodule(name)
            part.forward = counted(part.forward, (layer, name))
    data = Setting([*ALIKE, TEXT]).data(bundle.tokenizer)
    (batch,) = packed_micro_batches(data, [(0, index) for index in range(len(data))], Partition(MicroBatchLimits(9)))
    with packed_attention(model.language):
        model(batch)
    indices, _ = loss.predictions(batch, packed_layout(batch))
    selected = len(padded_indices(indices, batch.ids.shape[1]))
    assert selected < len(indices.unique()) + INDEX_MULTIPLE
    assert selected < batch.ids.shape[1] / 2
    assert len(positions) == 8
    for (layer, name), count in positions.items():
        is_selective = layer == -1 and name != "self_attn.k_proj"
        assert count == (selected if is_selective else batch.ids.shape[1]), name
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (layers[-1].mlp, layers[-1].self_attn))


@pytest.mark.parametrize(("indices", "length"), [([], 40), ([3, 3, 39], 40), ([*range(20)], 24), ([*range(33)], 90)])
def test_indices_are_padded_to_the_multiple(indices: list[int], length: int) -> None:
    padded = padded_indices(torch.tensor(indices, dtype=torch.long), length).tolist()
    assert padded == sorted(set(padded))
    assert set(indices) <= set(padded) <= set(range(length))
    assert len(padded) in (length, math.ceil(len(set(indices)) / INDEX_MULTIPLE) * INDEX_MULTIPLE)


def tiny_model(model_type: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=2, head_dim=12, vocab_size=400, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(
    ("model_type", "options"), [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {})]
)
def test_every_packable_model_type(bundle: Any, model_type: str, options: dict[str, Any]) -> None:
    model = LlavaModel(copy.deepcopy(bundle.model.connector), tiny_model(model_type, **options))
    assert packing_blocker(model.language) == ""
    compare(model, Setting([*ALIKE, TEN, TEXT]), bundle.tokenizer)


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mistral", {"sliding_window": 32}, "window: 32"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "window: 32"),
        ("gemma2", {}, "gemma2"),
        ("llama", {"attention_dropout": 0.1}, "dropout"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_packing_blockers(model_type: str, options: dict[str, Any], reason: str) -> None:
    assert reason in packing_blocker(tiny_model(model_type, **options))


def test_a_shared_image_is_in_the_sequence_once(bundle: Any) -> None:
    (batch,) = compare(bundle.model, Setting(ALIKE), bundle.tokenizer)
    assert batch.features.shape[0] == 2
    assert int((batch.ids == IMAGE_TOKEN).sum()) == 2 * SHAPE.patches
    data = Setting(ALIKE).data(bundle.tokenizer)
    assert token_count(batch) == sum(len(data.encoded(0, index)) for index in range(len(data)))
    assert batch.ids.shape[1] < token_count(batch)


def test_the_attention_implementation_is_restored(bundle: Any) -> None:
    previous = bundle.model.language.config._attn_implementation
    with pytest.raises(KeyError), packed_attention(bundle.model.language):
        raise KeyError
    assert bundle.model.language.config._attn_implementation == previous
