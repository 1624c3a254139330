"""``llavactl train --dry-run``: the memory, steps, tokens and time of a stage before it is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llavactl.core.errors import ModelError, RecipeError, StoreError
from llavactl.core.hashes import read_only_cache
from llavactl.core.identity import component_identity, is_local
from llavactl.core.library_errors import reason
from llavactl.core.quantities import gigabytes
from llavactl.core.registry import registry
from llavactl.core.schema import ImageContents
from llavactl.data.encode import Encoding
from llavactl.data.split import load_split
from llavactl.features import open_features
from llavactl.recipe.frame import Outline, Recipe
from llavactl.recipe.load import load_frame
from llavactl.recipe.stages import STAGES
from llavactl.training.placement import requested_placement
from llavactl.training.prediction.alternatives import Alternative, alternatives, fitting_options
from llavactl.training.prediction.assumption import LongestMicroBatch
from llavactl.training.prediction.choices import choices
from llavactl.training.prediction.choose import choose
from llavactl.training.prediction.model import language_component
from llavactl.training.prediction.predict import Choice, StagePredictor, stage_predictor
from llavactl.training.prediction.process import process_bytes, resident_bytes
from llavactl.training.prediction.published import stored_verdict
from llavactl.training.prediction.target import Target, target_device
from llavactl.training.report import REPORT
from llavactl.training.throughput import Work, training_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llavactl.core.schema import ImageRef
    from llavactl.data.sample_set import SampleSet
    from llavactl.data.stage_plan import StagePlan
    from llavactl.features import FeatureReader
    from llavactl.recipe.resolve import RecipeSource
    from llavactl.recipe.specs import SourceSpec
    from llavactl.recipe.stages import StageNumber
    from llavactl.training.prediction.predict import Prediction


@dataclass(frozen=True)
class TrainPlan:
    """The plan of a stage, without weights and GPU.

    ``peak_bytes``: of one process, on its device (tensors, as torch.cuda.max_memory_allocated) and in host memory
    (resident memory). On a CPU the device's memory is part of the host's. ``peak_parts`` are its parts. ``fits``: the
    peak is within ``usable_bytes`` of a device. ``checkpoint_bytes``: the tensors of one checkpoint. ``padding``,
    ``prefix_sharing``: as in the report of a stage. ``micro_batch``: the longest one. None: unknown without the data,
    or for ``time`` without a throughput. ``alternatives``: options with which the stage would fit, nearest first.
    ``upper_bound``: the peak with the same ``placement``, and whether it fits, if all samples are as long as the recipe
    allows: micro-batches of ``samples`` samples of ``tokens`` tokens. Without the data, ``peak_bytes`` is this bound.
    """

    fits: bool
    stage: int
    device: dict[str, Any]
    placement: dict[str, Any]
    parameters: dict[str, int]
    peak_bytes: dict[str, int]
    peak_parts: dict[str, dict[str, int]]
    steps: int | None
    samples: int | None
    tokens: int | None
    padding: float | None
    prefix_sharing: float | None
    micro_batch: dict[str, int] | None
    checkpoint_bytes: int
    training_flops: int | None
    time: dict[str, Any] | None
    alternatives: tuple[dict[str, Any], ...]
    upper_bound: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def assumption(self) -> str:
        """The lengths of samples that ``peak_bytes`` is predicted for."""
        longest = LongestMicroBatch(self.upper_bound["samples"], self.upper_bound["tokens"])
        if self.tokens is None:
            return f"unknown lengths: an upper bound, with {longest}"
        bound = self.upper_bound["peak_bytes"]["device" if self.device["kind"] == "cuda" else "host"]
        return f"the lengths of these data; upper bound for longer samples: {gigabytes(bound)}, with {longest}"

    @property
    def error(self) -> RecipeError:
        """The error of a stage that doesn't fit."""
        needed = self.peak_bytes["device" if self.device["kind"] == "cuda" else "host"]
        target = Target(self.device["kind"] == "cuda", self.device["memory_bytes"], self.device["count"])
        options = [" ".join(each["options"]) for each in self.alternatives]
        return RecipeError(_does_not_fit(self.stage, needed, target), hint=fitting_options(options))


