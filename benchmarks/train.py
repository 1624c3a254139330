"""How fast a stage trains, beside transformers, TRL, and what the language model alone takes.

    python benchmarks/train.py --out train.json                        # minutes; everything drawn from a seed
    python benchmarks/train.py --stages 2 --records instruct.json      # the lengths of real LLaVA records

One process, one run: every way takes the same records in turn, round after round, so that what else the machine does
falls on all. Forward and backward alone are timed, AdamW is the same for all; wall time, and the processor time of all
threads, which other work on the machine hardly changes. Each way's peak memory is that of a process of its own, behind
the loading. Models: the demo's DINOv2 ViT-S/14 and SmolLM2-135M, bfloat16, 256 tokens an image.

- limit         the language model (eager) behind the connector on ready features, a record at a time at its exact
                length, logits at trained positions: nothing computed in vain, nothing shared
- limit-shared  the same with several records to an image (--per-image): keys and values up to its end computed once
- packed        ours: records in one row, every image with one record
- shared        ours: as many records, several to an image
- hf            LlavaForConditionalGeneration: tower in the loop, padded rows, logits everywhere
- hf-compact    the same with logits at trained positions alone
- trl           the loss of TRL's SFTTrainer on that model; left out where trl can't be imported

A peer takes all records as one batch or one by one, whichever the first round found faster. For each way the result has
its speed as a share of either limit's.
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

import numpy as np
import torch
from rounds import Document, Documents, add_options, publish
from torch.nn import functional

from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, FeatureShape, ImageRef
from llavactl.data.batches import collate, pack
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.data.packing import MicroBatchLimits, prefix_groups
from llavactl.images.image_file import ImageFile
from llavactl.model.build import build
from llavactl.model.packed import packed_attention
from llavactl.training.memory import release_memory

SHAPE = FeatureShape((16, 16), 384)
DRAWN = {1: (2, 8, 20), 2: (60, 120, 380)}
"""Tokens of text that are not trained, and the least and most that are: captions, and instructions as LLaVA's."""
PER_IMAGE = {1: 5, 2: 2}
WARM = 3
"""Records of the first round, which warms up and tells whether a peer is better off with one at a time."""
RESET = Path("/proc/self/clear_refs")


class Features:
    """Ready features, as from a warm cache."""

    def stored(self, image: ImageRef) -> tuple[np.ndarray]:
        chance = np.random.default_rng(sum(image.name.encode()))
        return (chance.standard_normal((SHAPE.patches, SHAPE.width)).astype(np.float16),)


def drawn(stage: int, count: int, chance: random.Random) -> list[Encoded]:
    """Records of random tokens: BOS, image, text, targets."""
    asked, least, most = DRAWN[stage]
    found = []
    for number in range(count):
        text = [chance.randrange(100, 40000) for _ in range(asked + chance.randint(least, most))]
        labels = [IGNORE] * asked + text[asked:]
        opening = [1, *[IMAGE_TOKEN] * SHAPE.patches]
        image = ImageFile("/", f"{number}.jpg")
        found.append(Encoded((*opening, *text), (*[IGNORE] * len(opening), *labels), (image,)))
    return found


def real(path: Path, count: int, tokenizer: Any, chance: random.Random) -> list[Encoded]:
    """``count`` of the LLaVA records in ``path``, under vicuna-v1."""
    encoding = Encoding(registry().create("templates", {"name": "vicuna-v1"}), tokenizer, SHAPE.patches, 2048)
    source = registry().create("sources", {"name": "llava-json", "path": str(path), "images": str(path.parent)})
    samples = list(source)
    return [encoding.encode(arrange(each.turns, "first", "")) for each in chance.sample(samples, count)]


def sharing(items: Sequence[Encoded], per_image: int) -> list[Encoded]:
    """``items``, ``per_image`` after another about the image of the first of them."""
    return [Encoded(item.ids, item.labels, items[at - at % per_image].images) for at, item in enumerate(items)]


def ours(model: Any, items: Sequence[Encoded]) -> float:
    """One row of all ``items``."""
    groups = prefix_groups(items, SHAPE.patches, MicroBatchLimits(len(items)))
    batch = pack([(group.prefix_length, [items[at] for at in group.samples]) for group in groups], Features())
    with packed_attention(model.language):
        loss = model(batch)
        loss.backward()
    return loss.item()


