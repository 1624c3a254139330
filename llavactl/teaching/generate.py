"""Which picture gets which kind of sample, and from there to LLaVA's records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import Reply, Request, Teacher
from llavactl.core.schema import Sample
from llavactl.images.image_file import Below
from llavactl.teaching.messages import Prompts, prompts
from llavactl.teaching.replies import Kind, turns
from llavactl.teaching.spoken import ChatterError

MALFORMED = "malformed"
CHATTER = "chatter"
UNANSWERED = "refused by the teacher"
CUT = "cut at max_tokens"
FILTERED = "left out by the endpoint"


def requests(
    pictures: Sequence[Sample],
    kinds: Mapping[Kind, float],
    samples: int | None,
    seed: int,
    told: Prompts | None = None,
) -> Iterator[Request]:
    """What the teacher is asked. Without ``samples`` every picture gets one of each kind whose weight is above 0.

    With it, ``samples`` are shared among the kinds by their weights and go round the pictures.
    """
    told = told or prompts()
    wanted = [kind for kind, weight in kinds.items() if weight > 0]
    if samples is None:
        for picture in pictures:
            yield from (_request(picture, kind, 0, seed, told) for kind in wanted)
        return
    order = _shared(samples, {kind: kinds[kind] for kind in wanted}, seed)
    before = Counter[tuple[int, Kind]]()
    for number, kind in enumerate(order):
        lap, place = divmod(number, len(pictures))
        yield _request(pictures[place], kind, lap, seed, told, before[place, kind])
        before[place, kind] += 1


def _shared(samples: int, weights: Mapping[Kind, float], seed: int) -> list[Kind]:
    """``samples`` kinds in the ratio of their weights (largest remainders), shuffled."""
    total = sum(weights.values())
    exact = {kind: samples * weight / total for kind, weight in weights.items()}
    counts = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(exact, key=lambda kind: counts[kind] - exact[kind])[: samples - sum(counts.values())]:
        counts[kind] += 1
    order = [kind for kind, count in counts.items() for _ in range(count)]
    Random(f"{seed} kinds").shuffle(order)
    return order


def _request(picture: Sample, kind: Kind, lap: int, seed: int, told: Prompts, again: int = 0) -> Request:
    name = f"{picture.id}-{kind}" + (f"-{lap}" if lap else "")
    return Request(name, kind, told.messages(picture, kind, again), picture, seed)


@dataclass(frozen=True)
class GeneratedRecord:
    """A request's record, or why there is none: in a word or two (``sort``), in full, and what the teacher said."""

    request: Request
    record: Mapping[str, Any] | None
    reason: str = ""
    sort: str = ""
    reply: str = ""


def made(teacher: Teacher, request: Request, told: Prompts | None = None) -> GeneratedRecord:
    """Asks the teacher and reads its reply."""
    try:
        reply = teacher.reply(request)
    except DataError as error:
        return GeneratedRecord(request, None, error.message, UNANSWERED)
    reply = reply if isinstance(reply, Reply) else Reply(reply)
    return record(request, reply, told or prompts(), exact=bool(getattr(teacher, "exact", False)))


def record(request: Request, reply: Reply, told: Prompts, *, exact: bool = False) -> GeneratedRecord:
    """A reply parsed into a LLaVA record, or kept with the reason if it can't be; ``exact`` as in ``turns``."""
    kind: Any = request.kind
    if reply.finish == "length":
        return GeneratedRecord(request, None, "the reply was cut at the limit of tokens", CUT, reply.text)
    if reply.finish == "content_filter":
        return GeneratedRecord(
            request, None, "the endpoint left out some of the reply (content_filter)", FILTERED, reply.text
        )
    try:
        said = turns(kind, reply.text, request.id, told.questions, exact=exact)
    except DataError as error:
        ended = "" if reply.finish == "stop" else f" (it ended with {reply.finish})"
        sort = CHATTER if isinstance(error, ChatterError) else MALFORMED
        return GeneratedRecord(request, None, f"{error.message}{ended}", sort, reply.text)
    images = request.sample.images
    messages = [
        {"from": role, "value": text}
        for question, answer in said
        for role, text in (("human", question), ("gpt", answer))
    ]
    messages[0]["value"] = "<image>\n" * len(images) + messages[0]["value"]
    row: dict[str, Any] = {"id": request.id, "kind": kind, "conversations": messages}
    if images:
        paths = [image.path if isinstance(image, Below) else image.name for image in images]
        row["image"] = paths[0] if len(paths) == 1 else paths
    return GeneratedRecord(request, row, reply=reply.text)