def _does_not_fit(stage: int, needed: int, device: Target) -> str:
    """That ``stage`` needs ``needed`` bytes per process, more than ``device`` has."""
    where = "device" if device.cuda else "host"
    processes = f"{device.count} × " if not device.cuda and device.count > 1 else ""
    return (
        f"stage {stage} doesn't fit: it needs {processes}{gigabytes(needed)} of {where} memory, and "
        f"{gigabytes(device.usable_bytes)} of {gigabytes(device.memory_bytes)} can be used"
    )


def plan_training(
    recipe: Recipe,
    stage: StageNumber,
    *,
    device_memory: int | None = None,
    devices: int | None = None,
    tokens_per_s: float | None = None,
) -> TrainPlan:
    """Plans ``stage`` of ``recipe`` from configurations and records; nothing is written.

    ``device_memory`` in bytes: plan for CUDA devices of this size. Default: the smallest device of this machine.
    ``devices``: their number, one process each. Default: the number of processes of this launch. ``tokens_per_s``: the
    throughput of all of them; default: that of an earlier run of this stage with the same number of parameters, method
    and devices.

    Raises:
        ModelError: a configuration or the tokenizer can't be read.
        DataError: a record is invalid.
        RecipeError: the stage has no data, or its method can't be sharded.
    """
    device = target_device(device_memory, devices)
    requested_placement(recipe, stage, device.count)
    notes: list[str] = []
    with read_only_cache():
        longest = stage_predictor(recipe, stage, device)
        process_bytes()  # before the records are read
        before = resident_bytes()
        data = _training_data(recipe, stage, longest.image_tokens, notes)
        predictor = longest if data is None else longest.with_data(data, max(0, resident_bytes() - before))
        if blocker := predictor.packing_blocker:
            notes.append(f"samples are padded, not packed: {blocker}")
        prediction, fits = choose(predictor, recipe, device)
        bound = longest.predict(prediction.choice)
        others = () if fits else tuple(alternatives(predictor, recipe, device))
    return _plan(recipe, predictor, prediction, fits, bound, device, others, tokens_per_s, notes)


class MemoryCheck(NamedTuple):
    """The result of ``check_memory``: ``warnings`` about stages, and the models whose stages were ``not_checked``."""

    warnings: list[str]
    not_checked: list[str]

    @property
    def note(self) -> str:
        """That the memory of stages was not checked, and why; "" if all were."""
        if not self.not_checked:
            return ""
        verb = "isn't" if len(self.not_checked) == 1 else "aren't"
        return f"memory not checked: {' and '.join(self.not_checked)} {verb} on this machine"


def check_memory(
    source: RecipeSource, overrides: Sequence[str], device_memory: int | None, devices: int | None
) -> MemoryCheck:
    """A warning for each stage of a valid recipe that doesn't fit on the devices, or without CUDA on the CPU.

    Also for a stage that can't be predicted, such as with a plugin's language model without ``skeleton``. The stages of
    models that aren't on this machine are judged by stored predictions, or not checked.

    See ``plan_training`` for ``device_memory`` and ``devices``. Stages without data are not checked.
    """
    recipe = load_frame(Outline, source, overrides)
    warnings: list[str] = []
    not_checked: list[str] = []
    if not isinstance(recipe, Recipe):
        return MemoryCheck(warnings, not_checked)
    device = target_device(device_memory, devices)
    for stage in recipe.stages_with_data():
        specs = (recipe.language.spec(), recipe.stage(stage).vision)
        if absent := [each for each in specs if not is_local(each)]:
            verdict = stored_verdict(recipe, stage, device)
            if verdict is None:
                not_checked += [str(each.get("model", each["name"])) for each in absent]
            elif not verdict.fits:
                needed = _does_not_fit(stage, verdict.peak.bytes, device)
                warnings.append(f"{needed}, with {verdict.peak.assumes}; {fitting_options(())}")
            continue
        try:
            if _longest_samples_fit(recipe, stage, device):
                continue  # the records needn't be read
            plan = plan_training(recipe, stage, device_memory=device_memory, devices=devices)
        except Exception as error:  # noqa: BLE001 - the recipe is valid even if its memory can't be predicted
            warnings.append(f"{STAGES[stage]}: its memory can't be predicted ({reason(error)})")
            continue
        if not plan.fits:
            warnings.append(plan.error.with_hint())
    return MemoryCheck(warnings, list(dict.fromkeys(not_checked)))


