"""``llavactl train``: trains one stage, from cached or live features to a model folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core import plugins
from llavactl.core.errors import DataError, LlavactlError, ModelError, RecipeError
from llavactl.core.paths import exclusive_lock, json_text, write_atomic, write_json
from llavactl.core.registry import registry
from llavactl.data.encode import Encoding
from llavactl.data.split import DataSplit, load_split
from llavactl.features import open_features
from llavactl.model import folder as model_folder
from llavactl.model.build import ModelBundle
from llavactl.model.connector_check import validate_connector
from llavactl.model.quantized import import_bitsandbytes
from llavactl.recipe.load import dump
from llavactl.report.examples import example
from llavactl.report.page import write_report
from llavactl.report.plots import plot_loss
from llavactl.training import launch, stages
from llavactl.training.digest import stage_digest
from llavactl.training.initial_model import initial_folder, initial_model
from llavactl.training.loop import Run
from llavactl.training.loop import train as run_loop
from llavactl.training.optimizer import Optimizer
from llavactl.training.report import REPORT, TrainReport, create_report, finished_report
from llavactl.training.sample_answers import answer_samples
from llavactl.training.saving import model_description, save_model, trial_save

if TYPE_CHECKING:
    from llavactl.core.schema import ImageContents, ImageRef
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber

    ReadContents = Callable[[Sequence[ImageRef]], ImageContents]

log = logging.getLogger(__name__)


def train(
    recipe: Recipe, stage: StageNumber, resume: Literal["auto", "never"] = "auto", *, max_skipped: int | None = None
) -> TrainReport:
    """Trains ``stage`` of ``recipe`` into ``<run_dir>/stage<N>/``, or resumes it from its last checkpoint.

    Samples with an unreadable image are skipped; more than ``max_skipped`` such images are an error.

    Raises:
        LlavactlError: the stage can't be trained; as far as possible before any work.
    """
    chosen = recipe.stage(stage)
    settings = chosen.settings
    accelerator = launch.accelerator(settings.precision)
    if not chosen.sources:
        raise RecipeError(f"data.stage{stage} has no source", hint=f"add a source of records to `data.stage{stage}`")
    if settings.method == "qlora":
        import_bitsandbytes()
    folder = recipe.run_dir / f"stage{stage}"
    device = str(accelerator.device)
    features = open_features(recipe, stage, device=device)
    start = initial_folder(recipe, stage)
    bundle = initial_model(recipe, stage, start, features.shape)
    model = bundle.model
    width = model.language.get_input_embeddings().weight.shape[1]
    validate_connector(recipe.connector.spec(), features.shape, width, [settings.precision], device)

    template = registry().create("templates", chosen.template)
    encoding = Encoding(template, bundle.tokenizer, bundle.image_tokens, settings.max_length)
    contents = _limit_skipped(features.contents, max_skipped)
    data = load_split(chosen.sources, settings, encoding, features, contents, recipe.seed)
    if settings.method == "connector" and not any(sample.images for sample in data.train.samples):
        raise DataError(
            f"data.stage{stage}: no training sample has an image, so the connector can't be trained",
            hint="use text-only data in stage 2",
        )

    with accelerator.main_process_first():  # the other processes use the hashes that it cached
        digest = stage_digest(recipe, stage, features.fingerprint, data, start)
    if resume == "auto" and (report := finished_report(folder, digest, settings.restore_best)):
        return report
    if settings.restore_best and not len(data.validation):
        raise RecipeError(
            f"stage{stage}.restore_best needs validation samples, but none are held out"
            + (f" ({data.held_out})" if data.held_out else ""),
            hint=f"`-o stage{stage}.validation=0.05` holds out 5 % of the images",
        )

    if start is not None:
        model_folder.load_connector(model.connector, start)
    padding_reason = stages.padding_reason(model, settings, accelerator.device.type)
    rates = stages.configure_trainable(model, settings, recipe.seed)
    model.to(accelerator.device)
    optimizer = Optimizer(
        model,
        rates,
        settings.weight_decay,
        settings.adam_beta2,
        stages.muon_matrices(model, settings),
        stages.UntrainedState(model),
    )
    description = model_description(recipe, stage, features, digest, start)
    run = Run(
        model=model,
        optimizer=optimizer,
        settings=settings,
        data=data.train,
        validation=data.validation,
        shape=features.shape,
        folder=folder,
        seed=recipe.seed,
        digest=digest,
        resume=resume == "auto",
        padding_reason=padding_reason,
        accelerator=accelerator,
        notify=_hook_caller(stage, folder),
    )
    main = accelerator.is_main_process
    with _exclusive_access(recipe, stage, folder) if main else nullcontext():
        if main:
            write_atomic(recipe.run_dir / "recipe.yaml", dump(recipe))
            _write_skipped(folder, data)
        return _train_and_save(recipe, run, bundle, data, description)


def _train_and_save(
    recipe: Recipe, run: Run, bundle: ModelBundle, data: DataSplit, description: Mapping[str, Any]
) -> TrainReport:
    main, stage = run.accelerator.is_main_process, description["stage"]
    if main:
        trial_save(run, bundle, description)
    run.accelerator.wait_for_everyone()
    began = time.perf_counter()
    result = run_loop(run)
    seconds = time.perf_counter() - began
    if main:
        save_model(run.folder / "model", bundle, run.optimizer, description)
    report = create_report(stage, run, data, result, seconds)
    if main:
        write_json(run.folder / REPORT, asdict(report))
        with _optional(run.folder / "samples.json"):
            _write_sample_answers(recipe, run, bundle, data)
        with _optional(run.folder / "loss.png"):
            plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
        with _optional(recipe.run_dir / "report.html"):
            write_report(recipe.run_dir)
        plugins.notify("train_finished", report=asdict(report))
    run.accelerator.wait_for_everyone()
    return report


@contextmanager
def _optional(file: Path) -> Iterator[None]:
    """For outputs after the model is saved: an exception is logged as a warning."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - hours of training must not end in an error because of a plot
        reason = error.message if isinstance(error, LlavactlError) else f"{type(error).__name__}: {error}"
        log.warning("%s could not be written (%s); the model is saved", file, reason)


