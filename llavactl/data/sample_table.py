"""Samples as flat arrays: compact in memory, cached on disk, and decoded one at a time.

As objects, the 665,000 conversations of LLaVA's v1.5 mix take 2.6 GB in every process and over a minute to read. As a
table they take 0.8 GB, which all processes share, and a start of training reads no record again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from llavactl.core.schema import Box, Content, ImageRef, Role, Sample, Turn
from llavactl.data.array_cache import Arrays, hash_arrays
from llavactl.data.image_arrays import decoded_images, image_arrays
from llavactl.data.packed_strings import PackedStrings, decoded, ends, int32

_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_TURN = {role: -1 - index for index, role in enumerate(_ROLES)}
_IMAGE = -4
"""Entries of ``parts``: the start of a turn, an image, and (0 or more) the bytes of a text."""

_COLUMNS = (
    "ids",
    "id_lengths",
    "wheres",
    "where_lengths",
    "bodies",
    "body_lengths",
    "parts",
    "part_counts",
    "image_indices",
    "image_counts",
    "image_cuts",
)
"""The arrays of a table besides ``boxes`` (JSON) and the arrays of its images."""


class SampleTable(Sequence[Sample]):
    """Samples in a fixed order, with id, turns, ``where`` and boxes; captions and ``extra`` are not kept.

    ``images`` are the distinct images in order of first use; those of sample i are at
    ``image_indices[image_ends[i] : image_ends[i + 1]]``. ``digest`` is a hash of all contents, equal for tables with
    the same samples.
    """

    def __init__(self, arrays: Arrays, images: Sequence[ImageRef] | None = None) -> None:
        """A table of arrays that ``SampleTableBuilder.table`` or ``SampleTable.arrays`` made."""
        self._columns = dict(arrays)
        self._ids = PackedStrings(arrays["ids"], arrays["id_lengths"])
        self._wheres = PackedStrings(arrays["wheres"], arrays["where_lengths"])
        self._bodies = PackedStrings(arrays["bodies"], arrays["body_lengths"])
        self._parts: np.ndarray = arrays["parts"]
        self._part_ends = ends(arrays["part_counts"])
        self.image_indices: np.ndarray = arrays["image_indices"]
        self.image_ends = ends(arrays["image_counts"])
        self._cuts: np.ndarray = arrays["image_cuts"]
        self._boxes: dict[str, list[Any]] = json.loads(arrays["boxes"].tobytes() or b"{}")
        self.images = list(decoded_images(arrays)) if images is None else images

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> SampleTable:
        """The table of ``samples``."""
        builder = SampleTableBuilder()
        for sample in samples:
            builder.append(sample)
        return builder.table()

    @classmethod
    def joined(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """The samples of ``tables``, one table after another."""
        images: dict[ImageRef, int] = {}
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        boxes: dict[int, Any] = {}
        rows = 0
        for table in tables:
            for name, arrays in columns.items():
                arrays.append(table._columns[name])
            indices = np.array([images.setdefault(image, len(images)) for image in table.images], np.int32)
            columns["image_indices"][-1] = indices[table.image_indices]
            boxes |= {rows + int(row): value for row, value in table._boxes.items()}
            rows += len(table)
        empty = SampleTableBuilder().table()._columns if not tables else {}
        joined = {name: np.concatenate(arrays) if arrays else empty[name] for name, arrays in columns.items()}
        return cls({**joined, "boxes": _json_array(boxes), **image_arrays(list(images))}, list(images))

    def part(self, start: int, stop: int) -> SampleTable:
        """The samples from row ``start`` to before ``stop`` or the end; arrays are views."""
        stop = min(stop, len(self))
        parts = slice(self._part_ends.item(start), self._part_ends.item(stop))
        cuts = slice(self.image_ends.item(start), self.image_ends.item(stop))
        columns = {
            name: self._columns[name][start:stop]
            for name in ("id_lengths", "where_lengths", "body_lengths", "part_counts", "image_counts")
        }
        for name, strings in (("ids", self._ids), ("wheres", self._wheres), ("bodies", self._bodies)):
            columns[name] = strings.data[strings.ends.item(start) : strings.ends.item(stop)]
        images = list(dict.fromkeys(self.image_indices[cuts].tolist()))
        index = {image: position for position, image in enumerate(images)}
        boxes = {row - start: value for row in range(start, stop) if (value := self._boxes.get(str(row)))}
        return SampleTable(
            {
                **columns,
                "parts": self._parts[parts],
                "image_indices": np.array([index[image] for image in self.image_indices[cuts].tolist()], np.int32),
                "image_cuts": self._cuts[cuts],
                "boxes": _json_array(boxes),
            },
            [self.images[image] for image in images],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleTable, ({name: self._columns[name] for name in (*_COLUMNS, "boxes")}, self.images)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: Any) -> Any:
        row = range(len(self))[row]
        body: Any = self._bodies.bytes(row)
        if ascii_only := body.isascii():
            body = body.decode()  # slicing a string is faster than decoding each part
        images = iter(self._image_indices(row))
        turns: list[Turn] = []
        role: Role | None = None
        content: list[Content] = []
        position = 0
        for part in self._parts[self._part_ends.item(row) : self._part_ends.item(row + 1)].tolist():
            if part >= 0:
                end = position + 1 + part
                content.append(body[position + 1 : end] if ascii_only else decoded(body[position + 1 : end]))
                position = end
            elif part == _IMAGE:
                content.append(self.images[next(images)])
                position += 1
            else:
                if role is not None:
                    turns.append(Turn(role, tuple(content)))
                role, content = _ROLES[-1 - part], []
                position += len(role)
        if role is not None:
            turns.append(Turn(role, tuple(content)))
        boxes = tuple(Box(name, tuple(xyxy), crowd) for name, xyxy, crowd in self._boxes.get(str(row), ()))
        return Sample(self._ids[row], tuple(turns), self._wheres[row], boxes=boxes)

    def _image_indices(self, row: int) -> list[int]:
        indices: list[int] = self.image_indices[self.image_ends.item(row) : self.image_ends.item(row + 1)].tolist()
        return indices

    def id(self, row: int) -> str:
        """The id of sample ``row``."""
        return str(self._ids[row])

    def where(self, row: int) -> str:
        """The location of sample ``row`` in its source."""
        return str(self._wheres[row])

    def content(self, row: int) -> bytes:
        """Bytes that are equal for samples with the same turns, apart from which images these contain."""
        parts = self._parts[self._part_ends.item(row) : self._part_ends.item(row + 1)]
        return parts.tobytes() + self._bodies.bytes(row)

    def digest_bytes(self, row: int, keys: Sequence[bytes]) -> list[bytes]:
        r"""The turns of sample ``row`` as bytes to hash: the role and the parts of each, separated by ``\0``.

        An image is ``\0`` and its key; ``keys`` has one for each image of the sample.
        """
        body = self._bodies.bytes(row)
        if not keys:
            return [body]
        begin = 0
        pieces = []
        cuts = self._cuts[self.image_ends.item(row) : self.image_ends.item(row + 1)].tolist()
        for key, cut in zip(keys, cuts, strict=True):
            pieces += [body[begin:cut], b"\0", key]
            begin = cut
        return [*pieces, body[begin:]]

    @cached_property
    def digest(self) -> str:
        """A hash of the table's contents, in which images count by what they refer to."""
        images = (
            {} if "image_paths" in self._columns else {"images": np.frombuffer(repr(self.images).encode(), np.uint8)}
        )
        return hash_arrays({**self._columns, **images})

    @property
    def arrays(self) -> Arrays | None:
        """The table as arrays to cache; None if it has images that can't be stored (``image_arrays``)."""
        return self._columns if "image_paths" in self._columns else None


