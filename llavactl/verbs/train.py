"""``llavactl train``: one stage, from the feature cache (or live) to a model folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.chat.assistant import Assistant
from llavactl.core import plugins
from llavactl.core.errors import DataError, LlavactlError, ModelError, RecipeError, StoreError
from llavactl.core.hashes import hash_json
from llavactl.core.identity import component_identity
from llavactl.core.paths import exclusive_lock, json_text, write_atomic, write_json
from llavactl.core.registry import registry
from llavactl.data.encode import Encoding
from llavactl.data.training_set import Split, split
from llavactl.features import Fingerprint, open_features
from llavactl.model import folder as model_folder
from llavactl.model.build import Parts, build
from llavactl.model.connector_check import validate_connector
from llavactl.model.foreign import resolve
from llavactl.model.quantised import four_bits
from llavactl.recipe.load import dump
from llavactl.report.examples import example
from llavactl.report.page import write_report
from llavactl.report.plots import plot_loss
from llavactl.training import checkpoints, launch, stages
from llavactl.training.loop import Run
from llavactl.training.loop import train as run_loop
from llavactl.training.optimizer import Optimizer
from llavactl.verbs.train_report import TrainReport, finished, report_of

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape, ImageContents, ImageRef
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber

    ReadContents = Callable[[Sequence[ImageRef]], ImageContents]

log = logging.getLogger(__name__)
SAMPLE_ANSWERS = 8
OWN_INITS = ("stage1", "scratch")


def train(
    recipe: Recipe, stage: StageNumber, resume: Literal["auto", "never"] = "auto", *, max_skipped: int | None = None
) -> TrainReport:
    """Trains ``stage`` of ``recipe`` into ``<run_dir>/stage<N>/``, or goes on where it was cut off.

    Samples with an image that can't be read are left out; more than ``max_skipped`` such images are an error.

    Raises:
        LlavactlError: whatever stands in the way, before any work where it can be known.
    """
    chosen = recipe.stage(stage)
    settings, sources, template = chosen.settings, chosen.sources, chosen.template
    accelerator = launch.accelerator(settings.precision)
    if not sources:
        raise RecipeError(f"data.stage{stage} names no source", hint=f"stage {stage} needs records to train on")
    if settings.method == "qlora":
        four_bits()
    folder = recipe.run_dir / f"stage{stage}"
    features = open_features(recipe, stage, device=str(accelerator.device))
    start = _start(recipe, stage)
    if stage == 2 and recipe.stage2.init not in OWN_INITS:
        assert start is not None
        parts = _whole(recipe, start, features.shape)
    else:
        parts = build(
            recipe.connector.spec(), recipe.language.spec(), features.shape, dtype=settings.precision, seed=recipe.seed
        )
    width = parts.model.language.get_input_embeddings().weight.shape[1]
    validate_connector(recipe.connector.spec(), features.shape, width, [settings.precision], str(accelerator.device))
    encoding = Encoding(
        registry().create("templates", template), parts.tokenizer, parts.image_tokens, settings.max_length
    )
    data = split(sources, settings, encoding, features, _limit_skipped(features.contents, max_skipped), recipe.seed)
    if stage == 1 and not any(sample.images for sample in data.train.samples):
        raise DataError(
            "data.stage1: no training sample has an image, so the connector can't be trained",
            hint="use text-only data in stage 2",
        )
    with accelerator.main_process_first():  # the others use the hashes that it cached
        digest = _digest(recipe, stage, features.fingerprint, data, start)
    if resume == "auto" and (done := finished(folder, digest, settings.restore_best)):
        return done
    if settings.restore_best and not len(data.validation):
        raise RecipeError(
            f"stage{stage}.restore_best needs validation samples, but none are held out"
            + (f" ({data.held_out})" if data.held_out else ""),
            hint=f"`-o stage{stage}.validation=0.05` holds out a twentieth of the images",
        )
    if start is not None:
        model_folder.load_connector(parts.model.connector, start)
    unpacked = stages.unpacked(parts.model, settings, accelerator.device.type)
    rates = stages.trained(parts.model, settings, recipe.seed)
    parts.model.to(accelerator.device)
    matrices = stages.matrices(parts.model, settings)
    optimizer = Optimizer(
        parts.model, rates, settings.weight_decay, settings.adam_beta2, matrices, stages.Untrained(parts.model)
    )
    description = _description(recipe, stage, features.fingerprint, digest, start) | {
        "shape": asdict(features.shape),
        "template": template,
    }
    run = Run(
        model=parts.model,
        optimizer=optimizer,
        stage=settings,
        data=data.train,
        validation=data.validation,
        shape=features.shape,
        folder=folder,
        seed=recipe.seed,
        digest=digest,
        resume=resume == "auto",
        unpacked=unpacked,
        accelerator=accelerator,
        observe=_observer(stage, folder),
    )
    busy = ModelError(
        f"another process is training {folder}", hint="wait until it has finished, or give this run another `name`"
    )
    with exclusive_lock(recipe.run_dir / f".stage{stage}.lock", busy) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            write_atomic(recipe.run_dir / "recipe.yaml", dump(recipe))
            _left_out(folder, data)
        return _run(recipe, run, parts, data, description)


def _limit_skipped(contents: ReadContents, max_skipped: int | None) -> ReadContents:
    """``contents``, raising DataError if more than ``max_skipped`` images can't be read."""

    def limited(images: Sequence[ImageRef]) -> ImageContents:
        found = contents(images)
        if max_skipped is not None and len(found.unreadable) > max_skipped:
            image, why = next(iter(found.unreadable.items()))
            raise DataError(
                f"{len(found.unreadable)} images can't be read, more than --max-skipped {max_skipped}; the first is "
                f"{image.name}: {why}",
                hint="list them with `llavactl data check`",
            )
        return found

    return limited


