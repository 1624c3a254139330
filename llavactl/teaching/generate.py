"""Which picture gets which kind of sample, and from there to LLaVA's records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import Request, Teacher
from llavactl.core.schema import Sample
from llavactl.teaching.replies import Kind, turns


def requests(
    pictures: Sequence[Sample], kinds: Mapping[Kind, float], samples: int | None, seed: int
) -> Iterator[Request]:
    """What the teacher is asked. Without ``samples`` every picture gets one of each kind whose weight is above 0.

    With it, ``samples`` are shared among the kinds by their weights and go round the pictures.
    """
    wanted = [kind for kind, weight in kinds.items() if weight > 0]
    if samples is None:
        for picture in pictures:
            yield from (_request(picture, kind, 0, seed) for kind in wanted)
        return
    order = _shared(samples, {kind: kinds[kind] for kind in wanted}, seed)
    for number, kind in enumerate(order):
        lap, place = divmod(number, len(pictures))
        yield _request(pictures[place], kind, lap, seed)


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


def _request(picture: Sample, kind: Kind, lap: int, seed: int) -> Request:
    name = f"{picture.id}-{kind}" + (f"-{lap}" if lap else "")
    return Request(name, kind, ({"role": "user", "content": symbols(picture, kind)},), picture, seed)


def symbols(picture: Sample, kind: Kind) -> str:
    """The picture in words: its captions, and but for a conversation its boxes, as LLaVA tells them to GPT-4."""
    boxes = [] if kind == "conversation" else [f"{box.category}: [{_numbers(box.xyxy)}]" for box in picture.boxes]
    return "\n\n".join("\n".join(lines) for lines in (picture.captions, boxes) if lines)


def _numbers(xyxy: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in xyxy)


@dataclass(frozen=True)
class Made:
    """A request's record, or why there is none."""

    request: Request
    record: Mapping[str, Any] | None
    reason: str = ""


def made(teacher: Teacher, request: Request) -> Made:
    """Asks the teacher and reads its reply into a LLaVA record; what can't be read is kept apart with its reason."""
    kind: Any = request.kind
    try:
        said = turns(kind, teacher.reply(request), request.id)
    except DataError as error:
        return Made(request, None, error.message)
    images = request.sample.images
    messages = [
        {"from": role, "value": text}
        for question, answer in said
        for role, text in (("human", question), ("gpt", answer))
    ]
    messages[0]["value"] = "<image>\n" * len(images) + messages[0]["value"]
    record: dict[str, Any] = {"id": request.id, "kind": kind, "conversations": messages}
    if images:
        record["image"] = images[0].name if len(images) == 1 else [image.name for image in images]
    return Made(request, record)
