"""Samples of several tables as one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core.schema import Sample

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef
    from llavactl.data.sample_table import SampleTable


@dataclass(frozen=True, eq=False)
class TableView(Sequence[Sample]):
    """The samples ``rows`` [N] of ``tables``, whose rows are numbered one table after another.

    ``images`` are the distinct images of all tables in order of first use. The images of row i are those at
    ``image_indices[image_ends[i] : image_ends[i + 1]]``.
    """

    tables: Sequence[SampleTable]
    starts: np.ndarray
    rows: np.ndarray
    images: Sequence[ImageRef]
    image_indices: np.ndarray
    image_ends: np.ndarray

    @classmethod
    def of(cls, tables: Sequence[SampleTable]) -> TableView:
        """All samples of ``tables``."""
        starts = np.cumsum([0, *map(len, tables)])
        images: dict[ImageRef, int] = {}
        indices = [np.empty(0, np.int64)]
        ends = [np.zeros(1, np.int64)]
        for table in tables:
            in_all = np.array([images.setdefault(image, len(images)) for image in table.images], np.int64)
            ends.append(table.image_ends[1:] + sum(map(len, indices)))
            indices.append(in_all[table.image_indices])
        rows = np.arange(starts[-1])
        return cls(tables, starts, rows, list(images), np.concatenate(indices), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        table, row = self._locate(index)
        return table[row]

    def select(self, indices: np.ndarray) -> TableView:
        """The samples ``indices`` of this view, in that order."""
        return replace(self, rows=self.rows[indices])

    def id(self, index: int) -> str:
        """The id of sample ``index``."""
        table, row = self._locate(index)
        return table.id(row)

    def where(self, index: int) -> str:
        """The location of sample ``index``."""
        table, row = self._locate(index)
        return table.where(row)

    def content(self, index: int) -> bytes:
        """Bytes that are equal for samples with the same turns, apart from which images these contain."""
        table, row = self._locate(index)
        return table.content(row)

    def digest_bytes(self, index: int, keys: Sequence[bytes]) -> list[bytes]:
        """See ``SampleTable.digest_bytes``; ``keys`` are parallel to ``images``."""
        table, row = self._locate(index)
        return table.digest_bytes(row, [keys[image] for image in self.images_of(index).tolist()])

    def images_of(self, index: int) -> np.ndarray:
        """The indices into ``images`` of sample ``index``."""
        row = self.rows.item(index)
        return self.image_indices[self.image_ends.item(row) : self.image_ends.item(row + 1)]

    def image_counts(self) -> np.ndarray:
        """The number of images of each sample [N]."""
        return np.diff(self.image_ends)[self.rows]

    def first_images(self) -> np.ndarray:
        """For each sample [N] the index into ``images`` of its first image; -1 without one."""
        if not len(self.image_indices):
            return np.full(len(self), -1)
        begins = np.minimum(self.image_ends[:-1], len(self.image_indices) - 1)[self.rows]
        return np.where(self.image_counts() > 0, self.image_indices[begins], -1)

    def _locate(self, index: int) -> tuple[SampleTable, int]:
        row = self.rows.item(index)
        if len(self.tables) == 1:
            return self.tables[0], row
        table = int(self.starts.searchsorted(row, "right")) - 1
        return self.tables[table], row - self.starts.item(table)
