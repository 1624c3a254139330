"""Training speed and memory of one stage, compared with transformers, TRL and the language model alone.

    python benchmarks/train.py --out train.json                        # minutes; random records
    python benchmarks/train.py --stages 2 --records instruct.json      # records with the lengths of real LLaVA data

All methods run in one process, on the same records, in random order in every round: other load on the machine
affects all of them. Only forward and backward passes are timed, since AdamW is the same for all. Besides wall time, the
CPU time of all threads is reported, which other load hardly affects. Peak memory is measured in a separate process per
method, after loading. Models: the demo's DINOv2 ViT-S/14 and SmolLM2-135M in bfloat16, 256 tokens per image.

- limit                       the language model (eager) and the connector on precomputed features, one record at a time
                              at its exact length, logits only at target tokens: no wasted computation, nothing shared
- limit-shared-prefix         the same with several records per image (--per-image): keys and values of the common
                              prefix, up to the end of the image, are computed once
- llavactl                    sequence packing, every image with one record
- llavactl-shared-prefix      sequence packing and prefix sharing, as many records, several per image
- transformers                LlavaForConditionalGeneration: vision encoder in the loop, padding, logits everywhere
- transformers-target-logits  the same with logits only at target tokens
- trl                         the loss of TRL's SFTTrainer on that model; left out if trl can't be imported

The other programs process all records as one batch or one by one, whichever is faster in the first round. For each
method the result includes its speed relative to both limits.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from records import PER_IMAGE, RandomFeatures, random_records, with_shared_images
from rounds import Document, Documents, add_options, publish
from torch.nn import functional

from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, FeatureShape
from llavactl.data.batches import collate, pack
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.data.packing import MicroBatchLimits, prefix_groups, sample_length
from llavactl.model.build import build
from llavactl.model.packed import packed_attention
from llavactl.training.memory import release_memory

SHAPE = FeatureShape((16, 16), 384)
FEATURES = RandomFeatures(SHAPE)
WARM_UP_RECORDS = 3
"""Records of the first round, which warms up and chooses the batch size of the other programs."""
RESET_PEAK = Path("/proc/self/clear_refs")


def real_records(path: Path, count: int, tokenizer: Any, rng: random.Random) -> list[Encoded]:
    """``count`` random LLaVA records of ``path``, encoded with the template vicuna-v1."""
    encoding = Encoding(registry().create("templates", {"name": "vicuna-v1"}), tokenizer, SHAPE.patches, 2048)
    source = registry().create("sources", {"name": "llava-json", "path": str(path), "images": str(path.parent)})
    samples = list(source)
    return [encoding.encode(arrange(sample.turns, "first", "")) for sample in rng.sample(samples, count)]


def packed_loss(model: Any, items: Sequence[Encoded]) -> float:
    """All ``items`` packed into one sequence."""
    groups = prefix_groups([sample_length(item, SHAPE.patches) for item in items], MicroBatchLimits(len(items)))
    batch = pack([(group.prefix_length, [items[i] for i in group.samples]) for group in groups], FEATURES)
    with packed_attention(model.language):
        loss = model(batch)
        loss.backward()
    return loss.item()


def limit_loss(model: Any, items: Sequence[Encoded]) -> float:
    total = 0.0
    for item in items:
        batch = collate([item], FEATURES)
        embeds = model.embed(batch.ids, batch.features)
        hidden = model.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, :-1]
        targets = batch.labels[0, 1:]
        is_target = targets != IGNORE
        logits = model.language.lm_head(hidden[is_target]).float()
        loss = functional.cross_entropy(logits, targets[is_target], reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def limit_shared_prefix_loss(model: Any, items: Sequence[Encoded]) -> float:
    total = 0.0
    for _, group in groupby(items, lambda item: item.images[0]):
        members = list(group)
        end = members[0].ids.index(IMAGE_TOKEN) + SHAPE.patches
        prefix = Encoded(members[0].ids[:end], members[0].labels[:end], members[0].images)
        assert all(item.ids[:end] == prefix.ids and item.labels[end] == IGNORE for item in members)
        batch = collate([prefix], FEATURES)
        output = model.language.model(inputs_embeds=model.embed(batch.ids, batch.features), use_cache=True)
        losses = [_loss_after_prefix(model, output.past_key_values, item, end) for item in members]
        loss = torch.stack(losses).sum()
        loss.backward()
        total += loss.item()
    return total


def _loss_after_prefix(model: Any, prefix_cache: Any, item: Encoded, end: int) -> torch.Tensor:
    """The loss of ``item`` after its first ``end`` tokens, whose keys and values are in ``prefix_cache``."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, layer in enumerate(prefix_cache.layers):
        cache.update(layer.keys, layer.values, index)
    embeds = model.embed(torch.tensor([item.ids[end:]]), None)
    hidden = model.language.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[0, :-1]
    targets = torch.tensor(item.labels[end + 1 :])
    is_target = targets != IGNORE
    logits = model.language.lm_head(hidden[is_target]).float()
    return functional.cross_entropy(logits, targets[is_target], reduction="sum")


