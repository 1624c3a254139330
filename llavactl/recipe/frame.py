"""The frame of a recipe: every key llavactl itself reads, with its default. Frozen; a misspelt key is an error.

A component (``Spec``) is always ``{name: …, its own options}``; its options belong to whoever
registered it and are validated by its own model (see ``recipe.load``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llavactl.core.options import ModelId, RecipePath

# Strict: without it pydantic takes `true` for 1 and the text "on" for true.
Switch = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
NotNegativeWhole = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, '.', '_', '-'")]
Precision = Literal["float32", "bfloat16", "float16"]
ImageOrder = Literal["first", "random", "as-data"]


class Section(BaseModel):
    """A mapping of the frame."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Component(BaseModel):
    """A component: its registered name and its own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: ClassVar[str]
    """The kind of component, as the registry calls it."""

    named_by: ClassVar[str] = "name"
    """The key that has the registered name."""

    def spec(self) -> dict[str, Any]:
        """``{"name": …, options}``, as ``Registry.create`` takes it."""
        return {"name": getattr(self, self.named_by), **self.model_dump(exclude={self.named_by, *self.frame_keys()})}

    @classmethod
    def frame_keys(cls) -> set[str]:
        """Keys that the frame reads itself and the component never sees."""
        return set()


class Spec(Component):
    """A component named by ``name``."""

    name: str


class VisionSpec(Spec):
    """``image`` is an option only of backbones that can either crop or pad images to a square."""

    kind = "vision"

    image: Literal["square", "pad"] | None = None

    def spec(self) -> dict[str, Any]:
        return {key: value for key, value in super().spec().items() if key != "image" or value is not None}


class ConnectorSpec(Spec):
    kind = "connectors"


class TemplateSpec(Spec):
    kind = "templates"


class LanguageSpec(Spec):
    """``template`` is a name, or a mapping with options, such as ``{name: tokenizer, enable_thinking: false}``."""

    kind = "languages"

    template: str | TemplateSpec = "vicuna-v1"

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"template"}


class SourceSpec(Spec):
    """A source of training samples: ``weight`` copies an epoch; those of a lower ``phase`` come first in it.

    ``split_turns``: each question with its answer is a sample of its own, without the other turns.
    """

    kind = "sources"

    weight: Positive = 1.0
    phase: Count = 1
    split_turns: Switch = False

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"weight", "phase", "split_turns"}


class TaskSpec(Spec):
    kind = "tasks"


class PictureSpec(Spec):
    """A source for its pictures: their captions and boxes are what a teacher is told."""

    kind = "sources"


class TeacherSpec(Spec):
    kind = "teachers"


class Kinds(Section):
    """Weights; 0 leaves a kind out."""

    conversation: NotNegative = 0
    detail: NotNegative = 0
    reasoning: NotNegative = 0

    @model_validator(mode="after")
    def _some(self) -> Kinds:
        if not any(self.weights().values()):
            raise ValueError("at least one of conversation, detail, reasoning needs a weight above 0")
        return self

    def weights(self) -> dict[Literal["conversation", "detail", "reasoning"], float]:
        """The weight of every kind."""
        return {"conversation": self.conversation, "detail": self.detail, "reasoning": self.reasoning}


class Gates(Section):
    """What a language model's samples must pass; ``teaching.gates`` has the rules."""

    leaks: Switch = True
    structure: Switch = True
    duplicates: Switch = True
    similarity: Annotated[float, Field(strict=True, gt=0, le=1)] | None = 0.8
    max_words: Count | None = 400
    language: Literal["english"] | None = "english"


class Generate(Section):
    """Instruction data made by a teacher; without ``samples``, one of each kind about every picture.

    ``max_cost`` is in the currency of the prices, for all that was ever spent on ``out``.
    """

    source: PictureSpec
    teacher: TeacherSpec
    kinds: Kinds
    samples: Count | None = None
    out: RecipePath
    prompts: RecipePath | None = None
    prices: RecipePath | None = None
    gates: Gates = Gates()
    max_cost: NotNegative | None = None

    @field_validator("out")
    @classmethod
    def _records(cls, given: Path) -> Path:
        if given.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{given.name} must end in .jsonl, or in .json for one list")
        return given


