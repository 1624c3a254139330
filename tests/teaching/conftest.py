"""A folder with captions and boxes, and a recipe whose teacher is a local endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

RECIPE = """\
name: instruct
vision: {{name: clip, model: clip}}
connector: {{name: linear}}
language: {{name: hf, model: language}}
generate:
  source: {{name: caps-boxes, path: captions.jsonl}}
  teacher: {{name: openai, model: toy, base_url: "{url}"{more}}}
  kinds: {{{kinds}}}
  out: data/instruct.jsonl
  prices: prices.yaml
"""
PRICES = "date: 2026-01\ncurrency: EUR\nbatch: 0.5\nmodels: {toy: {in: 10, out: 1000}}\n"
OBJECTS = ["dog", "cat", "bench", "tree", "kite", "horse", "boat", "lamp"]


def captions(count: int) -> str:
    rows = []
    for number in range(count):
        rng = Random(number)
        boxes = [{"category": rng.choice(OBJECTS), "bbox": [0.1, 0.2, 0.5, 0.6 + number / 1000]} for _ in range(3)]
        captions = [f"A {rng.choice(OBJECTS)} near a {rng.choice(OBJECTS)}, number {number}."]
        rows.append({"id": f"p{number:03}", "image": f"p{number:03}.jpg", "instances": boxes, "captions": captions})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe and its captions to ``tmp_path``."""

    def write(url: str, count: int = 10, kinds: str = "detail: 1", more: str = "") -> Path:
        (tmp_path / "captions.jsonl").write_text(captions(count))
        (tmp_path / "prices.yaml").write_text(PRICES)
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(url=url, kinds=kinds, more=more))
        return tmp_path

    return write
