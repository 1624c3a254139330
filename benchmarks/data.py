"""Speed and memory of ``llavactl data``: check, stats, filter and expand on records synthesised from real ones.

    python benchmarks/data.py                         # a tenth of LLaVA's sizes
    python benchmarks/data.py --records 665000 --captions 3000000 --out benchmarks/results/data-2-cores.json

Needs ``../shared/data/llava``. Each command runs in a process of its own; its peak resident memory is the kernel's
(of the largest process, where there are several). ``json.load`` of the same file stands beside, for it is what a
reader that is not a stream costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rounds import Document, Documents, add_options, publish

REAL = Path(__file__).parents[2] / "shared" / "data" / "llava"
IMAGES_SHARE = 0.6
"""Distinct images a record, as in mix-665K."""


def instruct_records(count: int) -> Iterator[dict[str, Any]]:
    """Real conversations under new ids, several about one image."""
    real = json.loads((REAL / "llava_instruct_100.json").read_text(encoding="utf-8"))
    for index in range(count):
        record = real[index % len(real)]
        yield {**record, "id": f"{index:09d}", "image": f"coco/{int(index * IMAGES_SHARE):012d}.jpg"}


def caption_records(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Real captions with words exchanged between them, so that distinct phrases grow with their number as in life."""
    real = [
        each["conversations"][1]["value"]
        for each in json.loads((REAL / "blip_laion_cc_sbu_2k.json").read_text(encoding="utf-8"))
    ]
    chance = random.Random(seed)
    words = [word for caption in real for word in caption.split()]
    for index in range(count):
        caption = chance.choice(real).split()
        for _ in range(2):
            caption[chance.randrange(len(caption))] = chance.choice(words)
        yield {"id": f"{index:09d}", "image": f"{index // 1000:05d}/{index:09d}.jpg", "caption": " ".join(caption)}


def write(path: Path, records: Iterator[dict[str, Any]]) -> float:
    """Writes a JSON array; its megabytes."""
    with path.open("w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            file.write(("[\n" if index == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")
    return path.stat().st_size / 1e6


def measured(words: list[str], count: int) -> dict[str, Any]:
    """Runs ``words``; seconds, records a second and the peak of memory, less nothing: a whole process."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        out = process.stdout.read() if process.stdout else b""
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{' '.join(words)} failed")
    document = json.loads(out) if out.strip().startswith(b"{") else {}
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "records_per_s": round(count / seconds),
        "peak_rss_mb": round(usage.ru_maxrss / 1024),
        "said": {
            key: document[key]
            for key in ("captions", "kept", "phrases", "rare", "frequent", "errors")
            if key in document
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=66_500, help="for check and stats")
    parser.add_argument("--captions", type=int, default=300_000, help="for filter and expand")
    parser.add_argument("--recipe", help="count tokens in check and stats, too, by this recipe's stage 2")
    add_options(parser)
    asked = parser.parse_args()
    publish(documents(asked), asked, shown)


def shown(document: Document) -> str:
    return "\n".join(f"{name:20} {found}" for name, found in document["results"].items())


def documents(asked: argparse.Namespace) -> Documents:
    """Synthesises and measures; the results so far after each command."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    cli = [sys.executable, "-m", "llavactl", "data"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        records, captions = Path(folder, "records.json"), Path(folder, "captions.json")
        runs: list[tuple[str, Callable[[], list[str]], int]] = []
        if asked.records:
            results["records_mb"] = round(write(records, instruct_records(asked.records)))
            load = f"import json; json.load(open({str(records)!r}))"
            runs += [
                ("json.load", lambda: [sys.executable, "-c", load], asked.records),
                ("check", lambda: [*cli, "check", str(records), "--json"], asked.records),
                (
                    "check --fix",
                    lambda: [*cli, "check", str(records), "--fix", f"{folder}/m.json", "--json"],
                    asked.records,
                ),
                ("stats", lambda: [*cli, "stats", str(records), "--json"], asked.records),
            ]
            if asked.recipe:
                for verb in ("check", "stats"):
                    words = [*cli, verb, str(records), "-r", asked.recipe, "--json"]
                    runs.append((f"{verb} with tokens", lambda words=words: words, asked.records))
        if asked.captions:
            results["captions_mb"] = round(write(captions, caption_records(asked.captions)))
            out = f"{folder}/f.jsonl"
            runs += [
                ("filter", lambda: [*cli, "filter", str(captions), "--out", out, "--json"], asked.captions),
                (
                    "expand",
                    lambda: [*cli, "expand", str(captions), "--out", f"{folder}/e.json", "--json"],
                    asked.captions,
                ),
            ]
        for name, words, count in runs:
            results[name] = measured(words(), count)
            print(name, results[name], file=sys.stderr, flush=True)
            yield {"records": asked.records, "captions": asked.captions, **machine, "results": results}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
