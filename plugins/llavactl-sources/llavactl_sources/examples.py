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
    examples: dict[str, dict[str, Any]] = {
        "messages": {"path": str(records)},
        "webdataset": {"path": str(folder / "shard.tar")},
    }
    examples.update(_academic(folder))
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


def _academic(folder: Path) -> dict[str, dict[str, Any]]:
    """One question of each academic data set, in the form of its published file."""
    question = {"question_id": 1, "image_id": 1, "question": "What?"}
    reference = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [{"sent": "a dot"}]}
    region = {"region_id": 1, "phrase": "a dot", "x": 0, "y": 0, "width": 2, "height": 1}
    size = {"width": 4, "height": 3}
    files: dict[str, Any] = {
        "questions": {"questions": [question]},
        "annotations": {"annotations": [{"question_id": 1, "multiple_choice_answer": "dot"}]},
        "gqa": {"1": {"imageId": "1", "question": "What?", "answer": "dot"}},
        "aokvqa": [{**question, "choices": ["dot", "dash"], "correct_choice_idx": 0}],
        "ocrvqa": {"1": {"split": 1, "questions": ["What?"], "answers": ["Dot"]}},
        "textcaps": {"data": [{"image_id": "1", "caption_str": "A dot."}]},
        "ocr": {"data": [{"image_id": "1", "ocr_tokens": ["DOT"]}]},
        "regions": [{"id": 1, "regions": [region]}],
        "image_data": [{"image_id": 1, "url": "https://example.org/VG_100K/1.jpg", **size}],
        "refs": [reference],
        "instances": {"images": [{"id": 1, **size}], "annotations": [{"id": 1, "bbox": [0, 0, 2, 1]}]},
    }
    paths = {name: str(folder / f"{name}.json") for name in files}
    for name, path in paths.items():
        Path(path).write_text(json.dumps(files[name]), encoding="utf-8")
    return {
        "vqa": {"questions": paths["questions"], "annotations": paths["annotations"]},
        "gqa": {"questions": paths["gqa"]},
        "a-okvqa": {"questions": paths["aokvqa"]},
        "ocr-vqa": {"questions": paths["ocrvqa"]},
        "textcaps": {"captions": paths["textcaps"], "ocr": paths["ocr"]},
        "visual-genome": {"regions": paths["regions"], "image_data": paths["image_data"]},
        "refcoco": {"refs": paths["refs"], "instances": paths["instances"]},
    }
