"""Requests for a teacher, and LLaVA records from its replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import ExactTeacher, Reply, Request, Teacher
from llavactl.core.schema import Sample
from llavactl.images.image_file import RelativeImage
from llavactl.teaching.cleanup import ChatterError
from llavactl.teaching.messages import Prompts, load_prompts
from llavactl.teaching.replies import Kind, parse_turns

# Categories of refused records; the gates add their own.
MALFORMED = "malformed"
CHATTER = "chatter"
REFUSED = "refused by the teacher"
TRUNCATED = "truncated at max_tokens"
CONTENT_FILTER = "content filter"
NO_CAPTIONS = "no captions"


def build_requests(
    images: Sequence[Sample],
    kinds: Mapping[Kind, float],
    samples: int | None,
    seed: int,
    prompts: Prompts | None = None,
) -> Iterator[Request]:
    """The requests to the teacher about ``images``.

    Without ``samples``, one per image and kind with a weight above 0. Otherwise ``samples`` requests, divided among the
    kinds by weight, that go through the images in order and start over at the end.
    """
    prompts = prompts or load_prompts()
    enabled = [kind for kind, weight in kinds.items() if weight > 0]
    if samples is None:
        for image in images:
            yield from (_request(image, kind, 0, seed, prompts) for kind in enabled)
        return
    order = _shuffled_kinds(samples, {kind: kinds[kind] for kind in enabled}, seed)
    repetitions = Counter[tuple[int, Kind]]()
    for number, kind in enumerate(order):
        lap, index = divmod(number, len(images))
        yield _request(images[index], kind, lap, seed, prompts, repetitions[index, kind])
        repetitions[index, kind] += 1


def _shuffled_kinds(samples: int, weights: Mapping[Kind, float], seed: int) -> list[Kind]:
    """``samples`` kinds in proportion to their weights (largest remainders), shuffled."""
    total = sum(weights.values())
    exact = {kind: samples * weight / total for kind, weight in weights.items()}
    counts = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(exact, key=lambda kind: counts[kind] - exact[kind])[: samples - sum(counts.values())]:
        counts[kind] += 1
    order = [kind for kind, count in counts.items() for _ in range(count)]
    Random(f"{seed} kinds").shuffle(order)
    return order


def _request(image: Sample, kind: Kind, lap: int, seed: int, prompts: Prompts, repetition: int = 0) -> Request:
    request_id = f"{image.id}-{kind}" + (f"-{lap}" if lap else "")
    return Request(request_id, kind, prompts.messages(image, kind, repetition), image, seed)


@dataclass(frozen=True)
class GeneratedRecord:
    """The record of a request, or None with the ``category`` and ``reason`` of its refusal and the ``reply``."""

    request: Request
    record: Mapping[str, Any] | None
    reason: str = ""
    category: str = ""
    reply: str = ""


def generate_record(teacher: Teacher, request: Request, prompts: Prompts | None = None) -> GeneratedRecord:
    """Sends a request to the teacher and parses the reply."""
    try:
        reply = teacher.reply(request)
    except DataError as error:
        return GeneratedRecord(request, None, error.message, REFUSED)
    reply = reply if isinstance(reply, Reply) else Reply(reply)
    return parse_record(request, reply, prompts or load_prompts(), exact=is_exact(teacher))


def is_exact(teacher: Teacher) -> bool:
    """Whether the replies of ``teacher`` are correct by construction."""
    return isinstance(teacher, ExactTeacher) and teacher.exact


def parse_record(request: Request, reply: Reply, prompts: Prompts, *, exact: bool = False) -> GeneratedRecord:
    """Parses a reply into a LLaVA record, or gives the reason why it can't be used; ``exact`` as in ``parse_turns``."""
    kind: Any = request.kind
    if reply.finish == "length":
        return GeneratedRecord(request, None, "the reply was truncated at max_tokens", TRUNCATED, reply.text)
    if reply.finish == "content_filter":
        reason = "the endpoint removed part of the reply (content_filter)"
        return GeneratedRecord(request, None, reason, CONTENT_FILTER, reply.text)
    try:
        turns = parse_turns(kind, reply.text, request.id, prompts.questions, exact=exact)
    except DataError as error:
        finish = "" if reply.finish == "stop" else f" (finish reason: {reply.finish})"
        category = CHATTER if isinstance(error, ChatterError) else MALFORMED
        return GeneratedRecord(request, None, f"{error.message}{finish}", category, reply.text)
    images = request.sample.images
    conversations = [
        {"from": role, "value": text}
        for question, answer in turns
        for role, text in (("human", question), ("gpt", answer))
    ]
    conversations[0]["value"] = "<image>\n" * len(images) + conversations[0]["value"]
    record: dict[str, Any] = {"id": request.id, "kind": kind, "conversations": conversations}
    if images:
        paths = [image.path if isinstance(image, RelativeImage) else image.name for image in images]
        record["image"] = paths[0] if len(paths) == 1 else paths
    return GeneratedRecord(request, record, reply=reply.text)
