"""Writes a benchmark's results after every round, so that an interrupted run keeps them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from llavactl.core import stopping
from llavactl.core.paths import json_text, write_json

Document = dict[str, Any]
Documents = Generator[Document]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print a line of JSON per round; the last one counts.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Write the JSON to FILE after every round.")


def publish(documents: Documents, given: argparse.Namespace, shown: Callable[[Document], str]) -> None:
    """Prints and writes ``documents``, each with all results so far; ``complete`` is true in the last one.

    Without ``--json``, the last one is printed at the end by ``shown``, also after Ctrl-C, SIGTERM or an error.
    """
    newest: Document | None = None
    code = 0
    try:
        with stopping.sigterm_as_interrupt(), closing(documents):
            for newest in documents:
                _output({**newest, "complete": False}, given)
        newest = {**(newest or {}), "complete": True}
        _output(newest, given)
    except KeyboardInterrupt:
        code = stopping.exit_code()
    finally:
        if newest is not None and not given.json:
            print(shown(newest), flush=True)
    sys.exit(code)


def _output(document: Document, given: argparse.Namespace) -> None:
    if given.out is not None:
        write_json(given.out, document)
    if given.json:
        print(json_text(document), flush=True)
