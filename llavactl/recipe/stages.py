"""Training stages: their settings and defaults, and the registration of every stage.

A new stage is a subclass of ``Stage1`` or ``Stage2`` and one field of ``StageSections``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llavactl.core.options import ModelId
from llavactl.recipe.specs import OptimizerSpec, PeriodicTask, ScheduleSpec, SourceSpec, TemplateSpec, spec_of
from llavactl.recipe.values import (
    Boolean,
    Fraction,
    ImageOrder,
    NonNegativeInteger,
    NonNegativeNumber,
    PositiveInteger,
    PositiveNumber,
    Precision,
    Section,
)

# Keys whose default differs between the stages.
Template = Annotated[
    str | TemplateSpec | None, Field(description="conversation template; null: the one of `language.template`")
]
BatchSize = Annotated[
    int, Field(strict=True, ge=1, description="global batch size: samples per optimizer step, over all processes")
]
MicroBatchSize = Annotated[
    int,
    Field(
        strict=True,
        ge=1,
        description="largest micro-batch, in samples; must divide `batch_size`. If only `batch_size` is set, the "
        "largest divisor up to the default",
    ),
]
LearningRate = Annotated[
    float, Field(strict=True, gt=0, allow_inf_nan=False, description="peak learning rate, after warm-up")
]
ScoreName = Annotated[
    str, Field(strict=True, pattern=r"^[^.]+\..+$", description="a score of a task, `TASK.SCORE`, such as `pope.f1`")
]


class Lora(Section):
    """LoRA adapters on all linear layers of the language model."""

    r: PositiveInteger = Field(128, description="rank")
    alpha: PositiveInteger = Field(256, description="scaling numerator: updates are scaled by `alpha / r`")
    dropout: Fraction = Field(0.05, description="dropout probability of the adapter inputs")


class EvaluateEvery(Section):
    """Evaluation during training: tasks, and answers to the questions of fixed samples."""

    steps: PositiveInteger = Field(description="steps between evaluations; the last step is evaluated as well")
    tasks: tuple[PeriodicTask, ...] = Field((), description="tasks to score; each needs all its options")
    samples: NonNegativeInteger = Field(
        4, description="number of validation samples (without any: training samples) that are answered"
    )

    @model_validator(mode="after")
    def _distinct_tasks(self) -> EvaluateEvery:
        names = [task.name for task in self.tasks]
        if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"tasks: {repeated[0]} is listed twice; its scores would have the same names")
        return self


class Stage(Section):
    """Settings that all training stages have."""

    template: Template = None
    image: Literal["square", "pad"] | None = Field(
        None, description="overrides `vision.image` in this stage, which needs a second set of features"
    )
    image_order: ImageOrder = Field(
        "first",
        description="position of the images: before the text of each turn, at random before or after the text of the "
        "first turn, or as in the record",
    )
    epochs: PositiveNumber = Field(1, description="passes over the data")
    max_steps: PositiveInteger | None = Field(None, description="stop after this many optimizer steps")
    batch_size: BatchSize = 128
    micro_batch_size: MicroBatchSize = 16
    micro_batch_tokens: PositiveInteger | Literal["auto"] | None = Field(
        None,
        description="largest micro-batch, in tokens; a longer sample is a micro-batch by itself; null: no limit; auto: "
        "chosen before training",
    )
    packing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="sequence packing: where it is exact (on CUDA devices after a check), always or an error, or never "
        "(docs/reference/training.md#sequence-packing)",
    )
    shuffle: Literal["samples", "images"] = Field(
        "samples", description="shuffle by sample, or by image: all samples of an image together, to share its prefix"
    )
    learning_rate: LearningRate = 1e-3
    connector_learning_rate: PositiveNumber | None = Field(
        None, description="peak learning rate of the connector; null: `learning_rate`"
    )
    train_connector: Boolean | tuple[str, ...] = Field(
        True,
        description="true: all parameters of the connector; false: none; a list: only those whose names contain one of "
        "these strings",
    )
    optimizer: str | OptimizerSpec = Field(
        "adamw",
        description="`llavactl components optimizers` lists them; AdamW updates the weights that the optimizer "
        "doesn't. muon: Muon for the matrices of the language model except embeddings and head",
    )
    schedule: str | ScheduleSpec | None = Field(
        None,
        description="learning-rate schedule after the warm-up (`llavactl components schedules`); null: cosine decay, "
        "or as `cooldown` says",
    )
    warmup: Fraction = Field(0.03, description="fraction of all steps with a linear warm-up")
    cooldown: Fraction | None = Field(
        None,
        description="fraction of all steps with a linear decay to 0, after a constant rate; null: cosine decay",
    )
    weight_decay: NonNegativeNumber = Field(0.0, description="weight decay; norms and biases are excluded")
    max_grad_norm: PositiveNumber | None = Field(
        None, description="gradient clipping norm; null: no clipping, as in LLaVA"
    )
    adam_beta2: Fraction = Field(0.999, description="AdamW's β2")
    max_length: PositiveInteger = Field(
        2048, description="largest sample, in tokens, image tokens included; text is truncated, images never"
    )
    validation: Fraction = Field(0.01, description="fraction of the images whose samples are held out for validation")
    precision: Precision = Field("bfloat16", description="dtype of the model; master weights are float32")
    gradient_checkpointing: Boolean | Literal["auto"] = Field(
        False, description="recompute activations in the backward pass: less memory, more time; auto: only if necessary"
    )
    checkpoint_every: PositiveInteger = Field(500, description="steps between checkpoints")
    keep_last: PositiveInteger = Field(
        2, description="number of checkpoints to keep; the one with the lowest validation loss is kept in addition"
    )
    restore_best: Boolean | ScoreName = Field(
        False,
        description="save the model of the best checkpoint, not of the last step. true: the one with the lowest "
        "validation loss; `TASK.SCORE`, such as `pope.f1`: the one with the highest score of a task in "
        "`evaluate_every`",
    )
    preview_every: PositiveNumber | None = Field(
        None,
        description="seconds between previews of the model in training "
        "(docs/reference/training.md#previews-during-training); null: none",
    )
    evaluate_every: EvaluateEvery | None = Field(
        None,
        description="evaluation during training (docs/reference/training.md#evaluation-during-training); null: none",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_micro_batch_size(cls, values: Any) -> Any:
        """With ``batch_size`` only, the default ``micro_batch_size`` is reduced to a divisor of it."""
        size = values.get("batch_size") if isinstance(values, dict) else None
        if type(size) is not int or size < 1 or "micro_batch_size" in values:
            return values
        largest = cls.model_fields["micro_batch_size"].default
        return {**values, "micro_batch_size": max(n for n in range(1, largest + 1) if size % n == 0)}

    @model_validator(mode="after")
    def _check_batches_and_schedule(self) -> Stage:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.warmup + (self.cooldown or 0) > 1:
            raise ValueError(f"warmup {self.warmup} + cooldown {self.cooldown} is more than 1")
        return self

    @model_validator(mode="after")
    def _one_schedule(self) -> Stage:
        if self.schedule is not None and self.cooldown is not None:
            raise ValueError("cooldown: not with `schedule`, which sets the learning rate after the warm-up")
        return self

    def optimizer_spec(self) -> str | dict[str, Any]:
        """The optimizer's name, or {"name": …, options}."""
        return spec_of(self.optimizer)

    def schedule_spec(self) -> str | dict[str, Any] | None:
        """The schedule's name, or {"name": …, options}; None: cosine decay, or as ``cooldown`` says."""
        return None if self.schedule is None else spec_of(self.schedule)

    @model_validator(mode="after")
    def _restore_best_follows_a_task(self) -> Stage:
        tasks = [task.name for task in self.evaluate_every.tasks] if self.evaluate_every else []
        if isinstance(self.restore_best, str) and self.restore_best.partition(".")[0] not in tasks:
            available = f"available: {', '.join(tasks)}" if tasks else "there are none"
            raise ValueError(f"restore_best {self.restore_best}: expected a task of evaluate_every; {available}")
        return self


