"""Chat compared with transformers: latency of the first token in later turns, tokens per second, load time.

    python benchmarks/chat.py --out chat.json        # about five minutes

The language model is the demo's (135M parameters); the connector has random weights, which cost the same.

- First token of turn 2 and later: the time from the question's text to the first token, compared with one bare forward
  pass of the same new tokens with the key/value cache of the earlier turns.
- Tokens per second of an answer, compared with ``generate`` of transformers with the same cache.
- Load time: ``llavactl.load_model`` in a new process, compared with ``from_pretrained`` of the same weights.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llavactl_demo.convert import language_folder, vision_folder
from rounds import Document, Documents, add_options, publish

from llavactl.chat.assistant import Assistant
from llavactl.chat.conversation import Conversation
from llavactl.core.model_description import shape_entry
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile
from llavactl.model import folder as model_folder
from llavactl.model.build import build
from llavactl.model.generate import Sampling
from llavactl.model.llava import positions

SHAPE = FeatureShape((14, 14), 768)
IMAGE = ImageFile("/", "photo.jpg")
FIRST = "What is in this image? Describe it in detail."
LATER = ("What is to the left of it?", "Why do you think so?", "Write a short story about it with three people in it.")
SPECS = {
    "connector": {"name": "mlp2x-gelu"},
    "language": {"name": "hf", "model": str(language_folder())},
    "vision": {"name": "clip", "model": str(vision_folder()), "layer": -2, "select": "patch", "image": "pad"},
}
LOADERS = {
    "llavactl": "import llavactl; llavactl.load_model({model!r}, device='cpu')",
    "transformers": "from transformers import *; AutoModelForCausalLM.from_pretrained({language!r}, dtype='float32');"
    "AutoTokenizer.from_pretrained({language!r}); CLIPVisionModel.from_pretrained({vision!r});"
    "CLIPImageProcessorPil.from_pretrained({vision!r})",
}


class RandomFeatures:
    def arrays(self, _image: Any) -> tuple[np.ndarray, ...]:
        return (np.random.default_rng(0).standard_normal((SHAPE.patches, SHAPE.width), dtype=np.float32),)


def assistant() -> Assistant:
    bundle = build(SPECS["connector"], SPECS["language"], SHAPE, dtype="float32")
    bundle.model.eval().requires_grad_(False)
    template = registry().create("templates", {"name": "vicuna-v1"})
    loaded = Assistant(bundle.model, Encoding(template, bundle.tokenizer, bundle.image_tokens), RandomFeatures())
    loaded.stops = type(loaded.stops)(frozenset(), ())  # every answer has its full length
    return loaded


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    start = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - start


def answer(conversation: Conversation, question: str, tokens: int) -> None:
    for _ in conversation.ask(question, sampling=Sampling(tokens)):
        pass


def greedy_token(language: Any, **inputs: Any) -> int:
    token: int = language(use_cache=True, logits_to_keep=1, **inputs).logits[0, -1].argmax().item()
    return token


@torch.inference_mode()
def first_tokens(conversation: Conversation, times: dict[str, list[float]]) -> None:
    """Times the first token of each later turn, and a bare forward pass of its new tokens."""
    model = conversation.assistant.model
    for question in LATER:
        cached = len(conversation._cached_keys)
        cache = copy.deepcopy(conversation._cache)
        ours = timed(answer, conversation, question, 1)
        new = len(conversation.assistant.prompt(conversation.turns[:-1])) - cached
        embeds = model.embed(torch.arange(100, 100 + new)[None], None)
        mask = torch.ones(1, cached + new, dtype=torch.long)
        inputs = {"attention_mask": mask, "position_ids": positions(mask.bool())[:, -new:], "past_key_values": cache}
        bare = timed(greedy_token, model.language, inputs_embeds=embeds, **inputs)
        times["bare_forward_ms"].append(1000 * bare)
        times["first_token_ms"].append(1000 * ours)
        times["first_token_ratio"].append(ours / bare)
        times["new_tokens"].append(new)


@torch.inference_mode()
def decoding(conversation: Conversation, tokens: int, times: dict[str, list[float]]) -> None:
    """Tokens per second of one answer, and of ``generate`` of transformers after the same turns."""
    language = conversation.assistant.model.language
    cache, cached = copy.deepcopy(conversation._cache), len(conversation._cached_keys)
    ours = timed(answer, conversation, LATER[0], tokens)
    new = conversation.assistant.prompt(conversation.turns[:-1]).ids[cached:]
    # ``generate`` skips as many tokens as the cache has; their ids have no effect.
    ids = torch.tensor([[1] * cached + list(new)])
    peer = timed(
        language.generate, ids, past_key_values=cache, use_cache=True, do_sample=False, pad_token_id=0,
        attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
    )  # fmt: skip
    times["tokens_per_s"].append(tokens / ours)
    times["transformers_tokens_per_s"].append(tokens / peer)
    times["tokens_per_s_ratio"].append(peer / ours)
    conversation.undo()


def model_on_disk(folder: Path) -> Path:
    """A model folder after stage 1: the connector's weights, and references to the encoder and the language model."""
    bundle = build(SPECS["connector"], SPECS["language"], SHAPE, dtype="float32")
    description = {
        "stage": 1, "method": "connector", **SPECS, "shape": shape_entry(SHAPE), "template": "vicuna-v1",
        "image_order": "first", "precision": "float32", "features": {"dtype": "float16", "compute": "float32"},
        "fingerprint": None, "digest": "", "versions": {},
    }  # fmt: skip
    model_folder.save(folder / "model", bundle, bundle.model.connector.state_dict(), description)
    return folder / "model"


