"""``llavactl train``: train one stage, from cached or live features to a model folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.chat.assistant import Assistant
from llavactl.core import plugins, progress
from llavactl.core.errors import DataError, ModelError, RecipeError
from llavactl.core.identity import component_identity
from llavactl.core.paths import exclusive_lock, json_text, write_atomic, write_json
from llavactl.core.registry import registry
from llavactl.data.encode import Encoding
from llavactl.data.split import DataSplit, load_split, log_held_out, write_skipped
from llavactl.features import open_features
from llavactl.model import folder as model_folder
from llavactl.model.build import ModelBundle, connector_tokens
from llavactl.model.connector_check import validate_connector
from llavactl.model.quantized import import_bitsandbytes
from llavactl.recipe.load import dump
from llavactl.recipe.specs import spec_of
from llavactl.recipe.stages import STAGES
from llavactl.report.examples import example
from llavactl.report.optional import optional_output
from llavactl.report.page import refreshed, report_page, write_report
from llavactl.report.plots import log_missing_plots, plot_loss, plots_available
from llavactl.training import launch
from llavactl.training.collective import lost_processes_reported, on_main
from llavactl.training.digest import stage_digest
from llavactl.training.initial_model import initial_folder, initial_language, initial_model
from llavactl.training.loop import train as run_loop
from llavactl.training.out_of_memory import out_of_memory_named
from llavactl.training.placement import requested_placement
from llavactl.training.prediction.settle import choice_for_training, settled
from llavactl.training.report import REPORT, TrainReport, create_report, finished_report
from llavactl.training.run import create_run
from llavactl.training.sample_answers import answer_samples, shown_samples
from llavactl.training.saving import model_description, save_model, trial_save
from llavactl.training.sharding import root_gathered
from llavactl.training.sharing import finished_stage, remove_link, share_stage
from llavactl.training.trackers import check_trackers, recording
from llavactl.verbs.evaluate_every import periodic_evaluation
from llavactl.verbs.preview import AnswerPreview, preview, remove_previews

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.schema import FeatureShape
    from llavactl.data.sample_set import SampleSet
    from llavactl.features import FeatureReader
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber, TrainingStage
    from llavactl.training.loop import TrainingResult
    from llavactl.training.prediction.predict import Choice
    from llavactl.training.run import Run


log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    stage: StageNumber,
    resume: Literal["auto", "never"] = "auto",
    *,
    max_skipped: int | None = None,
    shared_with: Sequence[Path] = (),
) -> TrainReport:
    """Trains ``stage`` of ``recipe`` into ``<run_dir>/stage<N>/``, or resumes it from its last checkpoint.

    Samples with an unreadable image are skipped; more than ``max_skipped`` such images are an error. If a run folder in
    ``shared_with`` has the same stage, finished with the same inputs, it is linked and not trained again.

    Raises:
        LlavactlError: the stage can't be trained; raised before training if the cause can be detected by then.
    """
    training_stage = recipe.stage(stage)
    accelerator = launch.accelerator(training_stage.settings.precision)
    with lost_processes_reported("run the same command to resume after the last checkpoint"):
        return _train(recipe, training_stage, resume, max_skipped, accelerator, shared_with)


def _train(
    recipe: Recipe,
    training_stage: TrainingStage,
    resume: Literal["auto", "never"],
    max_skipped: int | None,
    accelerator: Accelerator,
    shared_with: Sequence[Path],
) -> TrainReport:
    stage, settings = training_stage.number, training_stage.settings
    folder = recipe.run_dir / f"stage{stage}"
    _check_requirements(training_stage)
    check_trackers(recipe.trackers)
    features = open_features(recipe, stage, device=str(accelerator.device))
    init_folder = initial_folder(recipe, stage)
    language = registry().create("languages", initial_language(recipe, stage, init_folder))
    image_tokens = connector_tokens(recipe.connector.spec(), features.shape)
    encoding = _encoding(training_stage, language.tokenizer(), image_tokens)
    log.debug("%s: fingerprint of the features %s", folder.name, features.fingerprint.id)
    data = _load_data(recipe, training_stage, encoding, features, max_skipped)
    log.debug("%s: %d samples, %d held out for validation", folder.name, len(data.train), len(data.validation))
    with accelerator.main_process_first():  # the other processes use the hashes that it cached
        digest = stage_digest(recipe, stage, features.fingerprint, data, init_folder)
    if resume == "auto" and (report := _finished(folder, digest, settings.restore_best, shared_with, accelerator)):
        log.debug("%s: %s is up to date (digest %s)", folder.name, folder / "model", digest)
        return report
    on_main(lambda: remove_link(folder))
    _check_restore_best(training_stage, data)
    description = model_description(recipe, stage, features, digest, init_folder)
    run, bundle = _loaded_run(
        recipe, training_stage, features, data, description, init_folder, accelerator, resume=resume == "auto"
    )
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(_exclusive_access(recipe, stage, folder))
            remove_previews(recipe.run_dir, stage)
            write_atomic(recipe.run_dir / "recipe.yaml", dump(recipe))
            log_held_out(data, stage)
            write_skipped(folder / "left_out.jsonl", data)

        on_main(begin)
        return _train_and_save(recipe, run, bundle, data, description)


def _finished(
    folder: Path, digest: str, restore_best: bool | str, shared_with: Sequence[Path], accelerator: Accelerator
) -> TrainReport | None:
    """The report of the stage if it was finished in ``folder``, or in another run, which is then linked."""
    if report := finished_report(folder, digest, restore_best):
        return report
    stage = finished_stage(shared_with, folder.name, digest, restore_best)
    if stage is None:
        return None
    accelerator.wait_for_everyone()  # no process may find the link before it has looked for a stage of its own
    on_main(lambda: share_stage(stage, folder))
    return finished_report(folder, digest, restore_best)


def _loaded_run(
    recipe: Recipe,
    stage: TrainingStage,
    features: FeatureReader,
    data: DataSplit,
    description: Mapping[str, Any],
    init_folder: Path | None,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> tuple[Run, ModelBundle]:
    """The run of ``stage`` and its model, loaded on the devices, with evaluation and previews; nothing is written.

    Raises:
        LlavactlError: the model doesn't fit on the devices, or its parts don't fit together.
    """
    choice = on_main(lambda: _choice(recipe, stage, features.shape, data.train, accelerator))
    stage, placement = settled(stage, choice), choice.placement
    name, settings, shape, device = STAGES[stage.number], stage.settings, features.shape, str(accelerator.device)
    loading = f"loading the model on {device}"
    log.debug("%s: %s in precision %s", name, loading, settings.precision)
    with out_of_memory_named(name, settings, placement, loading):
        bundle = initial_model(recipe, stage.number, init_folder, shape, device)
    _check_connector(recipe, bundle, shape, settings.precision, device)
    _check_template_tokens(bundle, data.train)
    evaluation = periodic_evaluation(recipe, stage, features, bundle, data, device)
    shown = _preview(recipe, stage, features, bundle, data, description, device)
    if init_folder is not None:
        model_folder.load_connector(bundle.model.connector, init_folder)
    digest = description["digest"]
    with out_of_memory_named(name, settings, placement, loading):
        run = create_run(recipe, stage, bundle.model, shape, data, digest, accelerator, placement, resume=resume)
    return replace(run, evaluation=evaluation, preview=shown), bundle


def _check_requirements(stage: TrainingStage) -> None:
    """Raises RecipeError if the stage has no data, or its method needs a library that isn't installed."""
    if not stage.sources:
        raise RecipeError(
            f"data.stage{stage.number} has no source", hint=f"add a source of records to `data.stage{stage.number}`"
        )
    if stage.settings.method == "qlora":
        import_bitsandbytes()