class Features(Section):
    mode: Literal["cached", "live"] = "cached"
    dtype: Literal["float16", "int8"] = "float16"
    compute: Precision = "float32"
    batch_size: Count = 16
    workers: Count = 2
    shard_images: Count = 1024


class Lora(Section):
    r: Count = 128
    alpha: Count = 256
    dropout: Share = 0.05


class Stage(Section):
    """One training stage. Sizes are in samples; ``batch_size`` is the global batch size of one optimiser step.

    ``micro_batch_size`` is the largest micro-batch; it has fewer samples if they exceed ``micro_batch_tokens`` tokens.
    ``packing``: sequence packing where it is exact and tested (auto), wherever it is exact (always), or never.
    ``shuffle`` by sample, or by image: all conversations of an image together, so that its prefix is shared.
    ``cooldown``: constant learning rate with a linear decay over this last fraction of steps; null: cosine decay.
    ``weight_decay`` excludes norms and biases. ``max_grad_norm`` clips the gradient; null, as in LLaVA: no clipping.
    ``restore_best``: the model gets the weights of the best checkpoint (lowest validation loss), else of the last step.
    """

    template: str | TemplateSpec | None = None
    image: Literal["square", "pad"] | None = None
    image_order: ImageOrder = "first"
    epochs: Positive = 1
    max_steps: Count | None = None
    batch_size: Count = 128
    micro_batch_size: Count = 16
    micro_batch_tokens: Count | None = None
    packing: Literal["auto", "always", "never"] = "auto"
    shuffle: Literal["samples", "images"] = "samples"
    learning_rate: Positive = 1e-3
    connector_learning_rate: Positive | None = None
    warmup: Share = 0.03
    cooldown: Share | None = None
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive | None = None
    adam_beta2: Share = 0.999
    max_length: Count = 2048
    validation: Share = 0.01
    precision: Precision = "bfloat16"
    gradient_checkpointing: Switch = False
    checkpoint_every: Count = 500
    keep_last: Count = 2
    restore_best: Switch = False

    @model_validator(mode="before")
    @classmethod
    def _micro_batch_fits(cls, given: Any) -> Any:
        """A ``batch_size`` alone is enough: the default micro batch shrinks to a divisor of it."""
        size = given.get("batch_size") if isinstance(given, dict) else None
        if type(size) is not int or size < 1 or "micro_batch_size" in given:
            return given
        most = cls.model_fields["micro_batch_size"].default
        return {**given, "micro_batch_size": max(n for n in range(1, most + 1) if size % n == 0)}

    @model_validator(mode="after")
    def _fits(self) -> Stage:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.warmup + (self.cooldown or 0) > 1:
            raise ValueError(f"warmup {self.warmup} and cooldown {self.cooldown} are more than all steps")
        return self


class Stage1(Stage):
    """``box_alignment_steps``: for this many steps before training, the connector is fitted to the data's boxes."""

    method: ClassVar[Literal["connector"]] = "connector"
    optimizer: ClassVar[Literal["adamw"]] = "adamw"
    trainable_modules: ClassVar[tuple[str, ...]] = ()

    box_alignment_steps: NotNegativeWhole = 0
    template: str | TemplateSpec | None = "plain"
    batch_size: Count = 256
    micro_batch_size: Count = 32


class Stage2(Stage):
    """``init``: what it starts from: stage 1's connector, nothing, or a whole model of any format (folder or id).

    ``trainable_modules``: parts of names, such as ``self_attn``; with method ``full``, all other weights of the
    language model are frozen. ``qlora``: LoRA on a language model in 4 bits. ``optimizer: muon`` trains the language
    model's matrices, except embeddings and head, with Muon and all other weights with AdamW.
    """

    box_alignment_steps: ClassVar[int] = 0

    init: Literal["stage1", "scratch"] | ModelId = "stage1"
    method: Literal["full", "lora", "qlora"] = "full"
    trainable_modules: tuple[str, ...] = ()
    lora: Lora = Lora()
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 2e-5

    @model_validator(mode="after")
    def _modules_of_full(self) -> Stage2:
        if self.trainable_modules and self.method != "full":
            raise ValueError(
                f"trainable_modules: only for method full; method {self.method} trains adapters of all linear layers"
            )
        return self