def limit(model: Any, items: Sequence[Encoded]) -> float:
    total = 0.0
    for item in items:
        batch = collate([item], Features())
        embeds = model.embed(batch.ids, batch.features)
        hidden = model.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, :-1]
        targets = batch.labels[0, 1:]
        trained = targets != IGNORE
        logits = model.language.lm_head(hidden[trained]).float()
        loss = functional.cross_entropy(logits, targets[trained], reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def limit_shared(model: Any, items: Sequence[Encoded]) -> float:
    total = 0.0
    for _, group in groupby(items, lambda item: item.images[0]):
        about = list(group)
        end = about[0].ids.index(IMAGE_TOKEN) + SHAPE.patches
        opening = Encoded(about[0].ids[:end], about[0].labels[:end], about[0].images)
        assert all(item.ids[:end] == opening.ids and item.labels[end] == IGNORE for item in about)
        batch = collate([opening], Features())
        seen = model.language.model(inputs_embeds=model.embed(batch.ids, batch.features), use_cache=True)
        losses = [_behind(model, seen.past_key_values, item, end) for item in about]
        loss = torch.stack(losses).sum()
        loss.backward()
        total += loss.item()
    return total


def _behind(model: Any, opening: Any, item: Encoded, end: int) -> torch.Tensor:
    """The loss of what ``item`` says behind its ``opening`` of ``end`` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for at, layer in enumerate(opening.layers):
        cache.update(layer.keys, layer.values, at)
    embeds = model.embed(torch.tensor([item.ids[end:]]), None)
    hidden = model.language.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[0, :-1]
    targets = torch.tensor(item.labels[end + 1 :])
    trained = targets != IGNORE
    logits = model.language.lm_head(hidden[trained]).float()
    return functional.cross_entropy(logits, targets[trained], reduction="sum")


def plain(peer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    return peer.model(**inputs, labels=labels).loss * (labels[:, 1:] != IGNORE).sum()


def compact(peer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    hidden = peer.model.model(**inputs).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    trained = targets != IGNORE
    return functional.cross_entropy(peer.model.lm_head(hidden[trained]).float(), targets[trained], reduction="sum")


def trl(peer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = peer.compute_loss(peer.model, {**inputs, "labels": labels}, num_items_in_batch=1)
    return loss


Peer = Callable[[Any, dict[str, Any], torch.Tensor], torch.Tensor]
OURS: dict[str, Callable[[Any, Sequence[Encoded]], float]] = {
    "limit": limit,
    "limit-shared": limit_shared,
    "packed": ours,
    "shared": ours,
}
PEERS: dict[str, Peer] = {"hf": plain, "hf-compact": compact, "trl": trl}


def padded(way: Peer, peer: Any, items: Sequence[Encoded], micro: int) -> float:
    """``micro`` records at a time through ``way``, each with a picture of its own."""
    torch.manual_seed(0)
    pixels = torch.randn(len(items), 3, 224, 224, dtype=torch.bfloat16)
    total = 0.0
    for at in range(0, len(items), micro):
        batch = collate(items[at : at + micro], Features())
        inputs = {
            "input_ids": batch.ids.masked_fill(batch.ids == IMAGE_TOKEN, peer.model.config.image_token_id),
            "attention_mask": batch.mask.long(),
            "pixel_values": pixels[at : at + micro],
            "use_cache": False,
        }
        loss = way(peer, inputs, batch.labels)
        loss.backward()
        total += loss.item()
    return total


def our_model(stage: int) -> tuple[Any, Any]:
    """Ours and its tokenizer; what ``stage`` trains has gradients."""
    from llavactl_demo.convert import language_folder

    spec = {"name": "hf", "model": str(language_folder()), "attention": "eager"}
    parts = build({"name": "mlp2x-gelu"}, spec, SHAPE, dtype="bfloat16")
    parts.model.language.requires_grad_(stage == 2)
    return parts.model, parts.tokenizer


def their_model(stage: int, model: Any) -> Any:
    """transformers' with the weights of ours."""
    from llavactl_demo.convert import vision_folder
    from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

    tower = AutoModel.from_pretrained(vision_folder(), dtype=torch.bfloat16)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=model.language.config,
        image_token_index=49151,
        vision_feature_layer=-3,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.model.language_model.load_state_dict(model.language.model.state_dict())
    llava.tie_weights()
    llava.requires_grad_(stage == 2)
    llava.model.vision_tower.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    return llava


def trainer(llava: Any, tokenizer: Any) -> Any:
    """TRL's, for ``llava``.

    Raises:
        ImportError: it isn't there, or doesn't go with this transformers.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except RuntimeError as error:  # what trl makes of an import that fails
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
    nothing = Dataset.from_list([{"input_ids": [1]}])
    return SFTTrainer(llava, settings, lambda batch: batch, nothing, processing_class=tokenizer)


def peers(stage: int, model: Any, tokenizer: Any, wanted: Sequence[str]) -> dict[str, Any]:
    """Whose ``model`` each of the ``wanted`` peers takes; a missing trl is left out."""
    holder = SimpleNamespace(model=their_model(stage, model))
    found: dict[str, Any] = {name: holder for name in wanted if name != "trl"}
    if "trl" in wanted:
        try:
            found["trl"] = trainer(holder.model, tokenizer)
        except ImportError as error:
            print(f"trl is left out: {error}", file=sys.stderr, flush=True)
    return found


def records(stage: int, options: argparse.Namespace, tokenizer: Any, chance: random.Random) -> list[Encoded]:
    if options.records and stage == 2:
        return real(options.records, options.count, tokenizer, chance)
    return drawn(stage, options.count, chance)


def given(name: str, stage: int, options: argparse.Namespace, items: Sequence[Encoded]) -> Sequence[Encoded]:
    """The records as the way ``name`` takes them."""
    per_image = options.per_image or PER_IMAGE[stage]
    return sharing(items, per_image) if name.endswith("shared") else items


def measure(stage: int, options: argparse.Namespace) -> Documents:
    """Medians of every way, of one interleaved run, after every round; then each way's peak memory."""
    model, tokenizer = our_model(stage)
    theirs = peers(stage, model, tokenizer, list(PEERS))
    chance = random.Random(options.seed)
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    micro = dict.fromkeys(theirs, options.count)
    seen: list[Encoded] = []
    for turn in range(options.rounds + 1):
        items = records(stage, options, tokenizer, chance)
        items = items if turn else items[:WARM]
        losses: dict[str, float] = {}

        def timed(name: str, run: Callable[[], float], owner: Any, losses: dict[str, float] = losses) -> Any:
            began, worked = time.perf_counter(), time.process_time()
            losses[name] = run()
            taken = time.perf_counter() - began, time.process_time() - worked
            owner.zero_grad(set_to_none=False)
            return taken

        for name in chance.sample([*OURS, *theirs], len(OURS) + len(theirs)):
            if name in OURS:
                taken = timed(name, partial(OURS[name], model, given(name, stage, options, items)), model)
            else:
                peer, sizes = theirs[name], [micro[name]] if turn else sorted({1, len(items)})
                each = {
                    size: timed(name, partial(padded, PEERS[name], peer, items, size), peer.model) for size in sizes
                }
                best = min(sizes, key=lambda size: each[size][1])
                taken = each[best]
                micro[name] = best if turn or best == 1 else options.count
            if turn:  # the first round warms up
                wall.setdefault(name, []).append(taken[0] / len(items))
                processor.setdefault(name, []).append(taken[1] / len(items))
        agree(losses)
        seen += items if turn else []
        print(f"stage {stage}: round {turn} of {options.rounds}", file=sys.stderr, flush=True)
        if turn:
            yield {"rounds": turn, **summary(stage, options, seen, wall, processor, micro, {})}
    peaks: dict[str, float | None] = {}
    for name in wall:
        peaks[name] = peak_mb(stage, name, micro.get(name, 0), options)
        yield {"rounds": options.rounds, **summary(stage, options, seen, wall, processor, micro, peaks)}


def summary(
    stage: int,
    options: argparse.Namespace,
    seen: Sequence[Encoded],
    wall: dict[str, list[float]],
    processor: dict[str, list[float]],
    micro: dict[str, int],
    peaks: dict[str, float | None],
) -> Document:
    """The medians of ``wall`` and ``processor`` seconds a record, by way, over the records ``seen``."""
    tokens = statistics.mean(map(len, seen))
    medians = {name: (statistics.median(wall[name]), statistics.median(processor[name])) for name in wall}
    return {
        "tokens_a_record": round(tokens, 1),
        "trained_a_record": round(statistics.mean(item.target_tokens for item in seen), 1),
        "records_at_a_time": options.count,
        "records_an_image_in_shared": options.per_image or PER_IMAGE[stage],
        "ways": {
            name: {
                "s_a_record": round(taken, 4),
                "tokens_per_s": round(tokens / taken, 1),
                "speed_of_limit": round(medians["limit"][0] / taken, 3),
                "speed_of_limit_shared": round(medians["limit-shared"][0] / taken, 3),
                "processor_s_a_record": round(worked, 4),
                "processor_speed_of_limit": round(medians["limit"][1] / worked, 3),
                "processor_speed_of_limit_shared": round(medians["limit-shared"][1] / worked, 3),
                "peak_mb": peaks.get(name),
                **({"micro_batch": micro[name]} if name in micro else {}),
            }
            for name, (taken, worked) in sorted(medians.items(), key=lambda way: way[1])
        },
    }


def agree(losses: dict[str, float]) -> None:
    """Ways that were given the same have the same loss, to bfloat16's rounding."""
    alike = [("packed", "limit"), ("shared", "limit-shared"), ("hf-compact", "hf"), ("trl", "hf")]
    for ours, theirs in alike:
        if ours in losses and abs(losses[ours] / losses[theirs] - 1) > 0.01:
            raise SystemExit(f"{ours} has another loss than {theirs}: {losses}")


def peak_mb(stage: int, name: str, micro: int, options: argparse.Namespace) -> float | None:
    """What one round of the way ``name`` takes, its model included, in a process of its own; None beyond Linux."""
    if not RESET.exists():
        return None
    words = ["--peak", str(stage), name, str(micro), "--count", str(options.count), "--seed", str(options.seed)]
    words += ["--per-image", str(options.per_image)] if options.per_image else []
    words += ["--records", str(options.records)] if options.records else []
    made = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return float(made.stdout.splitlines()[-1])


def print_peak(stage: int, name: str, micro: int, options: argparse.Namespace) -> None:
    """Loads what the way ``name`` needs, forgets what that took, runs one round and prints the most it took, in MB."""
    model, tokenizer = our_model(stage)
    items = records(stage, options, tokenizer, random.Random(options.seed))
    if name in PEERS:
        peer = peers(stage, model, tokenizer, [name])[name]
        run = partial(padded, PEERS[name], peer, items, micro)
    else:
        run = partial(OURS[name], model, given(name, stage, options, items))
    if name in PEERS:
        del model
    release_memory()
    RESET.write_text("5", encoding="utf-8")  # the kernel counts its peak from here
    run()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10, help="records at a time")
    parser.add_argument("--per-image", type=int, help="records an image in `shared`: 5 in stage 1, 2 in stage 2")
    parser.add_argument("--records", type=Path, help="LLaVA JSON for stage 2; without it lengths are drawn")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        stage, name, micro = options.peak
        print_peak(int(stage), name, int(micro), options)
        return

    publish(documents(options), options, shown)


def documents(options: argparse.Namespace) -> Documents:
    result = {
        "what": "forward and backward, seconds a record: medians of one interleaved run",
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    for stage in options.stages:
        for found in measure(stage, options):
            result |= {f"stage {stage}": found}
            yield result


def shown(document: Document) -> str:
    lines = []
    for stage in (name for name in document if name.startswith("stage ")):
        found = document[stage]
        lines.append(f"{stage}: {found['tokens_a_record']} tokens a record, {found['trained_a_record']} trained")
        for name, way in found["ways"].items():
            taken, worked, speed = way["s_a_record"], way["processor_s_a_record"], way["tokens_per_s"]
            lines.append(
                f"  {name:<12} {taken:8.4f} s a record ({worked:.4f} of a processor) {speed:8.1f} tokens/s"
                f" {way['speed_of_limit']:6.3f} of limit {way['speed_of_limit_shared']:6.3f} of limit-shared"
                f" {way['peak_mb'] or 0:8.1f} MB"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