def _check_connector(recipe: Recipe, bundle: ModelBundle, shape: FeatureShape, precision: str, device: str) -> None:
    width = bundle.model.language.get_input_embeddings().weight.shape[1]
    validate_connector(recipe.connector.spec(), shape, width, [precision], device)


def _check_template_tokens(bundle: ModelBundle, data: SampleSet) -> None:
    """Raises ModelError if the template writes a special token without an embedding; any sample shows it."""
    highest = max(data.encoded(0, 0).ids)
    if highest >= (embeddings := len(bundle.model.language.get_input_embeddings().weight)):
        token = bundle.tokenizer.convert_ids_to_tokens(highest)
        raise ModelError(
            f"the template writes {token}, id {highest}; the language model has embeddings for {embeddings} tokens",
            hint="set another `template`, or resize the embeddings and save the model with `save_pretrained`",
        )


def _choice(
    recipe: Recipe, stage: TrainingStage, shape: FeatureShape, data: SampleSet, accelerator: Accelerator
) -> Choice:
    """The placement and micro-batches of ``stage``, chosen before any weight is loaded.

    Raises:
        RecipeError: the method can't be sharded, or the stage doesn't fit on the devices of this run.
    """
    requested_placement(recipe, stage.number, accelerator.num_processes)
    choice = choice_for_training(recipe, stage, shape, data, accelerator.device, accelerator.num_processes)
    level = logging.DEBUG if accelerator.device.type == "cpu" else logging.INFO
    log.log(level, "stage%d: %s", stage.number, choice)
    return choice


def _encoding(stage: TrainingStage, tokenizer: PreTrainedTokenizerBase, image_tokens: int) -> Encoding:
    template = registry().create("templates", stage.template)
    return Encoding(template, tokenizer, image_tokens, stage.settings.max_length)


def _load_data(
    recipe: Recipe, stage: TrainingStage, encoding: Encoding, features: FeatureReader, max_skipped: int | None
) -> DataSplit:
    settings = stage.settings
    # Only steps are reported to the caller's `progress` function, which may read the loss from each of them.
    with progress.reporting_to(lambda _: None):
        data = load_split(
            stage.sources,
            settings,
            encoding,
            features,
            features.contents,
            recipe.seed,
            template=component_identity("templates", stage.template),
            max_skipped=max_skipped,
        )
    if settings.method == "connector" and not any(sample.images for sample in data.train.samples):
        raise DataError(
            f"data.stage{stage.number}: no training sample has an image, so the connector can't be trained",
            hint="use text-only data in stage 2",
        )
    return data


