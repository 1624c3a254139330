"""Keys of requests: the hash under which a reply is stored in the journal."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llavactl.core.protocols import LanguageTeacher, Request
from llavactl.teaching.budget import RequestSize


@dataclass(frozen=True)
class KeyedRequest:
    """A request and the key of its reply in the journal."""

    key: str
    request: Request


def with_keys(teacher: LanguageTeacher, requests: Iterable[Request]) -> Iterator[KeyedRequest]:
    """Each request with the hash of the content that determines its reply.

    Repeated content gets a numbered key (``…-1``, ``…-2``). Thus an image that is requested again gets a second reply,
    and two images with the same captions get one reply each, in any order.
    """
    occurrences = Counter[str]()
    for request in requests:
        content = json.dumps(teacher.content(request), sort_keys=True, ensure_ascii=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:32]
        yield KeyedRequest(f"{digest}-{occurrences[digest]}" if occurrences[digest] else digest, request)
        occurrences[digest] += 1


def request_size(request: Request) -> RequestSize:
    """The size of ``request`` in bytes and messages."""
    content_bytes = sum(len(message["content"].encode("utf-8", "replace")) for message in request.messages)
    return RequestSize(content_bytes, len(request.messages))
