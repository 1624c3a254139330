"""Write the results of a benchmark after every round: an interrupted run keeps its finished rounds."""

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
    parser.add_argument("--json", action="store_true", help="Print one line of JSON per round; the last line is final.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Write the JSON to FILE after every round.")


def publish(documents: Documents, options: argparse.Namespace, as_text: Callable[[Document], str]) -> None:
    """Print and write ``documents``, each with all results so far; only the last one has ``complete: true``.

    Without ``--json``, the last document is printed by ``as_text`` at the end, even after Ctrl-C, SIGTERM or an error.
    """
    latest: Document | None = None
    code = 0
    try:
        with stopping.signals_as_interrupts(), closing(documents):
            for latest in documents:
                _output({**latest, "complete": False}, options)
        latest = {**(latest or {}), "complete": True}
        _output(latest, options)
    except KeyboardInterrupt:
        code = stopping.exit_code()
    finally:
        if latest is not None and not options.json:
            print(as_text(latest), flush=True)
    sys.exit(code)


def _output(document: Document, options: argparse.Namespace) -> None:
    if options.out is not None:
        write_json(options.out, document)
    if options.json:
        print(json_text(document), flush=True)
