"""The source ``hf-datasets``: data sets that the library ``datasets`` loads, from this machine or as a stream.

A loaded data set is memory-mapped, so an image is read by its row. A stream has no rows to return to: its images are
written to llavactl's cache folder, each once, under the hash of its bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llavactl import DataError, ImageFile, ImageRef, ImageRoot, Json, ModelId, RawRecord, cache_dir, check_image_root
from llavactl_sources.files import MAX_IMAGE_BYTES, optional_module
from llavactl_sources.records import ConversationSource
from llavactl_sources.rows import (
    Cell,
    Columns,
    RowOptions,
    binary_columns,
    columns_of,
    image_cells,
    readable,
    row_record,
)

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
_ROWS = 1000
"""Rows that are read at a time; the bytes of their images are not."""


class HfDatasetsOptions(RowOptions):
    """Options of the source ``hf-datasets``."""

    path: ModelId = Field(
        description="folder written by save_to_disk, folder of data files, data file (begin with ./), or id on the hub"
    )
    config: str | None = Field(None, description="configuration of a data set with several")
    split: str | None = Field(None, description="split, such as train[:10%]; null: train, or the only one")
    streaming: bool = Field(False, description="true: don't download the data set; images are kept in the cache folder")
    limit: int | None = Field(None, gt=0, description="rows at most; null: all")


def hf_datasets(options: HfDatasetsOptions) -> LoadedDataset | StreamedDataset:
    """The source of ``options``; a stream has no identity."""
    return StreamedDataset(options) if options.streaming else LoadedDataset(options)


def _datasets() -> Any:
    datasets = optional_module("datasets", "datasets")
    datasets.disable_progress_bars()
    return datasets


def load(path: str, config: str | None, split: str | None, *, streaming: bool = False) -> Any:
    """The data set as the library returns it.

    Raises:
        DataError: there is no such data set, configuration or split, or it can't be read.
    """
    datasets = _datasets()
    folder = Path(path)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _saved(datasets, folder, split, streaming=streaming)
        if folder.is_absolute() and folder.suffix in _BUILDERS and not folder.is_dir():
            files = {"train": str(folder)}
            return datasets.load_dataset(
                _BUILDERS[folder.suffix], data_files=files, split=split or "train", streaming=streaming
            )
        if folder.is_absolute() and not folder.is_dir():
            raise DataError(f"{path}: no such folder", hint=f"data files are {', '.join(_BUILDERS)}")
        return datasets.load_dataset(path, config, split=split or "train", streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # of any library that reads data files or the hub
        raise DataError(f"{path}: {_reason(error)}", hint="check `path`, `config` and `split`") from error


def _saved(datasets: Any, folder: Path, split: str | None, *, streaming: bool) -> Any:
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, dict):
        name = split or ("train" if "train" in saved or len(saved) != 1 else next(iter(saved)))
        if name not in saved:
            raise DataError(f"{folder}: no split {name!r}", hint=f"available: {', '.join(saved)}")
        saved = saved[name]
    elif split not in (None, str(saved.split)):
        raise DataError(f"{folder}: no split {split!r}", hint="the folder has one split: leave out `split`")
    return saved.to_iterable_dataset() if streaming else saved


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_lock = threading.Lock()


@lru_cache(4)
def _loaded(path: str, config: str | None, split: str | None) -> Any:
    return load(path, config, split)


@lru_cache(4)
def _image_rows(path: str, config: str | None, split: str | None, column: str) -> Any:
    """The column of images, as arrow tables."""
    return _loaded(path, config, split).select_columns([column]).with_format("arrow")


@dataclass(frozen=True, slots=True)
class DatasetImage:
    """The image ``item`` in ``column`` of ``row`` of a data set, whose ``fingerprint`` is the library's."""

    shared_fields: ClassVar[tuple[str, ...]] = ("path", "config", "split", "fingerprint", "column")

    path: str
    config: str | None
    split: str | None
    fingerprint: str
    row: int
    column: str
    item: int
    name: str

    def read(self) -> bytes:
        try:
            with _lock:
                dataset = _loaded(self.path, self.config, self.split)
                rows = _image_rows(self.path, self.config, self.split, self.column)
        except DataError as error:
            raise OSError(error.message) from error
        if dataset._fingerprint != self.fingerprint:
            raise OSError(f"{self.path} has changed since its rows were read")
        value = rows[self.row : self.row + 1].column(0)[0].as_py()
        value = value[self.item] if isinstance(value, list) else value
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError(f"no bytes in {self.path}")
        if len(data) > MAX_IMAGE_BYTES:
            raise OSError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        return data

    def stamp(self) -> str | None:
        return f"{self.path}\0{self.fingerprint}\0{self.row}\0{self.column}\0{self.item}"