class SampleTableBuilder:
    """Collects samples for a SampleTable."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._wheres: list[str] = []
        self._bodies = bytearray()
        self._body_lengths, self._parts, self._part_counts = array("i"), array("i"), array("i")
        self._image_indices, self._image_counts, self._cuts = array("i"), array("i"), array("i")
        self._images: dict[ImageRef, int] = {}
        self._boxes: dict[int, Any] = {}

    def append(self, sample: Sample) -> None:
        """Adds ``sample`` at the end."""
        parts, cuts = self._parts, self._cuts
        parts_before, cuts_before, images = len(parts), len(cuts), self._images
        pieces: list[str] = []
        for turn in sample.turns:
            parts.append(_TURN[turn.role])
            pieces.append(turn.role)
            for part in turn.content:
                pieces.append("\0")
                if isinstance(part, str):
                    parts.append(len(part))
                    pieces.append(part)
                else:
                    parts.append(_IMAGE)
                    cuts.append(len(pieces))
                    self._image_indices.append(images.setdefault(part, len(images)))
        text = "".join(pieces)
        body = text.encode("utf-8", "surrogatepass")
        lengths = list(map(len, pieces))
        if len(body) != len(text):
            lengths = [_bytes(piece) for piece in pieces]
            parts[parts_before:] = array("i", _parts_in_bytes(sample.turns))
        if len(cuts) > cuts_before:
            ends = [0, *accumulate(lengths)]
            for index in range(cuts_before, len(cuts)):
                cuts[index] = ends[cuts[index]]
        if sample.boxes:
            self._boxes[len(self._ids)] = [(box.category, box.xyxy, box.crowd) for box in sample.boxes]
        self._ids.append(sample.id)
        self._wheres.append(sample.where)
        self._bodies += body
        self._body_lengths.append(len(body))
        self._part_counts.append(len(parts) - parts_before)
        self._image_counts.append(len(cuts) - cuts_before)

    def table(self) -> SampleTable:
        """The table of all samples."""
        ids, wheres = PackedStrings.of(self._ids), PackedStrings.of(self._wheres)
        images = list(self._images)
        arrays = {
            "ids": ids.data,
            "id_lengths": ids.lengths,
            "wheres": wheres.data,
            "where_lengths": wheres.lengths,
            "bodies": np.frombuffer(self._bodies, np.uint8),
            "body_lengths": int32(self._body_lengths),
            "parts": int32(self._parts),
            "part_counts": int32(self._part_counts),
            "image_indices": int32(self._image_indices),
            "image_counts": int32(self._image_counts),
            "image_cuts": int32(self._cuts),
            "boxes": _json_array(self._boxes),
            **image_arrays(images),
        }
        return SampleTable(arrays, images)


def _json_array(value: Any) -> np.ndarray:
    """``value`` as JSON text (uint8)."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _parts_in_bytes(turns: Sequence[Turn]) -> Iterator[int]:
    """The entries of ``turns`` in ``parts``, with lengths in bytes instead of characters."""
    for turn in turns:
        yield _TURN[turn.role]
        yield from (_bytes(part) if isinstance(part, str) else _IMAGE for part in turn.content)
