"""Prices of models, read from an editable YAML file with a date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llavactl.teaching import yaml_files

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Price(BaseModel):
    """The price of a million input tokens (``in`` in the file) and output tokens (``out``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    per_million_in: Amount = Field(alias="in")
    per_million_out: Amount = Field(alias="out")

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """The cost of ``tokens_in`` input and ``tokens_out`` output tokens."""
        return (tokens_in * self.per_million_in + tokens_out * self.per_million_out) / 1e6

    def scaled(self, factor: float) -> Price:
        """The price times ``factor``."""
        return Price(per_million_in=self.per_million_in * factor, per_million_out=self.per_million_out * factor)


class Prices(yaml_files.FileModel):
    """A price file; ``batch`` is the factor for requests in batch files."""

    date: str
    currency: str = "USD"
    batch: Amount = 1.0
    models: Mapping[str, Price]


def load_prices(file: Path | None = None) -> Prices:
    """The prices in ``file`` (default: the built-in ones).

    Raises:
        RecipeError: it isn't a valid price file.
    """
    return yaml_files.load(file or yaml_files.PACKAGE / "prices.yaml", Prices)