AnyStage = Stage1 | Stage2
StageNumber = Literal[1, 2]


@dataclass(frozen=True)
class TrainingStage:
    """Stage ``number`` of a recipe: its settings and data, and the specs of its vision backbone and template.

    ``image`` says how the backbone makes images square; "" if it has no such option.
    """

    number: StageNumber
    settings: AnyStage
    sources: tuple[SourceSpec, ...]
    image: str
    vision: dict[str, Any]
    template: str | dict[str, Any]


class Data(Section):
    stage1: tuple[SourceSpec, ...] = ()
    stage2: tuple[SourceSpec, ...] = ()


class Eval(Section):
    """``blind_baseline``: also score the model with shuffled images. ``stage1``: also score the stage 1 model."""

    tasks: tuple[TaskSpec, ...] = ()
    blind_baseline: Switch = True
    stage1: Switch = False
    batch_size: Count = 8
    max_new_tokens: Count = 128


class Export(Component):
    """One export of the finished model for other programs; ``verify`` reloads it without llavactl and compares.

    Formats that can't be reloaded are exported without verification, and the log says so.
    """

    kind = "formats"
    named_by = "format"

    format: str
    to: RecipePath
    verify: Switch = True

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"to", "verify"}


class Outline(Section):
    """A resolved recipe with any of its sections: defaults filled in, paths absolute, options validated.

    Commands require only the sections that they need: ``data generate`` no model, ``extract`` a ``VisionRecipe``.
    ``try_next`` are suggestions shown in the report of a finished run.
    """

    name: FileName
    vision: VisionSpec | None = None
    connector: ConnectorSpec | None = None
    language: LanguageSpec | None = None
    features: Features = Features()
    data: Data = Data()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    eval: Eval = Eval()
    generate: Generate | None = None
    export: tuple[Export, ...] = ()
    try_next: tuple[str, ...] = ()
    seed: Whole = 0
    run_dir: RecipePath


class VisionRecipe(Outline):
    """A recipe with a vision backbone, as needed for extracting features."""

    vision: VisionSpec

    def stage(self, number: StageNumber) -> TrainingStage:
        """Everything that belongs to stage ``number``; specs are as ``Registry.create`` takes them."""
        settings: AnyStage = self.stage1 if number == 1 else self.stage2
        sources = self.data.stage1 if number == 1 else self.data.stage2
        image = settings.image or self.vision.image or ""
        vision = {**self.vision.spec(), **({"image": image} if image else {})}
        template = settings.template or (self.language or LanguageSpec(name="")).template
        return TrainingStage(
            number, settings, sources, image, vision, template if isinstance(template, str) else template.spec()
        )

    def stages(self) -> tuple[TrainingStage, ...]:
        """All stages, in order."""
        return tuple(self.stage(number) for number in get_args(StageNumber))

    @model_validator(mode="after")
    def _image_is_an_option(self) -> VisionRecipe:
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage.image and self.vision.image is None:
                raise ValueError(f"{name}.image: vision backbone {self.vision.name} has no option `image`")
        return self


class Recipe(VisionRecipe):
    """A complete recipe, as needed for training."""

    connector: ConnectorSpec
    language: LanguageSpec

    @model_validator(mode="after")
    def _boxes_lie_on_patches(self) -> Recipe:
        if self.stage1.box_alignment_steps and self.stage(1).image != "square":
            raise ValueError(
                "stage1.box_alignment_steps needs `vision.image: square`: boxes are fractions of the image, "
                "which padding would move"
            )
        return self