class Stage1(Stage):
    """Stage 1 trains the connector; vision encoder and language model are frozen."""

    init: ClassVar[Literal["scratch"]] = "scratch"
    method: ClassVar[Literal["connector"]] = "connector"
    trainable_modules: ClassVar[tuple[str, ...]] = ()

    box_alignment_steps: NonNegativeInteger = Field(
        0,
        description="steps before training that fit the connector to the boxes of the data "
        "(docs/reference/training.md#box-alignment)",
    )
    template: Template = "plain"
    batch_size: BatchSize = 256
    micro_batch_size: MicroBatchSize = 32

    @model_validator(mode="after")
    def _trains_the_connector(self) -> Stage1:
        if not self.train_connector:
            raise ValueError("train_connector: stage 1 trains nothing else")
        return self


class Stage2(Stage):
    """Stage 2 trains the connector and the language model; the vision encoder is frozen."""

    box_alignment_steps: ClassVar[int] = 0

    init: Literal["stage1", "scratch"] | ModelId = Field(
        "stage1",
        description="initial model: the connector of stage 1, an untrained connector, or a model of any format, a "
        "folder or an id",
    )
    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="full fine-tuning, LoRA adapters, or LoRA adapters on a language model in 4 bits"
    )
    trainable_modules: tuple[str, ...] = Field(
        (),
        description="with `method: full`: train only parameters of the language model whose names contain one of these "
        "strings, such as `[self_attn, norm]`; empty: all",
    )
    lora: Lora = Field(Lora(), description="settings of `method: lora` and `method: qlora`")
    learning_rate: LearningRate = 2e-5

    @model_validator(mode="after")
    def _trainable_modules_need_full(self) -> Stage2:
        if self.trainable_modules and self.method != "full":
            raise ValueError(
                f"trainable_modules: only for method full; method {self.method} trains adapters of all linear layers"
            )
        return self


AnyStage = Stage1 | Stage2
StageNumber = int
"""1 for ``stage1``, …: a key of ``STAGES``."""


class StageSections(Section):
    """The sections of all training stages, in training order."""

    stage1: Stage1 = Field(Stage1(), description="settings of stage 1")
    stage2: Stage2 = Field(Stage2(), description="settings of stage 2")


STAGES: dict[StageNumber, str] = dict(enumerate(StageSections.model_fields, 1))
"""The section of each stage, by number."""


def step_title(step: str) -> str:
    """The ``step`` of a run in text: ``stage 1`` for ``stage1``."""
    return next((f"stage {number}" for number, section in STAGES.items() if step == section), step)


@dataclass(frozen=True)
class TrainingStage:
    """Stage ``number`` of a recipe: its settings and sources, and the specs of its vision encoder and template.

    ``image`` is the square preprocessing of the vision encoder; "" if it has no such option.
    """

    number: StageNumber
    settings: AnyStage
    sources: tuple[SourceSpec, ...]
    image: str
    vision: dict[str, Any]
    template: str | dict[str, Any]
