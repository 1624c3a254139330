"""What a benchmark does with its figures: it gives them after every round, so that stopping it loses none."""

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
    parser.add_argument("--json", action="store_true", help="a line of JSON after every round: the last one counts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write that JSON to FILE, again after every round")


def publish(documents: Documents, given: argparse.Namespace, shown: Callable[[Document], str]) -> None:
    """Prints and writes ``documents``, each of which has all figures so far; ``complete`` is true in the last one.

    Without ``--json`` the last one is ``shown`` at the end. Ctrl-C, SIGTERM and errors end ``documents`` early.
    """
    newest: Document | None = None
    code = 0
    try:
        with stopping.signals(), closing(documents):
            for newest in documents:
                _give({**newest, "complete": False}, given)
        newest = {**(newest or {}), "complete": True}
        _give(newest, given)
    except KeyboardInterrupt:
        code = stopping.exit_code()
    finally:
        if newest is not None and not given.json:
            print(shown(newest), flush=True)
    sys.exit(code)


def _give(document: Document, given: argparse.Namespace) -> None:
    if given.out is not None:
        write_json(given.out, document)
    if given.json:
        print(json_text(document), flush=True)
