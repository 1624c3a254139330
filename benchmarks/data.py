"""Speed and memory of ``llavactl data`` (check, stats, filter, expand) on synthetic records derived from real ones.

    python benchmarks/data.py                         # a tenth of the size of LLaVA's data
    python benchmarks/data.py --records 665000 --captions 3000000 --out benchmarks/results/data-2-cores.json

Needs ``../shared/data/llava``. Each command runs in a separate process; its peak resident memory is reported by the
kernel (of the largest process if there are several). ``json.load`` of the same file is measured for comparison, as the
cost of reading without streaming.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rounds import Document, Documents, add_options, publish

LLAVA_DATA = Path(__file__).parents[2] / "shared" / "data" / "llava"
IMAGES_PER_RECORD = 0.6
"""Distinct images per record, as in mix-665K."""


def instruct_records(count: int) -> Iterator[dict[str, Any]]:
    """Real conversations with new ids, several per image."""
    real = json.loads((LLAVA_DATA / "llava_instruct_100.json").read_text(encoding="utf-8"))
    for index in range(count):
        record = real[index % len(real)]
        yield {**record, "id": f"{index:09d}", "image": f"coco/{int(index * IMAGES_PER_RECORD):012d}.jpg"}


def caption_records(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Real captions with words exchanged between them: the number of distinct phrases grows as in real data."""
    real = [
        record["conversations"][1]["value"]
        for record in json.loads((LLAVA_DATA / "blip_laion_cc_sbu_2k.json").read_text(encoding="utf-8"))
    ]
    rng = random.Random(seed)
    words = [word for caption in real for word in caption.split()]
    for index in range(count):
        caption = rng.choice(real).split()
        for _ in range(2):
            caption[rng.randrange(len(caption))] = rng.choice(words)
        yield {"id": f"{index:09d}", "image": f"{index // 1000:05d}/{index:09d}.jpg", "caption": " ".join(caption)}


def write(path: Path, records: Iterator[dict[str, Any]]) -> float:
    """Write a JSON array and return its size in megabytes."""
    with path.open("w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            file.write(("[\n" if index == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")
    return path.stat().st_size / 1e6


def measure(command: list[str], count: int) -> dict[str, Any]:
    """Run ``command`` on ``count`` records; its time, records per second and peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        out = process.stdout.read() if process.stdout else b""
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{' '.join(command)} failed")
    document = json.loads(out) if out.strip().startswith(b"{") else {}
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "records_per_s": round(count / seconds),
        "peak_rss_mb": round(usage.ru_maxrss / 1024),
        "report": {
            key: document[key]
            for key in ("captions", "kept", "phrases", "rare", "frequent", "errors")
            if key in document
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=66_500, help="records for check and stats")
    parser.add_argument("--captions", type=int, default=300_000, help="captions for filter and expand")
    parser.add_argument("--recipe", help="also measure check and stats with token counts for stage 2 of this recipe")
    add_options(parser)
    options = parser.parse_args()
    publish(documents(options), options, as_text)


def as_text(document: Document) -> str:
    results = document["results"]
    baseline = results.get("json.load")
    lines = []
    for name, result in results.items():
        if not isinstance(result, dict):
            lines.append(f"{name}: {result}")
            continue
        ratios = ""
        if baseline and name.startswith(("check", "stats")):
            ratios = f"; relative to json.load: time {result['seconds'] / max(baseline['seconds'], 0.1):.2f}"
            ratios += f", memory {result['peak_rss_mb'] / baseline['peak_rss_mb']:.3f}"
        lines.append(
            f"{name}: {result['seconds']} s (CPU {result['cpu_seconds']} s), {result['records_per_s']} records/s, "
            f"peak {result['peak_rss_mb']} MB{ratios}"
        )
    return "\n".join(lines)


def documents(options: argparse.Namespace) -> Documents:
    """The results so far, after each command."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    cli = [sys.executable, "-m", "llavactl", "data"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        records, captions = Path(folder, "records.json"), Path(folder, "captions.json")
        runs: list[tuple[str, list[str], int]] = []
        if options.records:
            results["records_mb"] = round(write(records, instruct_records(options.records)))
            load = f"import json; json.load(open({str(records)!r}))"
            commands = {
                "json.load": [sys.executable, "-c", load],
                "check": [*cli, "check", str(records), "--json"],
                "check --fix": [*cli, "check", str(records), "--fix", f"{folder}/m.json", "--json"],
                "stats": [*cli, "stats", str(records), "--json"],
            }
            if options.recipe:
                for verb in ("check", "stats"):
                    commands[f"{verb} with tokens"] = [*cli, verb, str(records), "-r", options.recipe, "--json"]
            runs += [(name, command, options.records) for name, command in commands.items()]
        if options.captions:
            results["captions_mb"] = round(write(captions, caption_records(options.captions)))
            commands = {
                "filter": [*cli, "filter", str(captions), "--out", f"{folder}/f.jsonl", "--json"],
                "expand": [*cli, "expand", str(captions), "--out", f"{folder}/e.json", "--json"],
            }
            runs += [(name, command, options.captions) for name, command in commands.items()]
        for name, command, count in runs:
            results[name] = measure(command, count)
            print(name, results[name], file=sys.stderr, flush=True)
            yield {"records": options.records, "captions": options.captions, **machine, "results": results}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
