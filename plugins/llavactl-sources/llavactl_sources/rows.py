"""Rows of tables as records: which columns are read, and the images of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llavactl import DataError, FollowLinks, ImageRef, ImageRoot, Options, RecipePlace, image_in
from llavactl_sources.forms import CONVERSATION_KEYS
from llavactl_sources.records import RecordWithImages, unique_name

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

IMAGE_COLUMNS = ("image", "images")


class RowOptions(Options):
    """Options of sources of tables. Columns without an option are recognized by their names."""

    images: RecipePlace | None = Field(
        None, description="what image paths are relative to, if images are not in the table; null: its folder"
    )
    follow_links: FollowLinks = False
    id_column: str | None = Field(None, description="column of the ids; null: `id`, if there is one")
    image_column: str | None = Field(None, description="column of an image or a list of them; null: `image`, `images`")
    conversation_column: str | None = Field(
        None, description="column of conversations; null: `conversations`, `messages`, `texts` and the like"
    )
    question_column: str | None = Field(None, description="column of questions; null: `question`")
    answer_column: str | None = Field(None, description="column of answers; null: `answer`")
    caption_column: str | None = Field(None, description="column of captions; null: `caption`, else `text`")


@dataclass(frozen=True)
class Cell:
    """An image of a row: its ``path`` (None: unknown), and whether its bytes are in the table."""

    path: str | None
    embedded: bool


@dataclass(frozen=True)
class Columns:
    """The key of each column's values in a record, and the column of ``image``, if any."""

    keys: Mapping[str, str]
    image: str | None


def columns_of(names: Sequence[str], binary: Sequence[str], options: RowOptions, where: str) -> Columns:
    """How the columns ``names`` are read, of which ``binary`` contain bytes.

    Raises:
        DataError: a column is missing, or it isn't known which column holds the images.
    """
    conversation = {
        "conversations": options.conversation_column,
        "question": options.question_column,
        "answer": options.answer_column,
        "caption": options.caption_column,
    }
    named = {key: column for key, column in {**conversation, "id": options.id_column}.items() if column is not None}
    image = options.image_column
    if missing := [column for column in (*named.values(), *([image] if image else [])) if column not in names]:
        raise DataError(f"{where}: missing column {missing[0]!r}", hint=f"available: {', '.join(names)}")
    if image is None:
        found = [name for name in IMAGE_COLUMNS if name in names]
        if len(found) > 1:
            raise DataError(f"{where}: both `image` and `images`", hint="set `image_column`")
        image = found[0] if found else None
        if image is None and binary:
            raise DataError(f"{where}: column {binary[0]!r} may hold images", hint="set `image_column`")
    hidden = {image, *named.values(), *named, *IMAGE_COLUMNS}
    if any(key in named for key in conversation):
        hidden |= set(CONVERSATION_KEYS)
    keys = {name: name for name in names if name not in hidden} | {column: key for key, column in named.items()}
    if not set(CONVERSATION_KEYS) & set(keys.values()):
        if "text" not in keys:
            raise DataError(
                f"{where}: no column of conversations, questions or captions",
                hint=f"set `conversation_column`, `question_column` and `answer_column`, or `caption_column`; "
                f"available: {', '.join(names)}",
            )
        keys["text"] = "caption"
    return Columns(keys, image)


def binary_columns(schema: pa.Schema) -> list[str]:
    """The columns that contain bytes."""
    return [field.name for field in schema if _has_bytes(field.type)]


def _has_bytes(column_type: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(column_type):
        return any(_has_bytes(field.type) for field in column_type)
    if types.is_list(column_type) or types.is_large_list(column_type):
        return _has_bytes(column_type.value_type)
    return bool(types.is_binary(column_type) or types.is_large_binary(column_type))


def readable(column_type: pa.DataType) -> bool:
    """Whether values of ``column_type`` are JSON: text, numbers, and lists and objects of these."""
    import pyarrow.types as types

    if types.is_struct(column_type):
        return all(readable(field.type) for field in column_type)
    if types.is_list(column_type) or types.is_large_list(column_type):
        return readable(column_type.value_type)
    plain = types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating, types.is_null
    return any(is_type(column_type) for is_type in plain)


def image_cells(array: pa.Array, *, embedded: bool = False) -> list[list[Cell]]:
    """The images of each row. With ``embedded``, every image without a field ``bytes`` is in the table."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_list(array.type) or types.is_large_list(array.type):
        cells = iter(_cells(array.flatten(), embedded=embedded))
        lengths = compute.list_value_length(array).to_pylist()
        return [[cell for _ in range(length or 0) if (cell := next(cells)) is not None] for length in lengths]
    return [[cell] if cell is not None else [] for cell in _cells(array, embedded=embedded)]


def _cells(array: pa.Array, *, embedded: bool) -> list[Cell | None]:
    """The image of each value; None for null."""
    import pyarrow.types as types

    valid = array.is_valid().to_pylist()
    if types.is_struct(array.type):
        names = [field.name for field in array.type]
        fields = dict(zip(names, array.flatten(), strict=True))
        paths = fields["path"].to_pylist() if "path" in fields else [None] * len(array)
        given = fields["bytes"].is_valid().to_pylist() if "bytes" in fields else [embedded] * len(array)
    elif types.is_string(array.type) or types.is_large_string(array.type):
        paths, given = array.to_pylist(), [False] * len(array)
    else:
        paths, given = [None] * len(array), valid
    return [
        Cell(path or None, in_table) if is_valid and (path or in_table) else None
        for path, in_table, is_valid in zip(paths, given, valid, strict=True)
    ]


def row_record(
    where: str,
    index: int,
    values: Mapping[str, Any],
    cells: Sequence[Cell] | None,
    embedded_image: Callable[[int, str], ImageRef],
    root: ImageRoot,
) -> RecordWithImages:
    """The record of a row: ``values`` by key, and its images; ``cells`` is None if there is no column of images.

    ``embedded_image(item, name)`` is the reference to the image ``item`` of the row.
    """
    images: dict[str, ImageRef] = {}
    error = ""
    for item, cell in enumerate(cells or ()):
        name = unique_name(cell.path or f"row {index}", images)
        try:
            images[name] = embedded_image(item, name) if cell.embedded else image_in(root, cell.path or "")
        except DataError as refused:
            error = error or refused.message
    value = dict(values) if cells is None else {**values, "images": list(images)}
    return RecordWithImages(where, value, index, images=images, image_error=error)
