"""Random reads of stored features, warm and cold, compared with other ways to store them.

    python benchmarks/store.py
    python benchmarks/store.py --images 400 --out benchmarks/results/store-2-cores.json

Features are 576x1024, as from CLIP L/336. In every round each method reads the same random images. Rates are medians
over rounds; ``vs_memory_map`` is the median ratio to a plain memory map of the same shard in the same round. Several
workers read concurrently, and rates count all of them.

- by image     the call used in training: check the image file's stamp, look up its content key, read the features
- int8         training reads int8 as stored and dequantizes on its device; ``to float16`` dequantizes on the CPU
- cold         one process reads every image once, in random order, after asking the system to drop cached files; in a
               virtual machine the host may still cache them
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
BASELINE = "memory map"
WARM_ONLY = ("copy in memory", "llavactl, by image")
SLOW_METHODS = {"h5py gzip": 30}
"""Methods that read fewer images per round, by this factor."""

Read = Callable[[int], object]


def prepare(folder: Path, images: int) -> None:
    """Write one shard per dtype, and the same features in the other layouts."""
    rng = np.random.default_rng(0)
    keys = [content_key(b"%d" % index) for index in range(images)]
    (folder / "npy").mkdir()
    (folder / "safetensors").mkdir()
    (folder / "images").mkdir()
    row = (1, SHAPE.patches, SHAPE.width)
    with (
        StoreWriter(FLOAT16, SHAPE, images) as float16_writer,
        StoreWriter(INT8, SHAPE, images) as int8_writer,
        h5py.File(folder / "chunked.h5", "w") as chunked_file,
        h5py.File(folder / "gzip.h5", "w") as gzip_file,
    ):
        shape = (images, *row[1:])
        chunked = chunked_file.create_dataset("features", shape, "f2", chunks=row)
        gzip = gzip_file.create_dataset("features", shape, "f2", chunks=row, compression="gzip")
        for index, key in enumerate(keys):
            features = (rng.standard_normal(row[1:]) * 3).astype(np.float16)
            float16_writer.append([key], features[None])
            int8_writer.append([key], features[None])
            chunked[index] = gzip[index] = features
            np.save(folder / "npy" / f"{index}.npy", features)
            save_file({"features": features}, folder / "safetensors" / f"{index}.safetensors")
            (folder / "images" / f"{index}.jpg").write_bytes(b"%d" % index)


def methods(folder: Path, images: int) -> dict[str, Read]:
    """A function per method that reads image ``i``; files are opened in this process."""
    torch.set_num_threads(1)
    keys = [content_key(b"%d" % index) for index in range(images)]
    store, int8_store = FeatureStore.open(FLOAT16), FeatureStore.open(INT8)
    cached = CachedFeatures(store, ContentKeys())
    image_files = [ImageFile(str(folder / "images"), f"{index}.jpg") for index in range(images)]
    cached.contents(image_files)
    shard, int8_shard = store.folder / "shard-00000.h5", int8_store.folder / "shard-00000.h5"
    with h5py.File(shard) as file, h5py.File(int8_shard) as int8_file:
        offset, int8_offset = file["features"].id.get_offset(), int8_file["features"].id.get_offset()
    shape = (images, SHAPE.patches, SHAPE.width)
    memory_map = np.memmap(shard, "f2", "r", offset, shape)
    int8_map = np.memmap(int8_shard, "i1", "r", int8_offset, shape)
    in_memory = cache(lambda: np.array(memory_map))
    contiguous = h5py.File(shard)["features"]
    chunked, gzip = h5py.File(folder / "chunked.h5")["features"], h5py.File(folder / "gzip.h5")["features"]
    return {
        BASELINE: lambda i: np.array(memory_map[i]),
        "llavactl": lambda i: store.read(keys[i]),
        "llavactl, by image": lambda i: cached.arrays(image_files[i]),
        "llavactl, int8": lambda i: int8_store.stored(keys[i]),
        "llavactl, int8 to float16": lambda i: int8_store.read(keys[i]),
        "memory map, int8": lambda i: np.array(int8_map[i]),
        "copy in memory": lambda i: in_memory()[i].copy(),
        "h5py contiguous": lambda i: contiguous[i],
        "h5py chunked": lambda i: chunked[i],
        "h5py gzip": lambda i: gzip[i],
        "one .npy per image": lambda i: np.load(folder / "npy" / f"{i}.npy"),
        "one .safetensors per image": lambda i: load_file(folder / "safetensors" / f"{i}.safetensors"),
    }


def read_rounds(
    folder: Path, images: int, rounds: int, reads: int, seed: int, start: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """For every round and method: start time, end time and number of images. ``start()`` waits at a barrier."""
    read_functions = methods(folder, images)
    for round_number in range(-1, rounds):  # round -1 warms up
        indices = [random.Random(f"{seed} {round_number}").randrange(images) for _ in range(reads)]
        names = list(read_functions)
        random.Random(round_number).shuffle(names)
        times: dict[str, Any] = {}
        for name in names:
            read, sample = read_functions[name], indices[: max(1, reads // SLOW_METHODS.get(name, 1))]
            start()
            started = time.perf_counter()
            for index in sample:
                read(index)
            times[name] = (started, time.perf_counter(), len(sample))
        if round_number >= 0:
            yield round_number, times


def _ignore_signals() -> None:
    """In a worker: leave signals to the parent process, which terminates it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(queue: Any, barrier: Any, *arguments: Any) -> None:
    _ignore_signals()
    for result in read_rounds(*arguments, barrier.wait):
        queue.put(result)