def _run(recipe: Recipe, run: Run, parts: Parts, data: Split, description: Mapping[str, Any]) -> TrainReport:
    main = run.accelerator.is_main_process
    if main:
        _dry_save(run, parts, description)
    run.accelerator.wait_for_everyone()
    began = time.perf_counter()
    trained = run_loop(run)
    seconds = time.perf_counter() - began
    if main:
        _save_model(run.folder / "model", parts, run.optimizer, description)
    report = report_of(run, data, trained, seconds, description)
    if main:
        write_json(run.folder / "report.json", asdict(report))
        with _optional(run.folder / "samples.json"):
            _write_samples(recipe, run, parts, data)
        with _optional(run.folder / "loss.png"):
            plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
        with _optional(recipe.run_dir / "report.html"):
            write_report(recipe.run_dir)
        plugins.notify("train_finished", report=asdict(report))
    run.accelerator.wait_for_everyone()
    return report


@contextmanager
def _optional(file: Path) -> Iterator[None]:
    """For optional outputs after the model is saved: an exception is logged as a warning."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - hours of training must not end in an error over a plot
        reason = error.message if isinstance(error, LlavactlError) else f"{type(error).__name__}: {error}"
        log.warning("%s could not be written (%s); the model is saved", file, reason)


def _start(recipe: Recipe, stage: int) -> Path | None:
    """The model folder that this stage starts from; None: from scratch."""
    if stage == 1 or recipe.stage2.init == "scratch":
        return None
    if recipe.stage2.init != "stage1":
        return resolve(recipe.stage2.init, recipe)
    folder = recipe.run_dir / "stage1" / "model"
    if not (folder / model_folder.DESCRIPTION).is_file():
        raise ModelError(
            f"{folder}: stage 2 starts from stage 1's connector, and there is none",
            hint="`llavactl train --stage 1` first, or `-o stage2.init=scratch` to go without",
        )
    return folder


def _whole(recipe: Recipe, start: Path, shape: FeatureShape) -> Parts:
    """Connector and language model of ``start``, an adapter merged.

    Raises:
        ModelError: it has another connector, or was trained on features of another shape, than the recipe says.
    """
    description = model_folder.describe(start)
    if description["method"] == "lora" and recipe.stage2.method != "full":
        raise ModelError(
            f"stage2.init {recipe.stage2.init}: it is an adapter, and a second adapter on top is not supported",
            hint="merge it first: `llavactl export --format hf --to DIR`, then set `stage2.init: DIR`",
        )
    encoder = Path(description["vision"].get("model", ""))
    if encoder.parent == start and recipe.vision.spec().get("model") != str(encoder):
        raise ModelError(
            f"stage2.init {recipe.stage2.init}: it has a fine-tuned vision encoder, which is not the recipe's",
            hint=f"`-o vision.model={encoder}` uses its vision encoder",
        )
    for key, theirs, ours in (
        ("connector", _complete(description["connector"]), _complete(recipe.connector.spec())),
        ("shape of the vision features", description["shape"], json.loads(json.dumps(asdict(shape)))),
    ):
        if theirs != ours:
            raise ModelError(
                f"stage2.init {recipe.stage2.init}: its {key} is {theirs}, the recipe's {ours}",
                hint="`connector` and `vision` must be those of the model that stage 2 starts from",
            )
    loaded = model_folder.load(start, dtype=recipe.stage2.precision)
    if description["method"] == "lora":
        language: Any = loaded.parts.model.language
        loaded.parts.model.language = language.merge_and_unload()
    return loaded.parts


def _complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A connector with its defaults written out."""
    return {"name": spec["name"], **registry().options("connectors", spec).model_dump(mode="json")}


def _digest(recipe: Recipe, stage: StageNumber, fingerprint: Fingerprint, data: Split, start: Path | None) -> str:
    """A hash of everything that determines the result: settings, components, data, features, the initial model.

    Files count by content, not by name. Settings that don't change the result, only speed for example, are left out: a
    run resumes after they change.
    """
    chosen = recipe.stage(stage)
    settings = chosen.settings
    free = {"micro_batch_size", "micro_batch_tokens", "packing", "gradient_checkpointing"}
    free |= {"checkpoint_every", "keep_last", "restore_best", "init"}
    return hash_json(
        {
            "stage": settings.model_dump(mode="json", exclude=free),
            "connector": component_identity("connectors", recipe.connector.spec()),
            "language": component_identity("languages", recipe.language.spec()),
            "template": component_identity("templates", chosen.template),
            "fingerprint": fingerprint.id,
            "data": data.digest,
            "boxes": [s.boxes for s in data.train.samples] if settings.box_alignment_steps else None,
            "seed": recipe.seed,
            "start": model_folder.identity(start) if start else None,
        }
    )


