"""References to images as flat arrays.

A reference that can be stored is a dataclass whose fields are strings, numbers, booleans or None. The fields that its
class names in ``shared_fields``, such as the root of paths or the shard that contains the images, are stored once for
all images with the same values.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from llavactl.core.registry import import_target
from llavactl.core.schema import ImageRef
from llavactl.core.typed import has_methods
from llavactl.data.packed_strings import PackedStrings, int32

_SCALARS = (str, int, float, bool, type(None))


class _Layout(NamedTuple):
    """How images of a class are stored: ``target`` is its ``module:name``, ``own`` are the fields stored per image."""

    kind: Callable[..., Any]
    target: str
    shared: tuple[str, ...]
    own: tuple[str, ...]

    def item(self, image: ImageRef) -> str:
        values = [getattr(image, name) for name in self.own]
        if self.own == ("path",):
            return values[0]
        return _json(values)

    def reader(self, shared: Sequence[Any]) -> Callable[[str], Any]:
        """A function from an item to its image, with the values ``shared``."""
        image = partial(self.kind, **dict(zip(self.shared, shared, strict=True)))
        if self.own == ("path",):
            return lambda item: image(path=item)
        return lambda item: image(**dict(zip(self.own, json.loads(item), strict=True)))


def image_arrays(images: Sequence[ImageRef]) -> dict[str, np.ndarray]:
    """``images`` as arrays; {} if some of them can't be stored."""
    groups: dict[str, int] = {}
    group_of_image, items = array("i"), []
    try:
        for image in images:
            layout = _layout(type(image))
            shared = [getattr(image, name) for name in layout.shared]
            group = f"[{json.dumps(layout.target)}, {json.dumps([*layout.shared, *layout.own])}, {_json(shared)}]"
            item = layout.item(image)
            if group not in groups and layout.reader(shared)(item) != image:
                return {}
            group_of_image.append(groups.setdefault(group, len(groups)))
            items.append(item)
    except (TypeError, ValueError):  # a field isn't JSON, or the class isn't such a dataclass
        return {}
    strings = PackedStrings.of(items)
    return {
        "image_groups": np.frombuffer(json.dumps([json.loads(group) for group in groups]).encode(), np.uint8),
        "image_group": int32(group_of_image),
        "image_paths": strings.data,
        "image_path_lengths": strings.lengths,
    }


def decoded_images(arrays: Mapping[str, np.ndarray]) -> Iterator[ImageRef]:
    """The images of ``image_arrays``.

    Raises:
        ValueError: the class of an image has changed since they were stored.
    """
    items = PackedStrings(arrays["image_paths"], arrays["image_path_lengths"])
    try:
        groups = json.loads(arrays["image_groups"].tobytes())
        layouts = {target: _layout(import_target(target)) for target in {target for target, _, _ in groups}}
        if any(names != [*layouts[target].shared, *layouts[target].own] for target, names, _ in groups):
            raise TypeError("their class has other fields")
        readers = [layouts[target].reader(shared) for target, _, shared in groups]
        for group, item in zip(arrays["image_group"].tolist(), items, strict=True):
            yield readers[group](item)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"images can't be read back: {error}") from error


@cache
def _layout(kind: type) -> _Layout:
    """The layout of images of the class ``kind``.

    Raises:
        TypeError: they can't be stored.
    """
    if not is_dataclass(kind) or not isinstance(kind, type) or not has_methods(kind, "read", "stamp"):
        raise TypeError(f"{kind!r} is not a reference to an image with fields")
    names = [each.name for each in fields(kind)]
    shared = tuple(name for name in names if name in getattr(kind, "shared_fields", ()))
    own = tuple(name for name in names if name not in shared)
    return _Layout(kind, f"{kind.__module__}:{kind.__qualname__}", shared, own)


def _json(values: Sequence[Any]) -> str:
    """``values`` as JSON that is read back as the same values.

    Raises:
        TypeError: it wouldn't be, such as a tuple, which becomes a list.
    """
    if not all(type(value) in _SCALARS for value in values):
        raise TypeError("a field is not a string, number, boolean or None")
    return json.dumps(values)
