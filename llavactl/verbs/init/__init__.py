"""``llavactl init``: writes a recipe for given data, models and device memory."""

from __future__ import annotations

import re
import shlex
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llavactl.core.devices import available_devices
from llavactl.core.errors import Problem, RecipeError
from llavactl.core.locations import shown_path
from llavactl.core.paths import expand_user, json_text, write_atomic
from llavactl.core.quantities import gigabytes
from llavactl.curation.recognize import RecognizedData, recognize
from llavactl.recipe.resolve import DEFAULT
from llavactl.recipe.schema import schema
from llavactl.recipe.stages import STAGES
from llavactl.training.prediction.target import Target, target_device
from llavactl.verbs.init.memory import LONGEST, planned, recipe_location, with_lengths
from llavactl.verbs.init.models import HUB_MODELS, default_models, language_choice, vision_choice
from llavactl.verbs.init.settings import MemorySettings, StageFacts
from llavactl.verbs.init.text import SCHEMA_FILE, RecipeFacts, recipe_text
from llavactl.verbs.plan import check_memory
from llavactl.verbs.preflight import problems


@dataclass(frozen=True)
class DataFile:
    """Data of the recipe: what ``recognize`` found."""

    source: Mapping[str, Any]
    content: str
    samples: int
    exact: bool
    unusable: int


@dataclass(frozen=True)
class InitReport:
    """The new recipe: ``text``, at ``recipe`` if it was ``written``; ``schema`` is the file of its JSON schema, if any.

    ``peak_bytes``: the predicted peak of a device's memory per stage (on a CPU: of one process); None if unknown.
    ``assumes``: the lengths that it is predicted for, micro-batches of ``samples`` samples of ``tokens`` tokens.
    ``stage_fits``: whether a stage does, ``fits``: whether all do; None if unknown. ``warnings``: as
    ``recipes check``, and what isn't certain. ``next``: the commands to continue with.
    """

    recipe: str
    written: bool
    schema: str | None
    data: tuple[DataFile, ...]
    vision: Mapping[str, Any]
    language: Mapping[str, Any]
    template: str
    device: Mapping[str, Any]
    method: str
    peak_bytes: Mapping[str, int | None]
    assumes: Mapping[str, Mapping[str, int] | None]
    stage_fits: Mapping[str, bool | None]
    fits: bool | None
    warnings: tuple[str, ...]
    next: tuple[str, ...]
    text: str


