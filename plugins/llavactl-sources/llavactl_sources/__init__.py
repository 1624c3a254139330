"""Data sources for llavactl: records of other tools.

Imports only llavactl's hook marker: the command line imports this module even for ``--help``.
"""

# llavactl's public names are imported lazily: type checkers see them as Any.
# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl import hookimpl

_SOURCES = {
    "messages": ("messages:Messages", "records of ShareGPT, ms-swift, LLaMA-Factory or TRL, in JSON or JSONL"),
    "parquet": ("parquet:Parquet", "rows of parquet files with images as bytes or paths (needs pyarrow)"),
    "webdataset": ("tars:WebDataset", "tar shards with images and captions or conversations: WebDataset, CC3M, LAION"),
    "hf-datasets": ("hub:hf_datasets", "data sets of the library datasets, local or streaming (needs datasets)"),
}


@hookimpl
def register_sources(register: Any) -> None:
    """All sources of this package; each has its options in a class of its name."""
    for name, (target, summary) in _SOURCES.items():
        module = f"llavactl_sources.{target.partition(':')[0]}"
        register(name, f"llavactl_sources.{target}", options=f"{module}:{_options(name)}", summary=summary)


def _options(name: str) -> str:
    """The class of a source's options: ``HfDatasetsOptions`` for ``hf-datasets``."""
    return "".join(word.capitalize() for word in name.split("-")) + "Options"


@hookimpl
def check_examples(folder: Path) -> Mapping[str, Any]:
    """A record for each source of records."""
    from llavactl_sources.examples import write_examples

    return {"sources": write_examples(folder)}
