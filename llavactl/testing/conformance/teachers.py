"""Checks of teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError, TeacherError
from llavactl.core.protocols import (
    BatchTeacher,
    ClosableTeacher,
    LanguageTeacher,
    Reply,
    Request,
)
from llavactl.core.registry import registry
from llavactl.testing.conformance.boundary import conformance_check, returned_problem

if TYPE_CHECKING:
    from llavactl.core.protocols import Teacher


@conformance_check("teachers")
def check_teacher(teacher: Teacher, requests: Sequence[Request] | None = None) -> list[str]:
    """Checks replies to ``requests``, by default of every kind about two synthetic images.

    At least one must be answered. A LanguageTeacher is asked from several threads, and must not identify replies by
    the ids of requests. A paid endpoint charges for the requests.
    """
    requests = list(toy_requests() if requests is None else requests)
    problems = _language_problems(teacher, requests[0]) if isinstance(teacher, LanguageTeacher) else []
    if isinstance(teacher, BatchTeacher):
        problems += _batch_problems(teacher)
    if problems:
        return problems
    workers = min(len(requests), teacher.limits.concurrency) if isinstance(teacher, LanguageTeacher) else 1
    try:
        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(pool.map(lambda request: _outcome(teacher, request), requests))
    finally:
        if isinstance(teacher, ClosableTeacher):
            teacher.close()
    problems = [
        problem
        for request, outcome in zip(requests, outcomes, strict=True)
        for problem in _reply_problems(teacher, request, outcome)
    ]
    if refusals := [outcome for outcome in outcomes if isinstance(outcome, DataError | TeacherError)]:
        problems += [f"no request is answered: {refusals[0].message}"] if len(refusals) == len(requests) else []
    return problems


def toy_requests() -> Iterator[Request]:
    """A request of every kind about each of two synthetic images with captions and boxes."""
    from llavactl.teaching.generate import build_requests

    images = list(registry().create("sources", {"name": "scenes", "scenes": 2, "content": "captions"}))
    return build_requests(images, {"conversation": 1, "detail": 1, "reasoning": 1}, None, 0)


def _outcome(teacher: Teacher, request: Request) -> object:
    """The reply, or the error with which the teacher refuses the request."""
    try:
        return teacher.reply(request)
    except (DataError, TeacherError) as error:
        return error


def _reply_problems(teacher: Teacher, request: Request, reply: object) -> Iterator[str]:
    from llavactl.teaching.generate import is_exact, parse_record
    from llavactl.teaching.messages import load_prompts

    if isinstance(reply, DataError):
        return
    if isinstance(reply, TeacherError):
        if not isinstance(teacher, LanguageTeacher):
            yield f"{request.id}: raises TeacherError, but isn't a LanguageTeacher: {reply.message}"
        return
    if problem := returned_problem("teachers", "reply", reply, request):
        yield f"{request.id}: {problem}"
        return
    assert isinstance(reply, str | Reply)
    reply = reply if isinstance(reply, Reply) else Reply(reply)
    if not reply.text.strip():
        yield f"{request.id}: the reply is empty; raise DataError for a request that can't be answered"
    elif is_exact(teacher):
        if reason := parse_record(request, reply, load_prompts(), exact=True).reason:
            yield f"{request.id}: {reason}"
        if _outcome(teacher, request) not in (reply, reply.text):
            yield f"{request.id}: the reply differs between calls"


def _language_problems(teacher: LanguageTeacher, request: Request) -> list[str]:
    limits = teacher.limits
    problems = [] if limits.concurrency >= 1 else [f"limits.concurrency is {limits.concurrency}, expected 1 or more"]
    content = teacher.content(request)
    if problem := returned_problem("teachers", "content", content, request):
        return [*problems, problem]
    if content != teacher.content(request):
        problems.append("content() differs between calls")
    if content != teacher.content(replace(request, id=f"{request.id}-other")):
        problems.append("content() depends on the id of the request, so equal requests would be paid for twice")
    other = replace(request, messages=(*request.messages, {"role": "user", "content": "Anything else?"}))
    if content == teacher.content(other):
        problems.append("content() is equal for requests with different messages")
    return problems


def _batch_problems(teacher: BatchTeacher) -> list[str]:
    problems = []
    for status, body in ((500, b""), (200, b"not JSON")):
        try:
            reply: object = teacher.read(status, body)
        except TeacherError:
            continue
        problems.append(f"read({status}, {body!r}) returns {reply!r:.60}, expected a TeacherError")
    return problems