def init(
    data: Sequence[str],
    *,
    images: str | None = None,
    options: Mapping[str, Any] | None = None,
    vision: str | None = None,
    language: str | None = None,
    method: str | None = None,
    device_memory: int | None = None,
    devices: int | None = None,
    name: str | None = None,
    to: Path | None = None,
    force: bool = False,
    json_schema: bool = False,
    dry_run: bool = False,
) -> InitReport:
    """Writes a recipe that trains an assistant on ``data`` (files, folders or sources); nothing with ``dry_run``.

    ``options`` are those of the only source in ``data``, ``images`` the root of its image paths. ``device_memory`` in
    bytes: for GPUs of this size; default: this machine. ``devices``: their number, one process each; default: 1.

    Raises:
        MissingAnswerError: the root of the images can't be recognized.
        LlavactlError: data or a model can't be used, or the file exists.
    """
    file = _destination(to, replace_existing=force or dry_run)
    if to is not None or not dry_run:  # a dry run without a destination is for stdout
        _require_writable(file)
    target = target_device(device_memory, devices)
    defaults = default_models(cuda=target.cuda)
    recognized = [recognize(each, images, options) for each in data]
    backbone, model = vision_choice(vision or defaults[0]), language_choice(language or defaults[1])
    by_stage = _by_stage(recognized)
    precision = _precision(target, device_memory)
    facts = RecipeFacts(
        name=_name(data[0]) if name is None else name,
        folder=file.absolute().parent,
        absolute=any(expand_user(each).is_absolute() for each in (*data, *filter(None, (images, vision, language)))),
        vision=backbone,
        language=model,
        data=by_stage,
        stages={stage: _stage_facts(stage, by_stage[stage], by_stage, precision, model.template) for stage in STAGES},
        device=_device_text(target),
        planning="".join(
            [
                f" --device-memory {target.memory_bytes / 1e9:g}GB" if device_memory else "",
                f" --devices {target.count}" if devices else "",
            ]
        ),
        method=method or "full",
        method_reason="",
        compute=precision,
        schema=json_schema,
        file=file.name if file == Path(DEFAULT) else shlex.quote(str(file)),
    )
    facts = with_lengths(facts)
    plan = planned(facts, target, method)
    facts = replace(
        facts,
        method=plan.method,
        method_reason=plan.reason,
        stages={stage: replace(each, memory=plan.stages[stage].settings) for stage, each in facts.stages.items()},
    )
    text = recipe_text(facts)
    known_to_fit = plan.fits is True
    warnings = [
        *_checked(text, facts, device_memory, devices, known_to_fit=known_to_fit),
        *_uncertain(facts, recognized, vision, language),
    ]
    schema_file = file.parent / SCHEMA_FILE if json_schema else None
    if not dry_run:
        if schema_file is not None:
            _write(schema_file, json_text(schema(), indent=2) + "\n")
        _write(file, text)
    return InitReport(
        recipe=str(file),
        written=not dry_run,
        schema=None if schema_file is None else str(schema_file),
        data=tuple(DataFile(each.spec, each.content, each.samples, each.exact, each.unusable) for each in recognized),
        vision=backbone.spec,
        language=model.spec,
        template=model.template,
        device={"kind": target.kind, "count": target.count, "memory_bytes": target.memory_bytes},
        method=plan.method,
        peak_bytes={STAGES[stage]: each.peak for stage, each in plan.stages.items()},
        assumes={STAGES[stage]: each.assumes and each.assumes._asdict() for stage, each in plan.stages.items()},
        stage_fits={STAGES[stage]: each.fits for stage, each in plan.stages.items()},
        fits=plan.fits,
        warnings=tuple(dict.fromkeys(warnings)),
        next=tuple(_next_commands(facts, file, target.count)),
        text=text,
    )


def _destination(to: Path | None, *, replace_existing: bool) -> Path:
    """The file to write: ``to``, ``recipe.yaml`` in the folder ``to``, or ``./recipe.yaml``."""
    file = to or Path(DEFAULT)
    file = file / DEFAULT if file.is_dir() else file
    if file.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{file}: expected the suffix .yaml", hint="the name of a recipe file ends with .yaml")
    if not file.absolute().parent.is_dir():
        raise RecipeError(f"{shown_path(file.parent)}: no such folder", hint="create the folder of the recipe first")
    if file.exists() and not replace_existing:
        raise RecipeError(f"{shown_path(file)} exists", hint="pass --force to overwrite it, or --to another file")
    return file


def _require_writable(file: Path) -> None:
    """Raises a RecipeError if no file can be created in the folder of ``file``.

    Permissions don't tell for root, nor for file systems without files: an unnamed file does.
    """
    try:
        with tempfile.TemporaryFile(dir=file.absolute().parent):
            pass
    except OSError as error:
        raise _unwritable(file, error) from error


def _write(file: Path, text: str) -> None:
    try:
        write_atomic(file, text)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> RecipeError:
    return RecipeError(f"{shown_path(file)} can't be written: {error.strerror}", hint="pass --to another file")


def _name(data: str) -> str:
    """A name for the run, from that of the data."""
    path = expand_user(data).absolute()
    ascii_name = unicodedata.normalize("NFKD", path.stem if path.is_file() else path.name).encode("ascii", "ignore")
    return re.sub(r"[^a-z0-9._]+", "-", ascii_name.decode().lower()).strip("-._") or "my-run"


def _by_stage(data: Sequence[RecognizedData]) -> dict[int, list[RecognizedData]]:
    """Captions for stage 1 and conversations for stage 2; the same data for both if there is one kind only."""
    captions = [each for each in data if each.content == "captions"]
    conversations = [each for each in data if each.content == "conversations"]
    return {1: captions or conversations, 2: conversations or captions}


