"""Data sources for llavactl: records of other tools, tables, tar shards, and the academic data sets of LLaVA v1.5.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl import Register, hookimpl

RESULTS_VERSION = "1"
"""Incremented when the results of a component change: finished steps and features are then not used again."""

_SOURCES = {
    "messages": ("messages:Messages", "records of ShareGPT, ms-swift, LLaMA-Factory or TRL, in JSON or JSONL"),
    "parquet": ("parquet:Parquet", "rows of parquet files with images as bytes or paths (needs pyarrow)"),
    "webdataset": ("tars:WebDataset", "tar shards with images and captions or conversations: WebDataset, CC3M, LAION"),
    "hf-datasets": ("hub:hf_datasets", "data sets of the library datasets, local or streaming (needs datasets)"),
    "vqa": ("questions:Vqa", "VQAv2 and OK-VQA: questions with short answers"),
    "gqa": ("questions:Gqa", "GQA: questions with short answers"),
    "a-okvqa": ("questions:AOkvqa", "A-OKVQA: multiple choice, a copy of a question for each choice"),
    "ocr-vqa": ("questions:OcrVqa", "OCR-VQA: questions about the covers of books"),
    "textcaps": ("questions:Textcaps", "TextCaps: captions, with the text that was read in the image"),
    "visual-genome": ("regions:VisualGenome", "Visual Genome: regions to describe or to locate"),
    "refcoco": ("regions:Refcoco", "RefCOCO, RefCOCO+ and RefCOCOg: regions to describe or to locate"),
}


@hookimpl
def register_sources(register: Register) -> None:
    """All sources of this package; each has its options in a class of its name."""
    for name, (target, summary) in _SOURCES.items():
        module = f"llavactl_sources.{target.partition(':')[0]}"
        register(name, f"llavactl_sources.{target}", options=f"{module}:{_options(name)}", summary=summary)


def _options(name: str) -> str:
    """The class of a source's options: ``HfDatasetsOptions`` for ``hf-datasets``."""
    return "".join(word.capitalize() for word in name.split("-")) + "Options"


@hookimpl
def register_recipes(register: Register) -> None:
    """LLaVA v1.5's mix, from the published files of its data sets."""
    register(
        "llava-v1.5-mix",
        "llavactl_sources:llava-v1.5-mix.yaml",
        summary="LLaVA v1.5, with its mix of academic data built from their published files",
    )


@hookimpl
def check_examples(folder: Path) -> Mapping[str, Any]:
    """A record for each source of records."""
    from llavactl_sources.examples import write_examples

    return {"sources": write_examples(folder)}
