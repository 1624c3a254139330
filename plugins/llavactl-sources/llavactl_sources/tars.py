"""The source ``webdataset``: tar shards with an image and a caption or a conversation per key.

Nothing is unpacked: an index of a shard's members is kept in llavactl's cache folder, and an image is one ranged read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from llavactl import Json, Options, RawRecord, RecipePath, cache_dir
from llavactl_sources.files import MAX_IMAGE_BYTES, file_stamp, files_of, folder_of, stamps_of
from llavactl_sources.forms import CONVERSATION_KEYS
from llavactl_sources.records import ConversationSource, RecordWithImages

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "caption")
_MAX_TEXT_BYTES = 1 << 24
_FORMAT = 1
"""The version of the layout of cached indexes."""


class WebdatasetOptions(Options):
    """Options of the source ``webdataset``."""

    path: RecipePath = Field(
        description="a .tar file, a folder of them, or a pattern such as shards/*.tar or shards/{00000..00331}.tar"
    )
    caption_key: str = Field("caption", description="key of the caption in .json members, used without a .txt member")


class Member(NamedTuple):
    """``size`` bytes at ``offset`` of a shard; ``size`` is -1 for a link, which is not read."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarImage:
    """The image ``name`` in a tar file: ``size`` bytes at ``offset`` of ``shard``.

    ``stamp_of_shard`` is that of the shard when it was indexed.
    """

    shared_fields: ClassVar[tuple[str, ...]] = ("shard", "stamp_of_shard")

    shard: str
    stamp_of_shard: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        if file_stamp(self.shard) != self.stamp_of_shard:
            raise OSError(f"{self.shard} has changed since it was indexed")
        if self.size > MAX_IMAGE_BYTES:
            raise OSError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        with Path(self.shard).open("rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.shard} is truncated")
        return data

    def stamp(self) -> str | None:
        return f"{self.shard}\0{file_stamp(self.shard)}\0{self.offset}"


class WebDataset(ConversationSource):
    """One sample per key, in the order of shards and of each key's first member.

    A key is a member's name up to the first dot of its last part, and has the extensions after it.
    """

    def __init__(self, options: WebdatasetOptions) -> None:
        self.options = options
        self.path = folder_of(options.path)

    def files(self) -> list[Path]:
        """Raises DataError if there are none."""
        return files_of(self.options.path, ".tar")

    def check(self) -> None:
        self.files()

    def identity(self) -> Mapping[str, Json]:
        """The shards with sizes and times: hashing them would read all images."""
        return {"shards": stamps_of(self.files(), self.path)}

    def records(self) -> Iterator[RawRecord]:
        index = 0
        for shard in self.files():
            try:
                stamp = file_stamp(shard)
                members, problem = indexed_members(shard, stamp)
                with shard.open("rb") as file:
                    for key, own in _by_key(members).items():
                        yield self._record(shard, stamp, file, key, own, index)
                        index += 1
            except OSError as error:
                problem = str(error.strerror or error)
            if problem:
                yield RawRecord(str(shard), None, index, problem=problem)
                index += 1

    def _record(self, shard: Path, stamp: str, file: Any, key: str, members: Sequence[Member], index: int) -> RawRecord:
        where = f"{shard} {key}"
        by_extension: dict[str, Member] = {}
        for member in members:
            extension = _extension(member.name)
            if extension in by_extension:
                return RawRecord(where, None, index, problem=f"two members {member.name!r}")
            by_extension[extension] = member
        images = {
            member.name: TarImage(str(shard), stamp, member.name, member.offset, member.size)
            for extension, member in by_extension.items()
            if extension.rpartition(".")[2] in IMAGES
        }
        if links := [member.name for member in members if member.size < 0]:
            return RawRecord(where, None, index, problem=f"{links[0]} is a link, which is not read")
        try:
            value = self._value(file, by_extension)
        except ValueError as error:
            return RawRecord(where, None, index, problem=str(error))
        named = [name for name in ("image", "images") if value.pop(name, None)]
        if named and not images:
            return RawRecord(where, None, index, problem=f"no image, but `{named[0]}` in its .json member")
        names = list(images)
        record = {**value, "id": key if value.get("id") is None else value["id"]}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        return RecordWithImages(where, record, index, images=images)

    def _value(self, file: Any, members: Mapping[str, Member]) -> dict[str, Any]:
        """The contents of the members other than images; raises ValueError."""
        value: dict[str, Any] = {}
        if "json" in members:
            text = _text(file, members["json"])
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{members['json'].name}: not JSON: {error}") from error
            if not isinstance(value, dict):
                raise ValueError(f"{members['json'].name}: expected an object, got {value!r:.60}")
        captions = [_text(file, members[extension]) for extension in TEXTS if extension in members]
        if captions:
            is_conversation = any(isinstance(value.get(key), list) for key in ("conversations", "messages"))
            metadata = value if is_conversation else {key: value[key] for key in value if key not in CONVERSATION_KEYS}
            return {**metadata, "caption": captions[0].strip()}
        caption = value.pop(self.options.caption_key, None)
        return value if caption is None else {**value, "caption": caption}


def _text(file: Any, member: Member) -> str:
    if member.size > _MAX_TEXT_BYTES:
        raise ValueError(f"{member.name}: larger than {_MAX_TEXT_BYTES >> 20} MiB")
    file.seek(member.offset)
    data = file.read(max(member.size, 0))
    try:
        text: str = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name}: not UTF-8: byte {error.start}") from error
    return text


def _by_key(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Members by key; hidden files, and those without an extension, belong to no key."""
    keys: dict[str, list[Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if stem and dot and not folder.startswith("__MACOSX"):
            keys.setdefault(f"{folder}{slash}{stem}", []).append(member)
    return keys


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def indexed_members(shard: Path, stamp: str) -> tuple[list[Member], str]:
    """The members of ``shard``, and why reading ended before its end, or "". The index of a whole shard is cached."""
    name = hashlib.sha256(str(shard).encode()).hexdigest()[:32]
    cached = Path(cache_dir()) / "tar-indexes" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        index = json.loads(cached.read_text(encoding="utf-8"))
        if index["stamp"] == [_FORMAT, str(shard), stamp]:
            return [Member(*member) for member in index["members"]], ""
    members, problem = _scan(shard)
    if not problem:
        with contextlib.suppress(OSError):  # the cache is optional
            _write(cached, {"stamp": [_FORMAT, str(shard), stamp], "members": members})
    return members, problem


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(file.name, path)  # noqa: PTH105


def _scan(shard: Path) -> tuple[list[Member], str]:
    members: list[Member] = []
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isreg() and not info.issparse():
                    members.append(Member(name, info.offset_data, info.size))
                elif info.issym() or info.islnk():
                    members.append(Member(name, info.offset_data, -1))
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile treats an invalid header as the end
                return members, f"the header at byte {tar.offset} is damaged"
    except (tarfile.TarError, ValueError) as error:
        return members, f"not a complete .tar without compression: {error}"
    return members, ""
