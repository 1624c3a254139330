"""Component specs: mappings of a registered name and options, such as ``{name: clip, model: …}``.

The options are validated by the component's own options model (see ``recipe.load``).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llavactl.core.options import RecipePath
from llavactl.recipe.values import Boolean, PositiveInteger, PositiveNumber


class Component(BaseModel):
    """A component: its registered name and its options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: ClassVar[str]
    """The component kind in the registry."""

    named_by: ClassVar[str] = "name"
    """The key that holds the registered name."""

    def spec(self) -> dict[str, Any]:
        """``{"name": …, options}``, the argument of ``Registry.create``."""
        return {"name": getattr(self, self.named_by), **self.model_dump(exclude={self.named_by, *self.frame_keys()})}

    @classmethod
    def frame_keys(cls) -> set[str]:
        """Keys that llavactl reads itself and doesn't pass to the component."""
        return set()

    @classmethod
    def hidden_options(cls, model: type[BaseModel]) -> list[str]:
        """The options in ``model`` that a recipe can't set, because the recipe uses these keys itself."""
        names = {field.alias or name for name, field in model.model_fields.items()}
        return sorted(names & {cls.named_by, *cls.frame_keys()})


class Spec(Component):
    """A component named by the key ``name``."""

    name: str = Field(description="registered name; `llavactl components` lists the components")


class VisionSpec(Spec):
    """A vision encoder. Only encoders that can crop and pad images have the option ``image``."""

    kind = "vision"

    image: Literal["square", "pad"] | None = None

    def spec(self) -> dict[str, Any]:
        return {key: value for key, value in super().spec().items() if key != "image" or value is not None}


class ConnectorSpec(Spec):
    """A connector from vision features to language embeddings."""

    kind = "connectors"


class TemplateSpec(Spec):
    """A conversation template with options."""

    kind = "templates"


class OptimizerSpec(Spec):
    """An optimizer with options."""

    kind = "optimizers"


class ScheduleSpec(Spec):
    """A learning-rate schedule with options."""

    kind = "schedules"


def spec_of(component: str | Spec) -> str | dict[str, Any]:
    """The argument of ``Registry.create`` for a component that may be given by its name only."""
    return component if isinstance(component, str) else component.spec()


class LanguageSpec(Spec):
    """A language model and its conversation template."""

    kind = "languages"

    template: str | TemplateSpec = Field(
        "vicuna-v1",
        description="conversation template: a name, or a mapping with options such as "
        "`{name: tokenizer, enable_thinking: false}`",
    )

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"template"}


class SourceSpec(Spec):
    """A source of training samples."""

    kind = "sources"

    weight: PositiveNumber = Field(
        1.0,
        description="copies of each sample per epoch; 1.5: one copy of every sample and a second copy of half of them",
    )
    phase: PositiveInteger = Field(
        1,
        description="order in the epoch: lower phases first; sources of the same phase are shuffled together",
    )
    split_turns: Boolean = Field(
        False, description="make each question with its answer a separate sample, without the other turns"
    )

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"weight", "phase", "split_turns"}


class CaptionSourceSpec(Spec):
    """A source of images with captions and boxes for a teacher."""

    kind = "sources"


class TeacherSpec(Spec):
    """A teacher that writes instruction data."""

    kind = "teachers"


class TaskSpec(Spec):
    """An evaluation task."""

    kind = "tasks"


class PeriodicTask(TaskSpec):
    """A task that is evaluated during training, with its own options."""

    limit: PositiveInteger = Field(50, description="number of questions: the first ones of the task")
    protocol: str | None = Field(None, description="scoring protocol; null: the task's default")

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"limit", "protocol"}


class Export(Component):
    """An export of the trained model to another format."""

    kind = "formats"
    named_by = "format"

    format: str = Field(description="`llavactl components formats` lists the formats and their options")
    to: RecipePath = Field(description="output folder")
    verify: Boolean = Field(
        True,
        description="reload the export without llavactl and compare the outputs; formats that can't be reloaded are "
        "exported without verification, with a log line",
    )
    allow_different: Boolean = Field(False, description="keep an export that differs from the model")

    @classmethod
    def frame_keys(cls) -> set[str]:
        return {"to", "verify", "allow_different"}


def hidden_options(kind: str, model: type[BaseModel]) -> list[str]:
    """The options of a component of ``kind`` that a recipe can't set somewhere, see ``Component.hidden_options``."""
    specs: list[type[Component]] = [*Spec.__subclasses__(), *TaskSpec.__subclasses__(), Export]
    return sorted({name for spec in specs if spec.kind == kind for name in spec.hidden_options(model)})
