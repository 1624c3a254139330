"""Random reads of stored features, warm and cold: ours beside what else could hold them, interleaved in one run.

    python benchmarks/store.py
    python benchmarks/store.py --images 400 --out benchmarks/results/store-2-cores.json

Features are 576x1024, as CLIP L/336 makes them. In every round each way reads the same random images; a rate is
the median over rounds, ``of_map`` the median of its ratio to the bare memory map of our own shard in the same
round. With workers, all of them read at once, and rates count all. ``by image`` is what training calls: the
image's file is looked at, its key looked up, then read. Training reads int8 as it is and makes numbers of it on its
device; ``to float16`` makes them on the CPU.

Cold: every image once in random order by one process, each way after the system was told to forget all files. In a
virtual machine the host may still have them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from rounds import Document, Documents, add_options, publish
from safetensors.numpy import load_file, save_file

from llavactl import ImageFile
from llavactl.core.schema import FeatureShape
from llavactl.features import CachedFeatures, ContentKeys, FeatureStore, Fingerprint, StoreWriter, content_key

SHAPE = FeatureShape((24, 24), 1024)
FLOAT16, INT8 = Fingerprint({"dtype": "float16"}), Fingerprint({"dtype": "int8"})
WARM_ONLY = ("copy in memory", "ours, by image")
SLOW = {"h5py gzip": 30}
"""Ways that read fewer images a round, by what they are divided by."""

Read = Callable[[int], object]


def prepare(folder: Path, images: int) -> None:
    """One shard of each dtype, and the same numbers in the other layouts."""
    chance = np.random.default_rng(0)
    keys = [content_key(b"%d" % index) for index in range(images)]
    (folder / "npy").mkdir()
    (folder / "safetensors").mkdir()
    (folder / "pictures").mkdir()
    row = (1, SHAPE.patches, SHAPE.width)
    with (
        StoreWriter(FLOAT16, SHAPE, images) as halves,
        StoreWriter(INT8, SHAPE, images) as bytes_,
        h5py.File(folder / "chunked.h5", "w") as chunked,
        h5py.File(folder / "gzip.h5", "w") as gzip,
    ):
        whole = (images, *row[1:])
        pieces = chunked.create_dataset("features", whole, "f2", chunks=row)
        packed = gzip.create_dataset("features", whole, "f2", chunks=row, compression="gzip")
        for index, key in enumerate(keys):
            features = (chance.standard_normal(row[1:]) * 3).astype(np.float16)
            halves.append([key], features[None])
            bytes_.append([key], features[None])
            pieces[index] = packed[index] = features
            np.save(folder / "npy" / f"{index}.npy", features)
            save_file({"features": features}, folder / "safetensors" / f"{index}.safetensors")
            (folder / "pictures" / f"{index}.jpg").write_bytes(b"%d" % index)


def ways(folder: Path, images: int) -> dict[str, Read]:
    """How to read image number ``i``, opened in the process that reads."""
    torch.set_num_threads(1)
    keys = [content_key(b"%d" % index) for index in range(images)]
    store, small = FeatureStore.open(FLOAT16), FeatureStore.open(INT8)
    cached = CachedFeatures(store, ContentKeys())
    pictures = [ImageFile(str(folder / "pictures"), f"{index}.jpg") for index in range(images)]
    cached.contents(pictures)
    shard, small_shard = store.folder / "shard-00000.h5", small.folder / "shard-00000.h5"
    with h5py.File(shard) as file, h5py.File(small_shard) as small_file:
        at, small_at = file["features"].id.get_offset(), small_file["features"].id.get_offset()
    shape = (images, SHAPE.patches, SHAPE.width)
    mapped = np.memmap(shard, "f2", "r", at, shape)
    small_map = np.memmap(small_shard, "i1", "r", small_at, shape)
    memory = cache(lambda: np.array(mapped))
    plain = h5py.File(shard)["features"]
    chunked, gzip = h5py.File(folder / "chunked.h5")["features"], h5py.File(folder / "gzip.h5")["features"]
    return {
        "bare map": lambda i: np.array(mapped[i]),
        "ours": lambda i: store.read(keys[i]),
        "ours, by image": lambda i: cached.stored(pictures[i]),
        "ours, int8": lambda i: small.stored(keys[i]),
        "ours, int8 to float16": lambda i: small.read(keys[i]),
        "bare map of int8": lambda i: np.array(small_map[i]),
        "copy in memory": lambda i: memory()[i].copy(),
        "h5py contiguous": lambda i: plain[i],
        "h5py chunked": lambda i: chunked[i],
        "h5py gzip": lambda i: gzip[i],
        "npy each": lambda i: np.load(folder / "npy" / f"{i}.npy"),
        "safetensors each": lambda i: load_file(folder / "safetensors" / f"{i}.safetensors"),
    }


def read_rounds(
    folder: Path, images: int, rounds: int, reads: int, seed: int, start: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every round, by way: start, end and the number of images. ``start()`` is a barrier."""
    every = ways(folder, images)
    for number in range(-1, rounds):  # round -1 warms up
        chosen = [random.Random(f"{seed} {number}").randrange(images) for _ in range(reads)]
        names = list(every)
        random.Random(number).shuffle(names)
        times: dict[str, Any] = {}
        for name in names:
            read, some = every[name], chosen[: max(1, reads // SLOW.get(name, 1))]
            start()
            began = time.perf_counter()
            for index in some:
                read(index)
            times[name] = (began, time.perf_counter(), len(some))
        if number >= 0:
            yield number, times


def _ignore_signals() -> None:
    """In a worker: leaves signals to the parent process, which terminates it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(queue: Any, barrier: Any, *given: Any) -> None:
    _ignore_signals()
    for found in read_rounds(*given, barrier.wait):
        queue.put(found)


def together(folder: Path, images: int, rounds: int, reads: int, workers: int) -> Documents:
    """Rates of ``workers`` processes that read at once, after every round."""
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(workers)
    given = [(queue, barrier, folder, images, rounds, reads, seed) for seed in range(workers)]
    processes = [context.Process(target=_work, args=each, daemon=True) for each in given]
    for process in processes:
        process.start()
    by_round: list[list[dict[str, Any]]] = [[] for _ in range(rounds)]
    by_way: dict[str, list[float]] = {}
    try:
        for _ in range(rounds * workers):
            number, times = queue.get()
            by_round[number].append(times)
            if len(by_round[number]) == workers:
                for name, rate in rates(by_round[number]).items():
                    by_way.setdefault(name, []).append(rate)
                yield compared(by_way)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def forget(folder: Path) -> None:
    """Asks the system to drop what it has in memory of the files below ``folder``."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _read_cold(queue: Any, folder: Path, images: int, name: str, seed: int) -> None:
    _ignore_signals()
    read = ways(folder, images)[name]
    forget(folder)
    chosen = random.Random(seed).sample(range(images), images)
    began = time.perf_counter()
    for index in chosen:
        read(index)
    queue.put(images / (time.perf_counter() - began))


def cold(folder: Path, images: int, rounds: int) -> Documents:
    """Rates of one process after every round, a new one for each way: mapped pages stay in memory."""
    context = multiprocessing.get_context("fork")
    names = [name for name in ways(folder, images) if name not in WARM_ONLY]
    by_way: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in random.Random(number).sample(names, len(names)):
            queue = context.Queue()
            process = context.Process(target=_read_cold, args=(queue, folder, images, name, number), daemon=True)
            process.start()
            by_way[name].append(queue.get())
            process.join()
        yield compared(by_way)


def rates(workers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Images per second of all ``workers`` in one round, by way."""
    found = {}
    for name in workers[0]:
        began, ended, counts = zip(*(worker[name] for worker in workers), strict=True)
        found[name] = sum(counts) / (max(ended) - min(began))
    return found


def compared(by_way: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians of images a second over rounds, the fastest first, and of the ratios to the bare map."""
    bare = by_way["bare map"]
    return {
        name: {
            "images_per_s": round(statistics.median(found), 1),
            "of_map": round(statistics.median(a / b for a, b in zip(found, bare, strict=True)), 3),
        }
        for name, found in sorted(by_way.items(), key=lambda each: -statistics.median(each[1]))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reads", type=int, default=300, help="images a way, a round and a worker")
    parser.add_argument("--cold", type=int, default=3, metavar="ROUNDS")
    add_options(parser)
    given = parser.parse_args()
    publish(documents(given), given, shown)


def documents(given: argparse.Namespace) -> Documents:
    document: Document = {
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, h5py {h5py.__version__}",
        "features": [SHAPE.patches, SHAPE.width],
        **{name: getattr(given, name) for name in ("images", "rounds", "reads", "cold")},
    }
    with tempfile.TemporaryDirectory() as name:
        os.environ["LLAVACTL_HOME"] = str(Path(name, "home"))
        prepare(Path(name), given.images)
        measured = {
            "1 worker": together(Path(name), given.images, given.rounds, given.reads, 1),
            "4 workers": together(Path(name), given.images, given.rounds, given.reads, 4),
        }
        if given.cold and hasattr(os, "posix_fadvise"):
            measured["cold, 1 worker"] = cold(Path(name), given.images, given.cold)
        for workers, rounds in measured.items():
            with closing(rounds):
                for found in rounds:
                    document |= {workers: found}
                    yield document


def shown(document: Document) -> str:
    lines = [str(document["machine"])]
    for workers in ("1 worker", "4 workers", "cold, 1 worker"):
        if workers in document:
            lines.append(workers)
            lines += [
                f"  {way:<21} {found['images_per_s']:>9.1f} images/s  {found['of_map']:.3f}"
                for way, found in document[workers].items()
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