class _Dataset(ConversationSource):
    def __init__(self, options: HfDatasetsOptions) -> None:
        self.options = options
        self._spec = (options.path, options.config, options.split)
        self._folder = Path(options.path)
        if self._folder.is_file():
            self._folder = self._folder.parent
        self.root = ImageRoot(str(options.images or options.path), options.follow_links)
        if options.images is None and self._folder.is_dir():
            self.root = ImageRoot(str(self._folder), options.follow_links)

    def check(self) -> None:
        if self.options.images is not None:
            check_image_root(self.root.root)

    @property
    def path(self) -> Path:  # type: ignore[override]
        """The folder of the data set; llavactl's cache folder for one on the hub."""
        if self._folder.is_absolute():
            return self._folder
        folder = Path(cache_dir())
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class LoadedDataset(_Dataset):
    """One sample per row of a data set on this machine, which the library downloads if it is on the hub."""

    def check(self) -> None:
        super().check()
        self._columns(self._dataset())

    def identity(self) -> Mapping[str, Json]:
        """The library's fingerprint of the data."""
        return {"fingerprint": self._dataset()._fingerprint}

    def _dataset(self) -> Any:
        with _lock:
            return _loaded(*self._spec)

    def _columns(self, dataset: Any) -> Columns:
        binary = binary_columns(dataset.features.arrow_schema)
        return columns_of(dataset.column_names, binary, self.options, self.options.path)

    def records(self) -> Iterator[RawRecord]:
        dataset = self._dataset()
        columns = self._columns(dataset)
        schema, tables = dataset.features.arrow_schema, dataset.with_format("arrow")
        texts = {name: key for name, key in columns.keys.items() if readable(schema.field(name).type)}
        rows = min(len(dataset), self.options.limit or len(dataset))
        for start in range(0, rows, _ROWS):
            table = tables[start : min(start + _ROWS, rows)]
            try:
                values = table.select(list(texts)).rename_columns(list(texts.values())).to_pylist()
            except UnicodeDecodeError as error:
                yield RawRecord(f"{self.options.path} row {start}", None, start, problem=_reason(error))
                return
            cells = None
            if columns.image is not None:
                cells = [row for chunk in table.column(columns.image).chunks for row in image_cells(chunk)]
            for offset, value in enumerate(values):
                row = start + offset
                image = partial(DatasetImage, *self._spec, dataset._fingerprint, row, columns.image or "")
                images = None if cells is None else cells[offset]
                yield row_record(f"{self.options.path} row {row}", row, value, images, image, self.root)


class StreamedDataset(_Dataset):
    """One sample per row of a stream; every pass over the source streams the data again."""

    def check(self) -> None:
        super().check()
        load(*self._spec, streaming=True)

    def records(self) -> Iterator[RawRecord]:
        stream = load(*self._spec, streaming=True).decode(False)
        columns: Columns | None = None
        index = 0
        try:
            for row in islice(stream, self.options.limit):
                if columns is None:
                    binary = [name for name, value in row.items() if not _is_json(value)]
                    columns = columns_of(list(row), binary, self.options, self.options.path)
                yield self._record(index, row, columns)
                index += 1
        except (DataError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - of any library that reads data files or the hub
            yield RawRecord(f"{self.options.path} row {index}", None, index, problem=_reason(error))

    def _record(self, index: int, row: Mapping[str, Any], columns: Columns) -> RawRecord:
        values = {key: row[name] for name, key in columns.keys.items() if _is_json(row.get(name))}
        where = f"{self.options.path} row {index}"
        if columns.image is None:
            return RawRecord(where, values, index)
        given = row.get(columns.image)
        images = [each for each in (given if isinstance(given, list) else [given]) if each is not None]
        data: list[Any] = [each.get("bytes") if isinstance(each, dict) else each for each in images]
        paths = [each.get("path") if isinstance(each, dict) else each for each in images]
        cells = [
            Cell(path if isinstance(path, str) else None, isinstance(content, bytes))
            for path, content in zip(paths, data, strict=True)
        ]
        return row_record(where, index, values, cells, lambda item, _name: _streamed(data[item]), self.root)


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)


def _streamed(data: bytes) -> ImageRef:
    """A file with ``data`` in the cache folder, named by its hash."""
    folder = Path(cache_dir()) / "streamed-images"
    digest = hashlib.sha256(data).hexdigest()
    file = folder / digest[:2] / digest
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=file.parent, suffix=".partial", delete=False) as partial_file:
            partial_file.write(data)
        os.replace(partial_file.name, file)  # noqa: PTH105
    return ImageFile(str(folder), f"{digest[:2]}/{digest}")
