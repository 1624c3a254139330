"""The source ``parquet``: rows with images as bytes, such as LLaVA-OneVision's, or with paths of images.

The bytes of images are not read with the rows. Parquet has no access to a single row: all images of a row group are
decoded for the first one and kept for the next images, which, in order of the file, are those of the same group.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llavactl import DataError, ImageRoot, Json, RawRecord, RecipePath, check_image_root
from llavactl_sources.files import MAX_IMAGE_BYTES, file_stamp, files_of, folder_of, optional_module, stamps_of
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

if TYPE_CHECKING:
    import pyarrow as pa

MAX_GROUP_BYTES = 1 << 32
"""The largest column of a row group that is read into memory."""

_GROUPS = 2
"""Row groups whose images are kept in memory: one, and the next while threads still read the first."""


class ParquetOptions(RowOptions):
    """Options of the source ``parquet``."""

    path: RecipePath = Field(description="a .parquet file, a folder of them, or a pattern such as data/train-*.parquet")


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """The image ``item`` in ``row`` of the row group ``group``, in the leaf ``column`` of the parquet file ``file``.

    ``stamp_of_file`` is that of the file when its rows were read.
    """

    file: str
    stamp_of_file: str
    group: int
    row: int
    column: str
    item: int
    name: str

    def read(self) -> bytes:
        if file_stamp(self.file) != self.stamp_of_file:
            raise OSError(f"{self.file} has changed since its rows were read")
        with _lock:
            value = _column(self.file, self.stamp_of_file, self.group, self.column)[self.row].as_py()
        value = value[self.item] if isinstance(value, list) else value
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError(f"no bytes in {self.file}")
        if len(data) > MAX_IMAGE_BYTES:
            raise OSError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        return data

    def stamp(self) -> str | None:
        where = f"{self.group}\0{self.row}\0{self.column}\0{self.item}"
        return f"{self.file}\0{file_stamp(self.file)}\0{where}"


_lock = threading.Lock()
"""Threads that need the same row group wait for the first one to decode it."""


@lru_cache(_GROUPS)
def _column(file: str, _stamp: str, group: int, column: str) -> pa.ChunkedArray:
    """The values of one leaf in a row group; raises OSError."""
    parquet = optional_module("pyarrow.parquet", "parquet")
    arrow = optional_module("pyarrow", "parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            if _leaf_bytes(opened, group, column) > MAX_GROUP_BYTES:
                raise OSError(f"row group {group} is larger than {MAX_GROUP_BYTES >> 30} GiB")
            return opened.read_row_group(group, columns=[column], use_threads=False).column(0)
    except arrow.ArrowException as error:
        raise OSError(_reason(error)) from error


def _leaf_bytes(opened: Any, group: int, leaf: str) -> int:
    metadata = opened.metadata.row_group(group)
    columns = [metadata.column(index) for index in range(metadata.num_columns)]
    return sum(each.total_uncompressed_size for each in columns if _is_below(each.path_in_schema, leaf))


def _is_below(leaf: str, column: str) -> bool:
    return leaf == column or leaf.startswith(f"{column}.")


def _bytes_leaf(opened: Any, column: str | None) -> str:
    """The leaf of ``column`` that holds the bytes of images, or ""."""
    leaves = [opened.schema.column(index) for index in range(len(opened.schema))]
    own = [leaf for leaf in leaves if column is not None and _is_below(leaf.path, column)]
    binary = [leaf.path for leaf in own if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"]
    return next(iter(binary), "")


def _leaves_to_read(opened: Any, group: int, column: str) -> tuple[list[str], bool]:
    """The leaves that locate the images of ``column``, and whether images are in the table if its bytes aren't read.

    The statistics of the row group say whether all images are embedded, or none; otherwise the bytes are read.
    """
    own = [path for index in range(len(opened.schema)) if _is_below(path := opened.schema.column(index).path, column)]
    bytes_leaf = _bytes_leaf(opened, column)
    others = [path for path in own if path != bytes_leaf]
    if bytes_leaf not in own:
        return own, False
    metadata = opened.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    chunk = next(each for each in chunks if each.path_in_schema == bytes_leaf)
    statistics = chunk.statistics
    if statistics is None or not statistics.has_null_count or statistics.null_count not in (0, chunk.num_values):
        return own, False
    if others or (bytes_leaf == column and not statistics.null_count):
        return others, statistics.null_count == 0
    return own, False


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Parquet(ConversationSource):
    """One sample per row, in the order of files and rows; a row's columns are the keys of a record."""

    def __init__(self, options: ParquetOptions) -> None:
        self.options = options
        self.path = folder_of(options.path)
        self.root = ImageRoot(str(options.images or self.path), options.follow_links)

    def files(self) -> list[Path]:
        """Raises DataError if there are none."""
        return files_of(self.options.path, ".parquet")

    def check(self) -> None:
        """Raises DataError if there are no files, the first one lacks a column, or ``images`` doesn't exist."""
        if self.options.images is not None:
            check_image_root(self.root.root)
        file = self.files()[0]
        arrow = optional_module("pyarrow", "parquet")
        try:
            with optional_module("pyarrow.parquet", "parquet").ParquetFile(file) as opened:
                self._columns(opened.schema_arrow, file)
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{file}: {_reason(error)}") from error

    def _columns(self, schema: pa.Schema, file: Path) -> Columns:
        return columns_of(schema.names, binary_columns(schema), self.options, str(file))

    def identity(self) -> Mapping[str, Json]:
        """The files with sizes and times: hashing them would read all images."""
        return {"files": stamps_of(self.files(), self.path)}

    def records(self) -> Iterator[RawRecord]:
        index = 0
        for file in self.files():
            for record in self._file_records(file, index):
                yield record
                index = record.index + 1

    def _file_records(self, file: Path, index: int) -> Iterator[RawRecord]:
        """The rows of ``file``, the first of which is record ``index``; a damaged part is one record with a problem."""
        arrow = optional_module("pyarrow", "parquet")
        parquet = optional_module("pyarrow.parquet", "parquet")
        row = 0
        try:
            with parquet.ParquetFile(file) as opened:
                columns = self._columns(opened.schema_arrow, file)
                for group in range(opened.num_row_groups):
                    for record in self._group_records(file, opened, group, columns, row, index):
                        yield record
                        row, index = row + 1, record.index + 1
        except DataError as error:
            yield RawRecord(str(file), None, index, problem=error.message.removeprefix(f"{file}: "))
        except (OSError, UnicodeDecodeError, arrow.ArrowException) as error:
            yield RawRecord(f"{file} row {row}", None, index, problem=f"can't be read: {_reason(error)}")

    def _group_records(
        self, file: Path, opened: Any, group: int, columns: Columns, row: int, index: int
    ) -> Iterator[RawRecord]:
        schema = opened.schema_arrow
        texts = {name: key for name, key in columns.keys.items() if readable(schema.field(name).type)}
        leaves, embedded = _leaves_to_read(opened, group, columns.image) if columns.image else ([], False)
        for column in [*leaves, *texts]:
            if _leaf_bytes(opened, group, column) > MAX_GROUP_BYTES:
                raise OSError(f"`{column}` of row group {group} is larger than {MAX_GROUP_BYTES >> 30} GiB")
        table = opened.read_row_group(group, columns=[*texts, *leaves], use_threads=False)
        rows = table.select(list(texts)).rename_columns(list(texts.values())).to_pylist()
        cells = None
        if leaves:
            chunks = table.column(columns.image).chunks
            cells = [row for chunk in chunks for row in image_cells(chunk, embedded=embedded)]
        elif columns.image:
            cells = [[Cell(None, embedded=True)] for _ in rows]
        stamp, bytes_leaf = file_stamp(file), _bytes_leaf(opened, columns.image)
        for offset, values in enumerate(rows):
            image = partial(ParquetImage, str(file), stamp, group, offset, bytes_leaf)
            images = None if cells is None else cells[offset]
            yield row_record(f"{file} row {row + offset}", index + offset, values, images, image, self.root)