def _check_restore_best(stage: TrainingStage, data: DataSplit) -> None:
    if stage.settings.restore_best is True and not len(data.validation):
        raise RecipeError(
            f"stage{stage.number}.restore_best needs validation samples, but none are held out"
            + (f" ({data.held_out})" if data.held_out else ""),
            hint=f"`-o stage{stage.number}.validation=0.05` holds out 5 % of the images",
        )


def _preview(
    recipe: Recipe,
    stage: TrainingStage,
    features: FeatureReader,
    bundle: ModelBundle,
    data: DataSplit,
    description: Mapping[str, Any],
    device: str,
) -> AnswerPreview | None:
    """The preview of ``stage``, with the language model's template: that of stage 1, ``plain``, omits questions."""
    spec = spec_of(recipe.language.template)
    chatting = {**description, "template": spec}
    encoding = replace(data.train.encoding, template=registry().create("templates", spec), max_length=None)
    return preview(
        recipe,
        stage,
        features,
        data,
        device,
        lambda fixed: Assistant(bundle.model, encoding, fixed, stage.settings.image_order),
        lambda run, folder: save_model(run, folder, bundle, chatting),
    )


def _train_and_save(
    recipe: Recipe, run: Run, bundle: ModelBundle, data: DataSplit, description: Mapping[str, Any]
) -> TrainReport:
    main, stage = run.accelerator.is_main_process, description["stage"]
    trial_save(run, bundle, description)
    began = time.perf_counter()
    with _failure_notified(run):
        with refreshed(recipe.run_dir), _recorded(recipe, run) as recorded:
            result = run_loop(recorded)
        seconds = time.perf_counter() - began
        save_model(run, run.folder / "model", bundle, description)
    on_main(lambda: remove_previews(recipe.run_dir, stage))
    # From here on the stage is finished; the rest is optional.
    report = on_main(lambda: _write_stage_report(stage, run, data, result, seconds))
    with optional_output(run.folder / "samples.json"):
        _write_sample_answers(recipe, run, bundle, data)
    if main:
        if plots_available():
            with optional_output(run.folder / "loss.png"):
                plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
        else:
            log_missing_plots()
        with optional_output(report_page(recipe.run_dir)):
            write_report(recipe.run_dir)
    run.accelerator.wait_for_everyone()
    if main:
        plugins.notify("train_finished", recipe=recipe.model_dump(mode="json"), report=asdict(report))
    return report


@contextmanager
def _failure_notified(run: Run) -> Iterator[None]:
    """Calls the hook ``train_failed`` if an error or a signal leaves the context, in the main process."""
    try:
        yield
    except BaseException as error:
        if run.accelerator.is_main_process:
            interrupted = isinstance(error, KeyboardInterrupt)
            text = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
            run.notify("train_failed", {"folder": run.folder, "error": text, "interrupted": interrupted})
        raise


@contextmanager
def _recorded(recipe: Recipe, run: Run) -> Iterator[Run]:
    """``run`` with the recipe's trackers, which record its metrics in the main process."""

    with ExitStack() as stack:
        recorders = []

        def start() -> None:
            folder = recipe.run_dir / "trackers"
            recorders.append(
                stack.enter_context(recording(recipe.trackers, recipe.name, run.folder.name, folder, run.digest))
            )

        def notify(hook: str, arguments: Mapping[str, Any]) -> None:
            run.notify(hook, arguments)
            if hook == "train_logged":
                for record in recorders:
                    record(arguments["line"])

        on_main(start)
        yield replace(run, notify=notify)


def _write_stage_report(
    stage: StageNumber, run: Run, data: DataSplit, result: TrainingResult, seconds: float
) -> TrainReport:
    report = create_report(stage, run, data, result, seconds)
    write_json(run.folder / REPORT, asdict(report))
    return report


def _write_sample_answers(recipe: Recipe, run: Run, bundle: ModelBundle, data: DataSplit) -> None:
    """The main process writes them; if the model is sharded, all processes compute them together."""
    main = run.accelerator.is_main_process
    if not main and not run.placement.sharded:
        return
    with root_gathered(bundle.model):
        assistant = Assistant(bundle.model, data.train.encoding, data.train.features, run.settings.image_order)
        answered = answer_samples(assistant, shown_samples(data), recipe.eval.max_new_tokens)
    if main:
        rows = [example(run.folder / "samples", each.turns, each.reference, each.answer) for each in answered]
        write_atomic(run.folder / "samples.json", json_text(rows, indent=2))


def _exclusive_access(recipe: Recipe, stage: int, folder: Path) -> Any:
    busy = ModelError(
        f"another process is training {folder}", hint="wait until it has finished, or give this run another `name`"
    )
    return exclusive_lock(recipe.run_dir / f".stage{stage}.lock", busy)
