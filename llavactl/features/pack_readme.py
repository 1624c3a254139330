"""README.md of a feature pack: what it contains, how it is used, and its license."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavactl.core.quantities import BYTE, quantity
from llavactl.features.pack import IMAGES, PACK
from llavactl.features.pack_selection import StoreSelection


@dataclass(frozen=True)
class ExportedStore:
    """``images`` of a store, in ``shards`` shards of the pack with ``bytes`` bytes."""

    fingerprint: str
    images: int
    shards: int
    bytes: int


def readme(
    name: str,
    selections: Sequence[StoreSelection],
    stores: Sequence[ExportedStore],
    images: int,
    licenses: Sequence[str],
) -> str:
    """README.md of the pack ``name`` with ``stores``, made of ``selections``, and the names of ``images`` images."""
    rows = []
    for selection, store in zip(selections, stores, strict=True):
        shape, fields = selection.manifest.shape, selection.fingerprint
        grid = f"{shape.grid[0]}×{shape.grid[1]}" + (f" + {shape.prefix}" if shape.prefix else "")
        size = quantity(store.bytes, BYTE)
        backbone = Path(selection.backbone).name or "unknown"
        rows.append(f"| {fields.id} | {backbone} | {grid} × {shape.width} {fields.dtype} | {store.images:,} | {size} |")
    return "\n".join([
        f"# {name}",
        "",
        "Features of a frozen vision encoder, computed by llavactl, to train where the images are not.",
        "",
        "| store | encoder | features of an image | images | size |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"`{IMAGES}` has the names of {images:,} images. `{PACK}` has the sha256 of every file.",
        "",
        "## Use",
        "",
        "In the folder of the recipe, with the same records and models:",
        "",
        "```sh",
        f"llavactl cache import path/to/{name}",
        "llavactl train --stage 1",
        "```",
        "",
        "The shards are plain HDF5 files. Features can reveal what an image shows.",
        "",
        "## License",
        "",
        *(licenses or ["Unknown."]),
        "",
    ])  # fmt: skip


def license_items(text: str, selections: Sequence[StoreSelection], license_of: Callable[[str], str]) -> list[str]:
    """The license note ``text``, if any, and the license of each backbone by ``license_of``."""
    backbones = dict.fromkeys(selection.backbone for selection in selections if selection.backbone)
    return [*([f"- features: {text}"] if text else []), *map(license_of, backbones)]