def load_times(model: Path, times: dict[str, list[float]]) -> None:
    names = {"model": str(model), "language": SPECS["language"]["model"], "vision": SPECS["vision"]["model"]}
    for loader, code in LOADERS.items():
        command = [sys.executable, "-c", code.format(**names)]
        times[f"load_{loader}_s"].append(timed(subprocess.run, command, check=True, capture_output=True))
    times["load_ratio"].append(times["load_llavactl_s"][-1] / times["load_transformers_s"][-1])


def measure(options: argparse.Namespace) -> Documents:
    loaded = assistant()
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        model = model_on_disk(Path(folder))
        for done in range(options.rounds + 1):
            conversation = Conversation(loaded)
            list(conversation.ask(IMAGE, "\n", FIRST, sampling=Sampling(16)))
            first_tokens(conversation, times)
            decoding(conversation, options.tokens, times)
            if done == 0:  # warm-up
                times.clear()
                continue
            load_times(model, times)
            yield {
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "threads": torch.get_num_threads(), "rounds": done, "tokens": options.tokens,
                "medians": {name: statistics.median(values) for name, values in times.items()},
                "all": dict(times),
            }  # fmt: skip


def as_text(document: Document) -> str:
    median = document["medians"]
    return "\n".join(
        [
            f"{document['machine']}; medians of {document['rounds']} rounds",
            f"first token, turn 2 and later: {median['first_token_ms']:.0f} ms for {median['new_tokens']:.0f} new "
            f"tokens, {median['first_token_ratio']:.2f} x a bare forward pass ({median['bare_forward_ms']:.0f} ms)",
            f"answer of {document['tokens']} tokens: {median['tokens_per_s']:.1f} tokens/s, "
            f"{median['tokens_per_s_ratio']:.2f} x transformers ({median['transformers_tokens_per_s']:.1f})",
            f"load: {median['load_llavactl_s']:.1f} s, {median['load_ratio']:.2f} x transformers "
            f"({median['load_transformers_s']:.1f} s)",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="Default: 7.")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="Tokens per answer; default: 96.")
    add_options(parser)
    options = parser.parse_args()
    publish(measure(options), options, as_text)


if __name__ == "__main__":
    main()