def _longest_samples_fit(recipe: Recipe, stage: StageNumber, device: Target) -> bool:
    """Whether ``stage`` fits, with the fastest settings, even if all samples are as long as the recipe allows."""
    predictor = stage_predictor(recipe, stage, device)
    return device.holds(predictor.predict(choices(recipe, predictor.settings, device)[0]))


def _training_data(recipe: Recipe, stage: StageNumber, image_tokens: int, notes: list[str]) -> SampleSet | None:
    """The training set of ``stage``; None, with a note, without the records or the tokenizer."""
    training_stage = recipe.stage(stage)
    key, settings = f"data.{STAGES[stage]}", training_stage.settings
    unknown = "steps and tokens are unknown; the memory is the upper bound"
    if not training_stage.sources:
        raise RecipeError(f"{key} has no source", hint=f"add a source of records to `{key}`")
    sources = [_without_missing_options(source) for source in training_stage.sources]
    if missing := [path for source in sources for path in _missing(source).values()]:
        notes.append(f"{key}: {missing[0]} doesn't exist yet: {unknown}")
        return None
    try:
        tokenizer = language_component(recipe, stage).tokenizer()
    except ModelError as error:
        notes.append(f"{error.message}: {unknown}")
        return None
    template = registry().create("templates", training_stage.template)
    encoding = Encoding(template, tokenizer, image_tokens, settings.max_length)
    features = _stored_features(recipe, stage)

    def contents(images: Sequence[ImageRef]) -> ImageContents:
        if features is not None:
            try:
                return features.contents(images)
            except StoreError:
                pass
        notes.append("features are not extracted yet: images are not opened, and all count as readable and distinct")
        return ImageContents({})

    identity = component_identity("templates", training_stage.template)
    return load_split(sources, settings, encoding, _NoFeatures(), contents, recipe.seed, template=identity).train


def _missing(source: SourceSpec) -> dict[str, str]:
    """The options of ``source`` that name a file or folder that doesn't exist."""
    options = source.spec()
    paths = {key: value for key, value in options.items() if isinstance(value, str) and Path(value).is_absolute()}
    return {key: path for key, path in paths.items() if not Path(path).exists()}


def _without_missing_options(source: SourceSpec) -> SourceSpec:
    """``source`` without optional files and folders that don't exist, such as that of the images."""
    fields = registry().get("sources", source.name).options_model().model_fields
    optional = [key for key in _missing(source) if not fields[key].is_required()]
    return source.model_copy(update={key: fields[key].get_default(call_default_factory=True) for key in optional})


def _stored_features(recipe: Recipe, stage: StageNumber) -> FeatureReader | None:
    """The features in the store; None if there are none, or if they are computed live."""
    if recipe.features.mode != "cached":
        return None
    try:
        return open_features(recipe, stage)
    except (StoreError, ModelError):
        return None


class _NoFeatures:
    """Lengths don't depend on the values of features."""

    def arrays(self, image: ImageRef) -> Any:
        raise AssertionError(f"the features of {image.name} aren't needed")


