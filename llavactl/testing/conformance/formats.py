"""Checks of formats."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import LlavactlError, ModelError
from llavactl.core.hashes import hash_folder
from llavactl.core.model_description import DESCRIPTION, read_description
from llavactl.core.paths import write_json
from llavactl.core.protocols import CheckableFormat
from llavactl.core.registry import registry
from llavactl.testing.conformance.boundary import conformance_check
from llavactl.testing.toys import TOY_METHODS, toy_model

if TYPE_CHECKING:
    import torch

    from llavactl.core.protocols import Format

TOLERANCE = 1e-4


@conformance_check("formats")
def check_format(export_format: Format, *, reads: bool = True) -> list[str]:
    """Checks exports of toy models: fully trained, with an adapter, and with a trained connector only.

    At least one must be written. The format must recognize it and no export in another format, and read it as a model
    with the same logits. A format that only writes recognizes no folder, and its ``read`` raises ModelError;
    ``reads=False`` requires this. The format must not change the model's folder.
    """
    reload: Any = export_format.reload
    if reload is not None and not (isinstance(reload, Path) and reload.is_file()):
        return [f"reload: expected the path of a script or None, got {reload!r}"]
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problems += _recognition_problems(export_format, folder)
        refused: list[str] = []
        models = {method: toy_model(folder / method, method=method) for method in TOY_METHODS}
        for method, model in models.items():
            to = folder / "exports" / method
            to.mkdir(parents=True)
            before = hash_folder(model)
            try:
                export_format.write(model, to)
            except ModelError as error:
                refused.append(error.message)
                continue
            if hash_folder(model) != before:
                problems.append(f"{method}: write() changes the model's folder")
            problems += [f"{method}: {problem}" for problem in _export_problems(export_format, model, to, reads=reads)]
        if len(refused) == len(TOY_METHODS):
            problems.append(f"write() refuses every toy model: {'; '.join(dict.fromkeys(refused))}")
        if isinstance(export_format, CheckableFormat):
            problems += _check_problems(export_format, models["full"])
    return problems


def _recognition_problems(export_format: Format, folder: Path) -> Iterator[str]:
    """Other folders that the format recognizes."""
    others = {
        "an empty folder": {},
        "a text file": {"notes.txt": "text"},
        "a language model": {"config.json": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})},
    }
    for index, (what, files) in enumerate(others.items()):
        other = folder / f"other-{index}"
        other.mkdir()
        for name, text in files.items():
            (other / name).write_text(text, encoding="utf-8")
        recognised: Any = export_format.recognise(other)
        if recognised is not False:
            yield f"recognise() returns {recognised!r} for {what}, expected False"


def _export_problems(export_format: Format, model: Path, to: Path, *, reads: bool) -> Iterator[str]:
    if not any(to.iterdir()):
        yield "write() writes no files"
        return
    recognised: Any = export_format.recognise(to)
    if not reads:
        if recognised:
            yield "recognise() returns True, but the format only writes"
        return
    if recognised is not True:
        if recognised is not False or not _refuses_to_read(export_format, to):
            yield f"recognise() returns {recognised!r} for its own export, expected True; False if read() refuses it"
        return
    own = type(export_format)
    for name in registry().names("formats"):
        with suppress(LlavactlError):  # a broken plugin, or options that another format needs
            other = registry().create("formats", name)
            if type(other) is not own and other.recognise(to):
                yield f"format {name} recognizes the export as well"
    back = to.with_name(f"{to.name}-read")
    back.mkdir()
    export_format.read(to, back)
    yield from _read_problems(model, back)


def _refuses_to_read(export_format: Format, to: Path) -> bool:
    """Whether ``read`` raises ModelError, as that of a format that only writes does."""
    with tempfile.TemporaryDirectory() as name:
        try:
            export_format.read(to, Path(name))
        except ModelError:
            return True
    return False


def _read_problems(model: Path, back: Path) -> Iterator[str]:
    """Differences between ``model`` and the model folder ``back`` that was read from its export."""
    if not (back / DESCRIPTION).is_file():
        yield "read() writes no model folder: call llavactl.save_model"
        return
    # A recipe supplies what the format doesn't store.
    original: Mapping[str, Any] = read_description(model)
    described: Mapping[str, Any] = read_description(back)
    missing = {key: original[key] for key, value in described.items() if value is None and key in original}
    write_json(back / DESCRIPTION, {**described, **missing})
    try:
        expected, actual = _logits(model), _logits(back)
    except ModelError as error:
        yield f"the model that read() writes can't be loaded: {error.with_hint()}"
        return
    rows = expected.shape[-1]
    difference = (actual[..., :rows] - expected).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item():
        yield f"after reading the export, logits differ by up to {difference:.3g}"


def _logits(folder: Path) -> torch.Tensor:
    """The logits [1, T, V] of the model in ``folder`` for an image and a few tokens, in float32."""
    import torch

    from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Batch
    from llavactl.model.folder import load

    loaded = load(folder, dtype="float32")
    shape = loaded.description["shape"]
    patches = shape["prefix"] + shape["grid"][0] * shape["grid"][1]
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * loaded.bundle.image_tokens, 5, 6, 7]])
    features = torch.randn((1, patches, shape["width"]), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORE), features)
    with torch.no_grad():
        return loaded.bundle.model.logits(batch)


def _check_problems(export_format: CheckableFormat, model: Path) -> Iterator[str]:
    """``check`` must accept the components of toys, which every format supports that can write one of them."""
    from llavactl.components.formats.native import open_model

    saved = open_model(model)
    description = saved.description
    try:
        export_format.check(
            description["vision"], description["connector"], saved.language(merged=False), saved.tokenizer()
        )
    except ModelError as error:
        yield f"check() refuses the components of a toy model that write() accepts: {error.message}"