def _write_sample_answers(recipe: Recipe, run: Run, bundle: ModelBundle, data: DataSplit) -> None:
    rows = [
        example(run.folder / "samples", sample.turns, sample.reference, sample.answer)
        for sample in answer_samples(run.settings.image_order, recipe.eval.max_new_tokens, bundle, data)
    ]
    write_atomic(run.folder / "samples.json", json_text(rows, indent=2))


def _write_skipped(folder: Path, data: DataSplit) -> None:
    if data.held_out:
        log.log(logging.INFO if len(data.validation) else logging.WARNING, "held out for validation: %s", data.held_out)
    file = folder / "left_out.jsonl"
    if data.skipped:
        log.warning("%d samples are skipped; reasons are in %s", len(data.skipped), file)
    lines = (json_text(sample._asdict()) for sample in data.skipped)
    write_atomic(file, "".join(f"{line}\n" for line in lines))


def _limit_skipped(contents: ReadContents, max_skipped: int | None) -> ReadContents:
    """``contents``, raising DataError if more than ``max_skipped`` images can't be read."""

    def limited(images: Sequence[ImageRef]) -> ImageContents:
        result = contents(images)
        if max_skipped is not None and len(result.unreadable) > max_skipped:
            image, reason = next(iter(result.unreadable.items()))
            raise DataError(
                f"{len(result.unreadable)} images can't be read, more than --max-skipped {max_skipped}; the first is "
                f"{image.name}: {reason}",
                hint="list them with `llavactl data check`",
            )
        return result

    return limited


def _exclusive_access(recipe: Recipe, stage: int, folder: Path) -> Any:
    busy = ModelError(
        f"another process is training {folder}", hint="wait until it has finished, or give this run another `name`"
    )
    return exclusive_lock(recipe.run_dir / f".stage{stage}.lock", busy)


def _hook_caller(stage: int, folder: Path) -> Callable[[str, Mapping[str, Any]], None]:
    def notify(hook: str, facts: Mapping[str, Any]) -> None:
        extra = {"folder": folder} if hook == "train_started" else {}
        plugins.notify(hook, stage=stage, **extra, **facts)

    return notify
