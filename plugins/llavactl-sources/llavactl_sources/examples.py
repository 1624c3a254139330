"""Small files of each source, with which ``llavactl plugins check`` checks it."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_GIF = base64.b64decode("R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==")
"""An image of one pixel."""


def write_examples(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The options of each source by its name."""
    (folder / "a.gif").write_bytes(_GIF)
    dialog = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dot."}]
    records = folder / "records.json"
    records.write_text(json.dumps([{"id": "1", "messages": dialog, "images": ["a.gif"]}]), encoding="utf-8")
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for name, data in {"0.gif": _GIF, "0.txt": b"A dot."}.items():
            shard.addfile(_member(name, data), io.BytesIO(data))
    examples = {"messages": {"path": str(records)}, "webdataset": {"path": str(folder / "shard.tar")}}
    if find_spec("pyarrow") is not None:
        examples["parquet"] = {"path": str(_write_parquet(folder / "rows.parquet"))}
    if find_spec("datasets") is not None:
        examples["hf-datasets"] = {"path": str(_write_dataset(folder / "saved"))}
    return examples


def _member(name: str, data: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member


def _write_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    image = pa.array([{"bytes": _GIF, "path": "a.gif"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    parquet.write_table(pa.table({"image": image, "question": ["What?"], "answer": ["A dot."]}), path)
    return path


def _write_dataset(folder: Path) -> Path:
    import datasets

    rows = {"image": [{"bytes": _GIF, "path": "a.gif"}], "question": ["What?"], "answer": ["A dot."]}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(folder))
    return folder