def transformers_loss(peer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    return peer.model(**inputs, labels=labels).loss * (labels[:, 1:] != IGNORE).sum()


def transformers_target_logits_loss(peer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    hidden = peer.model.model(**inputs).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    is_target = targets != IGNORE
    logits = peer.model.lm_head(hidden[is_target]).float()
    return functional.cross_entropy(logits, targets[is_target], reduction="sum")


def trl_loss(peer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = peer.compute_loss(peer.model, {**inputs, "labels": labels}, num_items_in_batch=1)
    return loss


PeerLoss = Callable[[Any, dict[str, Any], torch.Tensor], torch.Tensor]
OURS: dict[str, Callable[[Any, Sequence[Encoded]], float]] = {
    "limit": limit_loss,
    "limit-shared-prefix": limit_shared_prefix_loss,
    "llavactl": packed_loss,
    "llavactl-shared-prefix": packed_loss,
}
PEERS: dict[str, PeerLoss] = {
    "transformers": transformers_loss,
    "transformers-target-logits": transformers_target_logits_loss,
    "trl": trl_loss,
}


def padded_loss(peer_loss: PeerLoss, peer: Any, items: Sequence[Encoded], batch_size: int) -> float:
    """The loss of ``items`` in padded batches, each record with a different image."""
    torch.manual_seed(0)
    pixels = torch.randn(len(items), 3, 224, 224, dtype=torch.bfloat16)
    total = 0.0
    for start in range(0, len(items), batch_size):
        batch = collate(items[start : start + batch_size], FEATURES)
        inputs = {
            "input_ids": batch.ids.masked_fill(batch.ids == IMAGE_TOKEN, peer.model.config.image_token_id),
            "attention_mask": batch.mask.long(),
            "pixel_values": pixels[start : start + batch_size],
            "use_cache": False,
        }
        loss = peer_loss(peer, inputs, batch.labels)
        loss.backward()
        total += loss.item()
    return total


def llavactl_model(stage: int) -> tuple[Any, Any]:
    """llavactl's model and its tokenizer; the parameters that ``stage`` trains require gradients."""
    from llavactl_demo.convert import language_folder

    spec = {"name": "hf", "model": str(language_folder()), "attention": "eager"}
    bundle = build({"name": "mlp2x-gelu"}, spec, SHAPE, dtype="bfloat16")
    bundle.model.language.requires_grad_(stage == 2)
    return bundle.model, bundle.tokenizer


def transformers_model(stage: int, model: Any) -> Any:
    """LlavaForConditionalGeneration with the weights of ``model``."""
    from llavactl_demo.convert import vision_folder
    from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

    vision_encoder = AutoModel.from_pretrained(vision_folder(), dtype=torch.bfloat16)
    config = LlavaConfig(
        vision_config=vision_encoder.config,
        text_config=model.language.config,
        image_token_index=49151,
        vision_feature_layer=-3,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    llava.model.vision_tower.load_state_dict(vision_encoder.state_dict())
    llava.model.language_model.load_state_dict(model.language.model.state_dict())
    llava.tie_weights()
    llava.requires_grad_(stage == 2)
    llava.model.vision_tower.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    return llava


def trl_trainer(llava: Any, tokenizer: Any) -> Any:
    """TRL's SFTTrainer for ``llava``.

    Raises:
        ImportError: trl is not installed or doesn't support this version of transformers.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except RuntimeError as error:  # raised by trl if one of its imports fails
        raise ImportError(" ".join(str(error).split())) from error
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    dummy = Dataset.from_list([{"input_ids": [1]}])
    return SFTTrainer(llava, settings, lambda batch: batch, dummy, processing_class=tokenizer)


def load_peers(stage: int, model: Any, tokenizer: Any, names: Sequence[str]) -> dict[str, Any]:
    """An object with the attribute ``model`` for each of ``names``; trl is left out if it can't be imported."""
    holder = SimpleNamespace(model=transformers_model(stage, model))
    peers: dict[str, Any] = {name: holder for name in names if name != "trl"}
    if "trl" in names:
        try:
            peers["trl"] = trl_trainer(holder.model, tokenizer)
        except ImportError as error:
            print(f"trl is left out: {error}", file=sys.stderr, flush=True)
    return peers


def records(stage: int, options: argparse.Namespace, tokenizer: Any, rng: random.Random) -> list[Encoded]:
    if options.records and stage == 2:
        return real_records(options.records, options.count, tokenizer, rng)
    return random_records(stage, options.count, rng, SHAPE)


def method_records(name: str, stage: int, options: argparse.Namespace, items: Sequence[Encoded]) -> Sequence[Encoded]:
    """``items`` as the method ``name`` needs them: with shared images for prefix sharing."""
    per_image = options.per_image or PER_IMAGE[stage]
    return with_shared_images(items, per_image) if name.endswith("shared-prefix") else items


def measure(stage: int, options: argparse.Namespace) -> Documents:
    """Medians of all methods in an interleaved run, after every round; then the peak memory of each method."""
    model, tokenizer = llavactl_model(stage)
    peers = load_peers(stage, model, tokenizer, list(PEERS))
    rng = random.Random(options.seed)
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    batch_sizes = dict.fromkeys(peers, options.count)
    all_items: list[Encoded] = []
    for round_number in range(options.rounds + 1):
        items = records(stage, options, tokenizer, rng)
        items = items if round_number else items[:WARM_UP_RECORDS]
        losses: dict[str, float] = {}

        def timed(name: str, run: Callable[[], float], owner: Any, losses: dict[str, float] = losses) -> Any:
            started, cpu_started = time.perf_counter(), time.process_time()
            losses[name] = run()
            elapsed = time.perf_counter() - started, time.process_time() - cpu_started
            owner.zero_grad(set_to_none=False)
            return elapsed

        for name in rng.sample([*OURS, *peers], len(OURS) + len(peers)):
            if name in OURS:
                elapsed = timed(name, partial(OURS[name], model, method_records(name, stage, options, items)), model)
            else:
                peer, sizes = peers[name], [batch_sizes[name]] if round_number else sorted({1, len(items)})
                elapsed_by_size = {
                    size: timed(name, partial(padded_loss, PEERS[name], peer, items, size), peer.model)
                    for size in sizes
                }
                best = min(sizes, key=lambda size: elapsed_by_size[size][1])
                elapsed = elapsed_by_size[best]
                batch_sizes[name] = best if round_number or best == 1 else options.count
            if round_number:  # the first round warms up
                wall.setdefault(name, []).append(elapsed[0] / len(items))
                cpu.setdefault(name, []).append(elapsed[1] / len(items))
        check_losses(losses)
        all_items += items if round_number else []
        print(f"stage {stage}: round {round_number} of {options.rounds}", file=sys.stderr, flush=True)
        if round_number:
            yield {"rounds": round_number, **summary(stage, options, all_items, wall, cpu, batch_sizes, {})}
    peaks: dict[str, float | None] = {}
    for name in wall:
        peaks[name] = peak_mb(stage, name, batch_sizes.get(name, 0), options)
        yield {"rounds": options.rounds, **summary(stage, options, all_items, wall, cpu, batch_sizes, peaks)}


def summary(
    stage: int,
    options: argparse.Namespace,
    items: Sequence[Encoded],
    wall: dict[str, list[float]],
    cpu: dict[str, list[float]],
    batch_sizes: dict[str, int],
    peaks: dict[str, float | None],
) -> Document:
    """Medians of the ``wall`` and ``cpu`` seconds per record of each method, over the records ``items``."""
    tokens = statistics.mean(map(len, items))
    medians = {name: (statistics.median(wall[name]), statistics.median(cpu[name])) for name in wall}
    limit, shared_limit = medians["limit"], medians["limit-shared-prefix"]
    return {
        "tokens_per_record": round(tokens, 1),
        "target_tokens_per_record": round(statistics.mean(item.target_tokens for item in items), 1),
        "records_per_batch": options.count,
        "records_per_image_with_shared_prefix": options.per_image or PER_IMAGE[stage],
        "methods": {
            name: {
                "s_per_record": round(seconds, 4),
                "tokens_per_s": round(tokens / seconds, 1),
                "speed_vs_limit": round(limit[0] / seconds, 3),
                "speed_vs_limit_shared_prefix": round(shared_limit[0] / seconds, 3),
                "cpu_s_per_record": round(cpu_seconds, 4),
                "speed_vs_limit_by_cpu_time": round(limit[1] / cpu_seconds, 3),
                "speed_vs_limit_shared_prefix_by_cpu_time": round(shared_limit[1] / cpu_seconds, 3),
                "peak_mb": peaks.get(name),
                **({"micro_batch_size": batch_sizes[name]} if name in batch_sizes else {}),
            }
            for name, (seconds, cpu_seconds) in sorted(medians.items(), key=lambda item: item[1])
        },
    }


def check_losses(losses: dict[str, float]) -> None:
    """Methods with the same records must have the same loss, within the rounding of bfloat16."""
    pairs = [
        ("llavactl", "limit"),
        ("llavactl-shared-prefix", "limit-shared-prefix"),
        ("transformers-target-logits", "transformers"),
        ("trl", "transformers"),
    ]
    for name, expected in pairs:
        if name in losses and abs(losses[name] / losses[expected] - 1) > 0.01:
            raise SystemExit(f"the losses of {name} and {expected} differ: {losses}")


def peak_mb(stage: int, name: str, batch_size: int, options: argparse.Namespace) -> float | None:
    """Peak memory of one round of method ``name`` in a separate process, including the model; None except on Linux."""
    if not RESET_PEAK.exists():
        return None
    arguments = [
        "--peak",
        str(stage),
        name,
        str(batch_size),
        "--count",
        str(options.count),
        "--seed",
        str(options.seed),
    ]
    arguments += ["--per-image", str(options.per_image)] if options.per_image else []
    arguments += ["--records", str(options.records)] if options.records else []
    process = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    return float(process.stdout.splitlines()[-1])


def print_peak(stage: int, name: str, batch_size: int, options: argparse.Namespace) -> None:
    """Load the models of method ``name``, reset the peak, run one round and print the peak memory in MB."""
    model, tokenizer = llavactl_model(stage)
    items = records(stage, options, tokenizer, random.Random(options.seed))
    if name in PEERS:
        peer = load_peers(stage, model, tokenizer, [name])[name]
        run = partial(padded_loss, PEERS[name], peer, items, batch_size)
    else:
        run = partial(OURS[name], model, method_records(name, stage, options, items))
    if name in PEERS:
        del model
    release_memory()
    RESET_PEAK.write_text("5", encoding="utf-8")  # resets the peak that the kernel records
    run()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10, help="records per batch")
    parser.add_argument(
        "--per-image", type=int, help="records per image with a shared prefix; default: 5 in stage 1, 2 in stage 2"
    )
    parser.add_argument("--records", type=Path, help="LLaVA JSON for stage 2; default: records of random length")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        stage, name, batch_size = options.peak
        print_peak(int(stage), name, int(batch_size), options)
        return

    publish(documents(options), options, as_text)


def documents(options: argparse.Namespace) -> Documents:
    result = {
        "description": "forward and backward pass, seconds per record: medians of one interleaved run",
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    for stage in options.stages:
        for measured in measure(stage, options):
            result |= {f"stage {stage}": measured}
            yield result


def as_text(document: Document) -> str:
    lines = []
    for stage in (name for name in document if name.startswith("stage ")):
        result = document[stage]
        tokens, targets = result["tokens_per_record"], result["target_tokens_per_record"]
        lines.append(f"{stage}: {tokens} tokens per record, {targets} target tokens")
        lines += [
            f"  {name:<26} {figures['s_per_record']:8.4f} s per record (CPU {figures['cpu_s_per_record']:.4f} s), "
            f"{figures['tokens_per_s']:8.1f} tokens/s, speed relative to limit {figures['speed_vs_limit']:.3f}, "
            f"to limit-shared-prefix {figures['speed_vs_limit_shared_prefix']:.3f}, "
            f"peak {figures['peak_mb'] or 0:.1f} MB"
            for name, figures in result["methods"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