def _language(recipe: Recipe, start: Path | None) -> dict[str, Any]:
    """The language model that stage 2 trains, fully or with an adapter: that of ``stage2.init`` if it names a model."""
    if start is None or recipe.stage2.init in OWN_INITS:
        return recipe.language.spec()
    return model_folder.language_of(start, model_folder.describe(start))


def _description(
    recipe: Recipe, stage: StageNumber, fingerprint: Fingerprint, digest: str, start: Path | None
) -> dict[str, Any]:
    chosen = recipe.stage(stage)
    settings = chosen.settings
    return {
        "stage": stage,
        "method": settings.method.removeprefix("q"),
        "quantised": "nf4" if settings.method == "qlora" else None,
        "vision": chosen.vision,
        "features": {"dtype": recipe.features.dtype, "compute": recipe.features.compute},
        "fingerprint": dict(fingerprint.fields),
        "connector": recipe.connector.spec(),
        "language": _language(recipe, start) if stage == 2 else recipe.language.spec(),
        "image_order": settings.image_order,
        "precision": settings.precision,
        "digest": digest,
        "restore_best": settings.restore_best,
        "versions": {name: metadata.version(name) for name in ("llavactl", "torch", "transformers")},
    }


def _dry_save(run: Run, parts: Parts, description: Mapping[str, Any]) -> None:
    """Saves all that will be saved, once, before step 1: what would fail after hours fails now.

    Raises:
        StoreError: something can't be written, or the disk is too small for what training will write.
    """
    stage, trial = run.stage, run.folder / ".dry-run"
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        moments = 3 * sum(4 * master.numel() for master in run.optimizer.masters.values())
        # The last ones, the best one, and the one being written; those of an earlier try are there already.
        needed = moments * (stage.keep_last + 2)
        written = sum(file.stat().st_size for file in (run.folder / "checkpoints").rglob("*") if file.is_file())
        if needed > (free := shutil.disk_usage(run.folder).free + written):
            raise StoreError(
                f"{run.folder}: checkpoints take {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free",
                hint=f"free some disk, or `-o stage{description['stage']}.keep_last=1`, or another `run_dir`",
            )
        checkpoints.save(trial, checkpoints.State(0, run.digest), run.optimizer.state(), 1)
        _save_model(trial / "model", parts, run.optimizer, description)
    finally:
        checkpoints.remove(trial)


def _save_model(folder: Path, parts: Parts, optimizer: Optimizer, description: Mapping[str, Any]) -> None:
    # By identity, not by name: a shared parameter has two names and one master.
    masters = {id(optimizer.parameters[name]): master for name, master in optimizer.masters.items()}
    state = parts.model.connector.state_dict(keep_vars=True)
    connector = {name: masters.get(id(each), each).detach().cpu() for name, each in state.items()}
    model_folder.save(folder, parts, connector, description)


def _write_samples(recipe: Recipe, run: Run, parts: Parts, data: Split) -> None:
    """Writes ``samples.json``: the trained model's answers to the first question of a few held-out samples."""
    from llavactl.model.generate import Sampling

    shown = (data.validation if len(data.validation) else data.train).samples[:SAMPLE_ANSWERS]
    parts.model.eval()
    assistant = Assistant(parts.model, data.train.encoding, data.train.features, run.stage.image_order)
    most = min(64, recipe.eval.max_new_tokens)
    rows = []
    for sample in shown:
        asked = next(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
        (answer,) = assistant.answer([sample.turns[:asked]], Sampling(max_new_tokens=most))
        if len(parts.tokenizer(answer, add_special_tokens=False)["input_ids"]) >= most:
            answer += " …"  # cut, not finished
        rows.append(example(run.folder / "samples", sample.turns[:asked], sample.turns[asked].text, answer))
    write_atomic(run.folder / "samples.json", json_text(rows, indent=2))


def _left_out(folder: Path, data: Split) -> None:
    if data.held_out:
        log.log(logging.INFO if len(data.validation) else logging.WARNING, "held out for validation: %s", data.held_out)
    if data.left_out:
        log.warning("%d samples are left out; %s says why", len(data.left_out), folder / "left_out.jsonl")
    lines = (json_text(each._asdict()) for each in data.left_out)
    write_atomic(folder / "left_out.jsonl", "".join(f"{line}\n" for line in lines))


def _observer(stage: int, folder: Path) -> Any:
    def observe(hook: str, facts: Mapping[str, Any]) -> None:
        extra = {"folder": folder} if hook == "train_started" else {}
        plugins.notify(hook, stage=stage, **extra, **facts)

    return observe