def _precision(target: Target, device_memory: int | None) -> str:
    if device_memory is not None:
        return "bfloat16"  # of a GPU that isn't here; all with 24 GB and more since 2020 support it
    devices = available_devices()
    planned = [each for each in devices if each.name.startswith("cuda")] if target.cuda else devices[:1]
    return "bfloat16" if all("bfloat16" in each.dtypes for each in planned) else "float32"


def _device_text(target: Target) -> str:
    kind, size = "GPU" if target.cuda else "CPU", gigabytes(target.memory_bytes)
    if target.count == 1:
        return f"a {kind} with {size}"
    return f"{target.count} GPUs with {size} each" if target.cuda else f"{target.count} processes on a CPU with {size}"


def _stage_facts(
    stage: int,
    data: Sequence[RecognizedData],
    by_stage: Mapping[int, Sequence[RecognizedData]],
    precision: str,
    template: str,
) -> StageFacts:
    samples = sum(each.samples for each in data)
    images = {image for each in data for sample in each.first for image in sample.images}
    first = sum(len(each.first) for each in data)
    questions = stage == 1 and by_stage[1][0].content == "conversations"
    return StageFacts(
        samples=samples,
        images=round(len(images) / max(1, first) * sum(each.samples for each in data)),
        max_length=LONGEST,
        length_reason="LLaVA's",
        precision=precision,
        template=template if questions else None,
        memory=MemorySettings(),
    )


_OPTIONS = {
    "name": "--name",
    "vision": "--vision",
    "connector": "--vision and --language",
    "language": "--language",
    "data": "--data",
    "stage2.method": "--method",
}
"""The option that a key of the recipe comes from."""


def _origin(key: str) -> str:
    """What ``key`` of the recipe comes from: an option, since the file doesn't exist yet."""
    parents = (key.rsplit(".", count)[0] for count in range(key.count(".") + 1))
    return next((_OPTIONS[each] for each in parents if each in _OPTIONS), f"{key} of the new recipe")


def _checked(
    text: str, facts: RecipeFacts, device_memory: int | None, devices: int | None, *, known_to_fit: bool
) -> list[str]:
    """The warnings of ``recipes check``: none about memory if all stages are ``known_to_fit``.

    Raises:
        RecipeError: it would find problems.
    """
    with recipe_location(text, facts) as location:
        if found := problems(location):
            moved = dict.fromkeys(Problem(_origin(each.key), "", each.why) for each in found)
            raise RecipeError.from_problems(list(moved), hint="nothing was written; change these options")
        return [] if known_to_fit else check_memory(location, (), device_memory, devices).warnings


def _uncertain(
    facts: RecipeFacts, data: Sequence[RecognizedData], vision: str | None, language: str | None
) -> Iterator[str]:
    """Warnings about what was assumed."""
    if unusable := sum(each.unusable for each in data):
        yield f"{unusable} of the first records can't be used; `llavactl data check` lists their problems"
    if not vision and not language and facts.vision.spec.get("model") == HUB_MODELS[0]:
        yield "no models named: those of LLaVA v1.5 7B, 14 GB, which are downloaded from the hub on first use"
    elif not vision and not language:
        yield "no models named: the recipe has the small models of the demo; name others with --vision and --language"
    if not facts.language.here:
        name = facts.language.spec["model"]
        yield f"language model {name} is not on this machine: its template was {facts.language.why}"


def _next_commands(facts: RecipeFacts, file: Path, processes: int) -> Iterator[str]:
    recipe = "" if file == Path(DEFAULT) else f" -r {shlex.quote(str(file))}"
    yield f"llavactl data check{recipe}"
    yield f"llavactl extract{recipe} --dry-run"
    yield f"{'llavactl' if processes == 1 else f'torchrun --nproc-per-node {processes} -m llavactl'} run{recipe}"
    model = Path("runs", facts.name, "stage2", "model")
    yield f"llavactl chat --model {shlex.quote(str(file.parent / model))}"