def _plan(
    recipe: Recipe,
    predictor: StagePredictor,
    prediction: Prediction,
    fits: bool,
    bound: Prediction,
    device: Target,
    others: Sequence[Alternative],
    tokens_per_s: float | None,
    notes: Sequence[str],
) -> TrainPlan:
    weights, plan = predictor.weights(), prediction.plan
    return TrainPlan(
        fits=fits,
        stage=predictor.stage,
        device={"kind": device.kind, "count": device.count, **_sizes(device)},
        placement={**_described(prediction.choice), "packed": not predictor.packing_blocker},
        parameters={"trainable": weights.trainable, "frozen": weights.frozen},
        peak_bytes=_peak_bytes(prediction),
        peak_parts={"device": dict(prediction.device), "host": dict(prediction.host)},
        **_counts(plan),
        checkpoint_bytes=weights.checkpoint_bytes(),
        training_flops=_flops(predictor, prediction),
        time=None if plan is None else _time(recipe, predictor, device, plan.tokens, tokens_per_s),
        alternatives=tuple(
            {"options": list(each.options), "peak_bytes": _peak_bytes(each.prediction)} for each in others
        ),
        upper_bound={
            "fits": device.holds(bound),
            "peak_bytes": _peak_bytes(bound),
            **predictor.longest_micro_batch(bound.choice)._asdict(),
        },
        notes=tuple(notes),
    )


def _peak_bytes(prediction: Prediction) -> dict[str, int]:
    return {"device": prediction.device_bytes, "host": prediction.host_bytes}


def _counts(plan: StagePlan | None) -> dict[str, Any]:
    """The fields that describe the data, None without it."""
    if plan is None:
        return dict.fromkeys(("steps", "samples", "tokens", "padding", "prefix_sharing", "micro_batch"))
    largest = max((batch for _, batch in plan.largest), key=lambda batch: batch.positions)
    return {
        "steps": plan.steps,
        "samples": plan.samples,
        "tokens": plan.tokens,
        "padding": round(plan.padding, 4),
        "prefix_sharing": round(plan.prefix_sharing, 4),
        "micro_batch": {"positions": largest.positions, "targets": largest.targets, "images": largest.images},
    }


def _sizes(device: Target) -> dict[str, int]:
    return {"memory_bytes": device.memory_bytes, "usable_bytes": device.usable_bytes}


def _described(choice: Choice) -> dict[str, Any]:
    return {
        "sharded": choice.placement.sharded,
        "optimizer_state": choice.placement.optimizer_state,
        "gradient_checkpointing": choice.gradient_checkpointing,
        "micro_batch_tokens": choice.micro_batch_tokens,
    }


def _flops(predictor: StagePredictor, prediction: Prediction) -> int | None:
    """The training FLOPs of the stage (``training.throughput``); None without data or a formula."""
    plan, flops = prediction.plan, training_flops(predictor.weights().model)
    if plan is None or flops is None:
        return None
    image_tokens = plan.images * predictor.image_tokens
    return flops.of(Work(plan.samples, plan.tokens, plan.useful, plan.targets, image_tokens, plan.pairs))


def _time(
    recipe: Recipe, predictor: StagePredictor, device: Target, tokens: int, tokens_per_s: float | None
) -> dict[str, Any] | None:
    """The duration of ``tokens`` with a throughput that is given, or that of an earlier run; None without either."""
    source = "--tokens-per-second"
    if tokens_per_s is None:
        report = recipe.run_dir / STAGES[predictor.stage] / REPORT
        tokens_per_s, source = _throughput(report, predictor, device), str(report)
    if not tokens_per_s:
        return None
    return {"seconds": round(tokens / tokens_per_s, 1), "tokens_per_s": tokens_per_s, "source": source}


def _throughput(report: Path, predictor: StagePredictor, device: Target) -> float | None:
    """The tokens per second in ``report``; None if its run isn't comparable, as the recipe may have changed since."""
    weights = predictor.weights()
    planned = {
        "trainable_parameters": weights.trainable,
        "parameters": weights.trainable + weights.frozen,
        "method": predictor.settings.method,
        "device": device.kind,
        "processes": device.count,
    }
    try:
        trained = json.loads(report.read_text(encoding="utf-8"))
        return float(trained["tokens_per_s"]) if planned.items() <= trained.items() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
