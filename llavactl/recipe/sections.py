"""Sections of a recipe, except the training stages (``recipe.stages``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from llavactl.core.options import RecipePath
from llavactl.recipe.specs import CaptionSourceSpec, SourceSpec, TaskSpec, TeacherSpec
from llavactl.recipe.stages import STAGES
from llavactl.recipe.values import Boolean, ComputeType, NonNegativeNumber, PositiveInteger, Section


class Features(Section):
    """Vision features: cached in the feature store, or computed during training."""

    mode: Literal["cached", "live"] = Field(
        "cached", description="cached: extract once into the feature store; live: encode images in every step"
    )
    dtype: Literal["float16", "int8"] = Field(
        "float16",
        description="dtype of stored features; int8 needs half the disk space "
        "(docs/explanation/features.md#int8-features)",
    )
    compute: ComputeType = Field("float32", description="dtype in which the vision encoder computes")
    batch_size: PositiveInteger = Field(16, description="images per forward pass of the vision encoder")
    workers: PositiveInteger = Field(2, description="threads that read and preprocess images")
    shard_images: PositiveInteger = Field(1024, description="images per HDF5 shard of the feature store")


_SOURCES: dict[str, Any] = {
    section: (tuple[SourceSpec, ...], Field((), description=f"sources of stage {number}"))
    for number, section in STAGES.items()
}
_PerStage: Any = create_model("_PerStage", __base__=Section, **_SOURCES)


class Data(_PerStage):
    """Training data: a list of sources for each stage."""


class SampleKinds(Section):
    """Relative frequencies of the kinds of samples; 0 leaves a kind out."""

    conversation: NonNegativeNumber = Field(0, description="weight of conversations with several turns")
    detail: NonNegativeNumber = Field(0, description="weight of detailed descriptions")
    reasoning: NonNegativeNumber = Field(0, description="weight of complex reasoning questions")

    @model_validator(mode="after")
    def _any_weight(self) -> SampleKinds:
        if not any(self.weights().values()):
            raise ValueError("at least one of conversation, detail, reasoning needs a weight above 0")
        return self

    def weights(self) -> dict[Literal["conversation", "detail", "reasoning"], float]:
        """The weight of every kind."""
        return {"conversation": self.conversation, "detail": self.detail, "reasoning": self.reasoning}


class Gates(Section):
    """Filters for samples written by a language model. Rejected samples are listed with the reason."""

    leaks: Boolean = Field(True, description="reject mentions of captions, boxes, coordinates or the prompt")
    structure: Boolean = Field(
        True,
        description="reject markup and turn markers in turns, and reasoning samples with several questions",
    )
    duplicates: Boolean = Field(True, description="reject a question that was already asked about the image")
    similarity: Annotated[float, Field(strict=True, gt=0, le=1)] | None = Field(
        0.8, description="reject samples more similar than this to an earlier one; null: no check"
    )
    max_words: PositiveInteger | None = Field(400, description="longest turn, in words; null: no limit")
    language: Literal["english"] | None = Field("english", description="required language; null: any")


class Generate(Section):
    """Instruction data written by a teacher."""

    source: CaptionSourceSpec = Field(description="source of images with captions and boxes")
    teacher: TeacherSpec = Field(description="model or rules that write the samples")
    kinds: SampleKinds = Field(description="relative frequencies of the kinds of samples")
    samples: PositiveInteger | None = Field(
        None, description="number of samples; null: one of each kind with a weight above 0 per image"
    )
    out: RecipePath = Field(description="output file, `.jsonl` or `.json`")
    prompts: RecipePath | None = Field(
        None, description="folder with conversation.yaml, detail.yaml and reasoning.yaml; null: the built-in prompts"
    )
    prices: RecipePath | None = Field(None, description="file of prices per token; null: the built-in prices")
    gates: Gates = Field(Gates(), description="filters for samples written by a language model")
    max_cost: NonNegativeNumber | None = Field(
        None, description="budget for `out` over all runs, in the currency of the prices; null: no limit"
    )

    @field_validator("out")
    @classmethod
    def _json_suffix(cls, out: Path) -> Path:
        if out.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{out.name}: expected the suffix .jsonl or .json")
        return out


class Eval(Section):
    """Evaluation after training."""

    tasks: tuple[TaskSpec, ...] = Field((), description="tasks to run")
    blind_baseline: Boolean = Field(
        True, description="also score the shuffled-image baseline: the same model, shown other images"
    )
    stage1_baseline: Boolean = Field(False, description="also score the model of stage 1")
    batch_size: PositiveInteger = Field(8, description="questions per batch")
    max_new_tokens: PositiveInteger = Field(128, description="longest answer, in tokens")
    explain: int = Field(
        0, ge=0, description="sample answers in the report with maps of the image parts that their words depend on"
    )


AxisValues = Annotated[tuple[Any, ...], Field(min_length=1)] | Annotated[dict[str, Any], Field(min_length=1)]


class Sweep(Section):
    """Variants of the recipe for `llavactl sweep`: all combinations of the values of the axes."""

    axes: dict[str, AxisValues] = Field(
        {},
        description="recipe keys (`vision.layer`, `connector`) with the values to compare: a list, or a mapping from "
        "labels to values",
    )
    seeds: PositiveInteger = Field(
        1, description="number of runs of each variant, with the seeds `seed`, `seed + 1`, …"
    )
