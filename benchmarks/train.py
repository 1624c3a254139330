"""How fast a stage trains, beside transformers and beside what the language model alone takes.

    python benchmarks/train.py --json                                  # minutes; everything drawn from a seed
    python benchmarks/train.py --stages 2 --records instruct.json      # the lengths of real LLaVA records

One process, one run: every way takes the same records in turn, round after round, so that what else the machine does
falls on all. Forward and backward alone are timed, AdamW is the same for all; wall time, and the processor time of all
threads, which other work on the machine hardly changes. Models: the demo's DINOv2 ViT-S/14 and SmolLM2-135M, bfloat16,
256 tokens an image.

- limit       the language model (eager) behind the connector on ready features, a record at a time at its exact
              length, logits at trained positions: nothing computed in vain, nothing shared
- packed      ours: records in one row, every image with one record
- shared      ours: the same number of records, several to an image (--per-image)
- hf          LlavaForConditionalGeneration: tower in the loop, padded rows, logits everywhere
- hf-compact  the same with logits at trained positions alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, FeatureShape, ImageFile, ImageRef
from llavactl.data import rows
from llavactl.data.batches import collate, pack
from llavactl.data.encode import Encoding, arrange
from llavactl.model.build import build
from llavactl.model.packed import packed_attention

SHAPE = FeatureShape((16, 16), 384)
DRAWN = {1: (2, 8, 20), 2: (60, 120, 380)}
"""Tokens of text that are not trained, and the least and most that are: captions, and instructions as LLaVA's."""


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
    families = rows.families(items, SHAPE.patches, rows.Limits(len(items)))
    batch = pack([(each.shared, [items[at] for at in each.members]) for each in families], Features())
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


def hugging_face(llava: Any, items: Sequence[Encoded], *, compact: bool) -> float:
    batch = collate(items, Features())
    image = batch.ids == IMAGE_TOKEN
    inputs = {
        "input_ids": batch.ids.masked_fill(image, llava.config.image_token_id),
        "attention_mask": batch.mask.long(),
        "pixel_values": torch.randn(len(items), 3, 224, 224, dtype=torch.bfloat16),
        "use_cache": False,
    }
    if compact:
        hidden = llava.model(**inputs).last_hidden_state[:, :-1]
        targets = batch.labels[:, 1:]
        trained = targets != IGNORE
        loss = functional.cross_entropy(llava.lm_head(hidden[trained]).float(), targets[trained], reduction="sum")
    else:
        loss = llava(**inputs, labels=batch.labels).loss * (batch.labels[:, 1:] != IGNORE).sum()
    loss.backward()
    return loss.item()


def models(stage: int, language: Path, vision: Path) -> tuple[Any, Any, Any]:
    """Ours, transformers' with the same weights, and the tokenizer; what ``stage`` trains has gradients."""
    from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

    spec = {"name": "hf", "model": str(language), "attention": "eager"}
    parts = build({"name": "mlp2x-gelu"}, spec, SHAPE, dtype="bfloat16")
    model = parts.model
    model.language.requires_grad_(stage == 2)
    tower = AutoModel.from_pretrained(vision, dtype=torch.bfloat16)
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
    return model, llava, parts.tokenizer


def measure(stage: int, options: argparse.Namespace, language: Path, vision: Path) -> dict[str, Any]:
    """Medians of every way, of one interleaved run."""
    model, llava, tokenizer = models(stage, language, vision)
    chance = random.Random(options.seed)
    per_image = options.per_image or {1: 5, 2: 2}[stage]
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    lengths: list[int] = []
    trained: list[int] = []
    for turn in range(options.rounds + 1):
        if options.records and stage == 2:
            items = real(options.records, options.count, tokenizer, chance)
        else:
            items = drawn(stage, options.count, chance)
        ways: dict[str, tuple[Callable[..., float], Any, Sequence[Encoded]]] = {
            "limit": (limit, model, items),
            "packed": (ours, model, items),
            "shared": (ours, model, sharing(items, per_image)),
            "hf": (partial(hugging_face, compact=False), llava, items),
            "hf-compact": (partial(hugging_face, compact=True), llava, items),
        }
        losses: dict[str, float] = {}
        for name in chance.sample(sorted(ways), len(ways)):
            run, owner, given = ways[name]
            began, worked = time.perf_counter(), time.process_time()
            losses[name] = run(owner, given)
            taken = time.perf_counter() - began, time.process_time() - worked
            owner.zero_grad(set_to_none=False)
            if turn:  # the first round warms up
                wall.setdefault(name, []).append(taken[0] / len(items))
                processor.setdefault(name, []).append(taken[1] / len(items))
        if abs(losses["packed"] / losses["limit"] - 1) > 0.01:
            raise SystemExit(f"packed rows have another loss: {losses}")
        if turn:
            lengths += map(len, items)
            trained += [item.trained for item in items]
        print(f"stage {stage}: round {turn} of {options.rounds}", file=sys.stderr, flush=True)
    tokens = statistics.mean(lengths)
    medians = {name: (statistics.median(wall[name]), statistics.median(processor[name])) for name in wall}
    return {
        "tokens_a_record": round(tokens, 1),
        "trained_a_record": round(statistics.mean(trained), 1),
        "records_at_a_time": options.count,
        "records_an_image_in_shared": per_image,
        "ways": {
            name: {
                "s_a_record": round(taken, 4),
                "tokens_per_s": round(tokens / taken, 1),
                "speed_of_limit": round(medians["limit"][0] / taken, 3),
                "processor_s_a_record": round(worked, 4),
                "processor_speed_of_limit": round(medians["limit"][1] / worked, 3),
            }
            for name, (taken, worked) in sorted(medians.items(), key=lambda way: way[1])
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10, help="records at a time")
    parser.add_argument("--per-image", type=int, help="records an image in `shared`: 5 in stage 1, 2 in stage 2")
    parser.add_argument("--records", type=Path, help="LLaVA JSON for stage 2; without it lengths are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from llavactl_demo.convert import language_folder, vision_folder

    stages = {f"stage {stage}": measure(stage, options, language_folder(), vision_folder()) for stage in options.stages}
    result = {
        "what": "forward and backward, seconds a record: medians of one interleaved run",
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rounds": options.rounds,
        **stages,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for stage, found in stages.items():
        print(f"{stage}: {found['tokens_a_record']} tokens a record, {found['trained_a_record']} trained")
        for name, way in found["ways"].items():
            taken, worked, speed = way["s_a_record"], way["processor_s_a_record"], way["tokens_per_s"]
            print(f"  {name:<11} {taken:8.4f} s a record ({worked:.4f} of a processor) {speed:8.1f} tokens/s")


if __name__ == "__main__":
    main()
