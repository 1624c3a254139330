"""Tokens per second of ``llavactl serve`` with concurrent clients, compared with one answer after another.

    python benchmarks/serve.py --out serve.json                        # a language model of 75M random weights
    python benchmarks/serve.py --model runs/demo/stage2/model          # a trained model

The server is a separate process and generates at most 8 answers at once. In each round, all methods answer the same
requests (an image and a question, with questions of different lengths), in random order.

- sequential   ``Assistant.answer`` in this process, one conversation after another: no server, no batch
- clients-1    requests over HTTP, one after another
- clients-4    requests over HTTP from 4 concurrent clients
- clients-8    requests over HTTP from 8 concurrent clients
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rounds import Document, Documents, add_options, publish

import llavactl
from llavactl import Assistant, ImageFile, Sampling, Turn
from llavactl.testing import toy_model, toy_photos

CLIENTS = (1, 4, 8)
REQUESTS = 8
QUESTIONS = ("What is it?", "Describe the image in detail. " * 3, "Which color is it? " * 6, "Why?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a model folder; default: random weights")
    parser.add_argument("--width", type=int, default=1024, help="width of the language model with random weights")
    parser.add_argument("--layers", type=int, default=8, help="layers of the language model with random weights")
    parser.add_argument("--tokens", type=int, default=48, help="maximum number of tokens per answer")
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    publish(documents(options), options, as_text)


def documents(options: argparse.Namespace) -> Documents:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model or toy_model(folder, width=options.width, layers=options.layers))
        photos = toy_photos(folder / "photos", REQUESTS)
        assistant = llavactl.load_model(model)
        with server(model) as url:
            methods: dict[str, Callable[[], object]] = {
                "sequential": lambda: sequential(assistant, photos, options.tokens)
            }
            for clients in CLIENTS:
                methods[f"clients-{clients}"] = lambda clients=clients: over_http(url, photos, options.tokens, clients)
            methods["sequential"]()  # encodes the images, and allocates memory
            tokens = over_http(url, photos, options.tokens, CLIENTS[-1])  # the same number with every method
            yield from rounds(methods, tokens, options, assistant)


def rounds(
    methods: dict[str, Callable[[], object]], tokens: int, options: argparse.Namespace, assistant: Assistant
) -> Documents:
    parameters = sum(weight.numel() for weight in assistant.model.language.parameters())
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name in random.sample([*methods], len(methods)):
            start = time.perf_counter()
            methods[name]()
            speeds[name].append(tokens / (time.perf_counter() - start))
        relative = {
            name: statistics.median(one / other for one, other in zip(each, speeds["sequential"], strict=True))
            for name, each in speeds.items()
        }
        yield {
            "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {platform.machine()}, {assistant.model.device.type}",
            "parameters": parameters,
            "requests": REQUESTS,
            "tokens": tokens,
            "rounds": len(speeds["sequential"]),
            "tokens_per_s": {name: round(statistics.median(each), 2) for name, each in speeds.items()},
            "relative_to_sequential": {name: round(ratio, 2) for name, ratio in relative.items()},
        }


def sequential(assistant: Assistant, photos: Sequence[Path], limit: int) -> None:
    """Answers all requests."""
    for index, photo in enumerate(photos):
        turn = Turn("user", (ImageFile(str(photo.parent), photo.name), "\n", QUESTIONS[index % len(QUESTIONS)]))
        assistant.answer([[turn]], Sampling(limit))


def over_http(url: str, photos: Sequence[Path], limit: int, clients: int) -> int:
    """Sends all requests with ``clients`` threads; returns the number of tokens."""

    def ask(index: int) -> int:
        image = base64.b64encode(photos[index].read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
            {"type": "text", "text": QUESTIONS[index % len(QUESTIONS)]},
        ]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": limit, "temperature": 0}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(ask, range(len(photos))))


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The URL of a server of ``model``."""
    command = [sys.executable, "-m", "llavactl.cli", "serve", "--model", str(model), "--port", "0", "--json", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["url"])
        finally:
            process.terminate()


def as_text(document: dict[str, Any] | Document) -> str:
    speeds, ratios = document["tokens_per_s"], document["relative_to_sequential"]
    return "\n".join(
        [
            f"{document['machine']}, {document['parameters'] / 1e6:.0f}M parameters, {document['rounds']} rounds",
            *(f"{name:<12} {speed:8.2f} tokens/s  {ratios[name]:5.2f} x" for name, speed in speeds.items()),
        ]
    )


if __name__ == "__main__":
    main()
