"""The source ``messages``: JSON or JSONL records of ShareGPT, ms-swift, LLaMA-Factory and TRL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from llavactl import FollowLinks, ImageLocation, ImageRoot, Json, Options, RawRecord, RecipePath, RecipePlace, registry
from llavactl_sources.forms import Form
from llavactl_sources.records import ConversationSource


class MessagesOptions(Options):
    """Options of the source ``messages``."""

    path: RecipePath = Field(description="JSON list or JSONL of records")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar, pattern of these, or URL of the images; null: the folder of `path`"
    )
    follow_links: FollowLinks = False
    format: Form = Field("auto", description="auto: recognized for each record from its keys")


class Messages(ConversationSource):
    """One sample per record, in the file's order; images as in ``llava-json``."""

    def __init__(self, options: MessagesOptions) -> None:
        self.path: Path = options.path
        self.form = options.format
        self.root = ImageRoot(str(options.images or options.path.parent), options.follow_links)
        spec = options.model_dump(mode="json", exclude={"format"})
        self._file: Any = registry().create("sources", {"name": "llava-json", **spec})

    def check(self) -> None:
        self._file.check()

    def identity(self) -> Mapping[str, Json]:
        """A hash of the records, and the location of their images."""
        identity: Mapping[str, Json] = self._file.identity()
        return identity

    def records(self) -> Iterator[RawRecord]:
        """Every record of the file, read as ``llava-json`` reads it: with its line, and on after an error."""
        yield from self._file.records()

    def location(self, record: RawRecord) -> ImageLocation:  # noqa: ARG002
        return self.root
