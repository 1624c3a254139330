"""What a model's tokens cost: an editable file with a date, for nobody else knows what a seller asks today."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llavactl.teaching import files

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Price(BaseModel):
    """What a million tokens cost, read and written."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    read: Amount = Field(alias="in")
    written: Amount = Field(alias="out")

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.read + tokens_out * self.written) / 1e6

    def times(self, share: float) -> Price:
        """A share of the price."""
        return self.model_copy(update={"read": self.read * share, "written": self.written * share})


class Prices(files.Checked):
    """A file of prices; ``batch`` is the share of a price that a request by batch file costs."""

    date: str
    currency: str = "USD"
    batch: Amount = 1.0
    models: Mapping[str, Price]


def prices(file: Path | None = None) -> Prices:
    """The prices in ``file``, else those that come with llavactl.

    Raises:
        RecipeError: it isn't a file of prices.
    """
    return files.load(file or files.HERE / "prices.yaml", Prices)
