"""The frame of a recipe: its top-level keys. Frozen; unknown keys are errors.

Sections are defined in ``recipe.sections``, training stages in ``recipe.stages``, components in ``recipe.specs``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from llavactl.core.options import RecipePath
from llavactl.core.validation import KeyProblem
from llavactl.recipe.sections import Data, Eval, Features, Generate, Sweep
from llavactl.recipe.specs import ConnectorSpec, Export, LanguageSpec, SourceSpec, VisionSpec, spec_of
from llavactl.recipe.stages import STAGES, AnyStage, StageNumber, StageSections, TrainingStage
from llavactl.recipe.values import FileName, Integer, Section


class _Head(Section):
    """The keys before the training stages: a resolved recipe lists its keys in the order of the classes."""

    name: FileName
    vision: VisionSpec | None = Field(None, description="frozen vision encoder")
    connector: ConnectorSpec | None = Field(None, description="connector from vision features to language embeddings")
    language: LanguageSpec | None = Field(None, description="language model and its conversation template")
    features: Features = Field(Features(), description="precision, caching and loading of vision features")
    data: Data = Field(Data(), description="training data of the stages")


class Outline(StageSections, _Head):
    """A resolved recipe in which any section may be missing: defaults filled in, paths absolute, options validated.

    Commands require only the sections that they need: ``data generate`` needs no model, ``extract`` a ``VisionRecipe``.
    """

    eval: Eval = Field(Eval(), description="evaluation after training")
    generate: Generate | None = Field(None, description="instruction data written by a teacher; null: none")
    sweep: Sweep | None = Field(None, description="variants for `llavactl sweep`; null: those of its options")
    export: tuple[Export, ...] = Field((), description="exports of the trained model to other formats")
    try_next: tuple[str, ...] = Field((), description="suggestions shown at the end of the report")
    sharding: Literal["auto", "none", "full"] = Field(
        "auto",
        description="weights, gradients and optimizer state on every process (none), or a share of them on each (full, "
        "FSDP2); auto: chosen before training (docs/reference/training.md#sharding-and-optimizer-state)",
    )
    optimizer_state: Literal["auto", "device", "host"] = Field(
        "auto",
        description="master weights and moments on the device or in host memory, which is slower; auto: chosen before "
        "training",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (),
        description="experiment trackers that record the metrics of training, in `run_dir` "
        "(docs/reference/training.md#trackers)",
    )
    plugins: dict[str, dict[str, Any]] = Field(
        {}, description="options of plugins by plugin name, for their observers and commands"
    )
    seed: Integer = Field(0, description="random seed of initialization, data order, sampling and generated data")
    run_dir: RecipePath = Field(description="output folder of the run")

    def sources(self, number: StageNumber) -> tuple[SourceSpec, ...]:
        """The data sources of stage ``number``."""
        sources: tuple[SourceSpec, ...] = getattr(self.data, STAGES[number])
        return sources

    def conflicts(self) -> Iterator[KeyProblem]:
        """Keys that are valid, but not together with others, and the reason."""
        yield from ()

    def stages_with_data(self) -> tuple[StageNumber, ...]:
        """The numbers of the stages that have data sources, in order."""
        return tuple(number for number in STAGES if self.sources(number))


class VisionRecipe(Outline):
    """A recipe with a vision encoder, as needed for extracting features."""

    vision: VisionSpec

    def stage(self, number: StageNumber) -> TrainingStage:
        """The settings, sources and component specs of stage ``number``."""
        settings: AnyStage = getattr(self, STAGES[number])
        image = settings.image or self.vision.image or ""
        vision: dict[str, Any] = {**self.vision.spec(), **({"image": image} if image else {})}
        template = settings.template or (self.language or LanguageSpec(name="")).template
        return TrainingStage(number, settings, self.sources(number), image, vision, spec_of(template))

    def stages(self) -> tuple[TrainingStage, ...]:
        """All stages, in order."""
        return tuple(map(self.stage, STAGES))

    def conflicts(self) -> Iterator[KeyProblem]:
        for section in STAGES.values():
            if getattr(self, section).image and self.vision.image is None:
                yield (section, "image"), f"vision encoder {self.vision.name} has no option `image`"


class Recipe(VisionRecipe):
    """A complete recipe, as needed for training."""

    connector: ConnectorSpec
    language: LanguageSpec

    def conflicts(self) -> Iterator[KeyProblem]:
        yield from super().conflicts()
        for stage in self.stages():
            if stage.settings.box_alignment_steps and stage.image != "square":
                why = "needs `vision.image: square`: boxes are fractions of the image, which padding would shift"
                yield (STAGES[stage.number], "box_alignment_steps"), why