def warm(folder: Path, images: int, rounds: int, reads: int, workers: int) -> Documents:
    """Rates of ``workers`` concurrent processes, after every round."""
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(workers)
    arguments = [(queue, barrier, folder, images, rounds, reads, seed) for seed in range(workers)]
    processes = [context.Process(target=_work, args=worker_arguments, daemon=True) for worker_arguments in arguments]
    for process in processes:
        process.start()
    times_by_round: list[list[dict[str, Any]]] = [[] for _ in range(rounds)]
    rates_by_method: dict[str, list[float]] = {}
    try:
        for _ in range(rounds * workers):
            round_number, times = queue.get()
            times_by_round[round_number].append(times)
            if len(times_by_round[round_number]) == workers:
                for name, rate in rates(times_by_round[round_number]).items():
                    rates_by_method.setdefault(name, []).append(rate)
                yield compared(rates_by_method)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def drop_cached_files(folder: Path) -> None:
    """Ask the system to drop all files below ``folder`` from its page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _read_cold(queue: Any, folder: Path, images: int, name: str, seed: int) -> None:
    _ignore_signals()
    read = methods(folder, images)[name]
    drop_cached_files(folder)
    indices = random.Random(seed).sample(range(images), images)
    started = time.perf_counter()
    for index in indices:
        read(index)
    queue.put(images / (time.perf_counter() - started))


def cold(folder: Path, images: int, rounds: int) -> Documents:
    """Rates after every round, with a new process for each method, since mapped pages stay in memory."""
    context = multiprocessing.get_context("fork")
    names = [name for name in methods(folder, images) if name not in WARM_ONLY]
    rates_by_method: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        for name in random.Random(round_number).sample(names, len(names)):
            queue = context.Queue()
            arguments = (queue, folder, images, name, round_number)
            process = context.Process(target=_read_cold, args=arguments, daemon=True)
            process.start()
            rates_by_method[name].append(queue.get())
            process.join()
        yield compared(rates_by_method)


def rates(workers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Images per second of all ``workers`` in one round, by method."""
    rates_by_method = {}
    for name in workers[0]:
        started, ended, counts = zip(*(worker[name] for worker in workers), strict=True)
        rates_by_method[name] = sum(counts) / (max(ended) - min(started))
    return rates_by_method


def compared(rates_by_method: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median images per second and median ratio to the memory map, the fastest method first."""
    baseline = rates_by_method[BASELINE]
    return {
        name: {
            "images_per_s": round(statistics.median(method_rates), 1),
            "vs_memory_map": round(statistics.median(a / b for a, b in zip(method_rates, baseline, strict=True)), 3),
        }
        for name, method_rates in sorted(rates_by_method.items(), key=lambda item: -statistics.median(item[1]))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="stored images")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of warm reads")
    parser.add_argument("--reads", type=int, default=300, help="images per method, round and worker")
    parser.add_argument("--cold", type=int, default=3, metavar="ROUNDS", help="rounds of cold reads")
    add_options(parser)
    options = parser.parse_args()
    publish(documents(options), options, as_text)


def documents(options: argparse.Namespace) -> Documents:
    document: Document = {
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, h5py {h5py.__version__}",
        "features": [SHAPE.patches, SHAPE.width],
        **{name: getattr(options, name) for name in ("images", "rounds", "reads", "cold")},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LLAVACTL_HOME"] = str(folder / "home")
        prepare(folder, options.images)
        measurements = {
            "1 worker": warm(folder, options.images, options.rounds, options.reads, 1),
            "4 workers": warm(folder, options.images, options.rounds, options.reads, 4),
        }
        if options.cold and hasattr(os, "posix_fadvise"):
            measurements["cold, 1 worker"] = cold(folder, options.images, options.cold)
        for workers, rounds in measurements.items():
            with closing(rounds):
                for result in rounds:
                    document |= {workers: result}
                    yield document


def as_text(document: Document) -> str:
    lines = [str(document["machine"])]
    for workers in ("1 worker", "4 workers", "cold, 1 worker"):
        if workers in document:
            lines.append(f"{workers}:")
            lines += [
                f"  {name:<26} {result['images_per_s']:>9.1f} images/s  {result['vs_memory_map']:.3f} of the memory map"
                for name, result in document[workers].items()
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
