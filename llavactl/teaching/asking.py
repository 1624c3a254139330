"""Asking a language teacher many things: side by side, within a budget, each kept before it is read, none twice.

    keyed = [*keys(teacher, requests)]
    with alone(out), Journal(file) as journal:
        ask(teacher, keyed, journal, budget)
    journal.get(keyed[0].key)

Everything but the waiting for replies happens in the calling thread, so there is nothing to lock. A request that is to
be asked again keeps its place among the ``concurrency``: an endpoint that fails is asked less, not more. This is why no
retry library is used: theirs would sleep inside a place of their own, unseen by budget and pace.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from llavactl.core import progress, stopping
from llavactl.core.errors import DataError, TeacherError
from llavactl.core.protocols import LanguageTeacher, Reply, Request
from llavactl.teaching.budget import Budget, Pace, Size
from llavactl.teaching.journal import Journal, State

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
PATIENCE_S = 600.0
"""An endpoint that asks to wait longer than this ends the run; what is kept stays kept."""

GIVEN_UP = 3
"""So many requests in a row whose every attempt failed, and the endpoint is taken to be gone."""

ALL_REFUSED = 5
"""So many refusals and not one reply, and the fault is taken to be in what all requests share."""


@dataclass(frozen=True)
class Keyed:
    """A request and the name under which its reply is kept."""

    key: str
    request: Request


@dataclass(frozen=True)
class AskResult:
    """What a call of ``ask`` did: requests ``sent`` by it, why others have no answer, and why it stopped early."""

    sent: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def keys(teacher: LanguageTeacher, requests: Iterable[Request]) -> Iterator[Keyed]:
    """The hash of what decides a reply; the second request of the very same content is another, and so on.

    So a picture that is asked about again, in a second lap, gets a second reply, and two pictures told in the same
    words have one each, whatever their order.
    """
    seen = Counter[str]()
    for request in requests:
        content = json.dumps(teacher.content(request), sort_keys=True, ensure_ascii=True)
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        yield Keyed(f"{name}-{seen[name]}" if seen[name] else name, request)
        seen[name] += 1


def size(request: Request) -> Size:
    """What ``request`` weighs."""
    return Size(
        sum(len(each["content"].encode("utf-8", "replace")) for each in request.messages), len(request.messages)
    )


def ask(
    teacher: LanguageTeacher,
    todo: Sequence[Keyed],
    journal: Journal,
    budget: Budget,
    *,
    answered: int = 0,
    what: str = "generate",
) -> AskResult:
    """Sends ``todo`` and keeps every reply in ``journal``; ``answered`` and ``what`` are for the progress line alone.

    Raises:
        TeacherError: no request will ever be answered; what was answered before is kept.
        KeyboardInterrupt: after what was in flight has arrived; a second one leaves that behind.
    """
    asking = _Asking(teacher, todo, journal, budget)
    with stopping.deferred_interrupt(asking.interrupt):  # never between receiving a reply and storing it
        return asking.run(answered, what)


@dataclass
class _Flight:
    """A request on its way: attempt ``number`` in the journal, the most it can cost, when the first attempt was."""

    keyed: Keyed
    first: float
    tries: int = 0
    number: int = 0
    most: float | None = None
    pace: list[float] = field(default_factory=list)
    began: float = 0.0

    def again(self, most: float | None, pace: list[float], now: float) -> _Flight:
        """The next attempt."""
        return _Flight(self.keyed, self.first, self.tries + 1, 0, most, pace, now)


class _Asking:
    def __init__(self, teacher: LanguageTeacher, todo: Sequence[Keyed], journal: Journal, budget: Budget) -> None:
        self.teacher, self.journal, self.budget = teacher, journal, budget
        self.limits = teacher.limits
        self.pace = Pace(teacher.limits)
        self.fresh = deque(todo)
        self.again: list[
            tuple[float, int, _Flight]
        ] = []  # a heap: when to ask again, the attempt's number, what failed
        self.flying: dict[Future[str | Reply], _Flight] = {}
        self.pool = ThreadPoolExecutor(teacher.limits.concurrency, thread_name_prefix="teacher")
        self.jitter = Random()
        self.unanswered: dict[str, str] = {}
        self.stopped = self.gone = ""
        self.fatal: BaseException | None = None
        self.interrupted = threading.Event()
        self.replies = self.failures = 0
        self.refusals: list[int] = []

    def run(self, answered: int, what: str) -> AskResult:
        total = answered + len(self.fresh)
        with progress.bar(total, what, "answer", start=answered) as self.bar:
            try:
                while self.flying or (not self.stopped and (self.fresh or self.again)):
                    self._take(self._send())
            except Exception:
                self.stopped = self.stopped or "an error"
                while self.flying:  # nothing more is sent; what was is still kept, if it can be
                    with suppress(DataError):
                        self._take(None)
                raise
            finally:
                self.pool.shutdown(wait=False, cancel_futures=True)
                if close := getattr(self.teacher, "close", None):
                    close()
        if self.fatal is not None:
            raise self.fatal
        if self.interrupted.is_set():
            raise KeyboardInterrupt
        return AskResult(self.budget.sent, self.unanswered, self.stopped or self.gone)

    def interrupt(self) -> None:
        """Nothing more is sent; what is in flight may still arrive, and is kept."""
        self.stopped = self.stopped or "interrupted"
        self.interrupted.set()
        log.warning("waiting for %d replies in flight; interrupt again to leave them behind", len(self.flying))

    def _send(self) -> float | None:
        """Sends what may be sent; seconds until more may be, None when a reply has to come first."""
        ready: list[_Flight] = []
        pause = None
        while not self.stopped and len(self.flying) + len(ready) < self.limits.concurrency and pause is None:
            now = time.monotonic()
            before = heapq.heappop(self.again)[2] if self.again and self.again[0][0] <= now else None
            room = len(self.flying) + len(ready) + len(self.again) < self.limits.concurrency
            if before is None and not (self.fresh and room):
                pause = self.again[0][0] - now if self.again else None
                break
            flight = before or _Flight(self.fresh[0], first=now)
            weight = size(flight.keyed.request)
            tokens, most = weight.tokens + (self.limits.max_tokens or 0), self.budget.most(weight, self.limits)
            pause = self.pace.wait_s(tokens) or None
            refused = self.budget.refuses(most) if pause is None else ""
            if pause is None and not refused:
                if before is None:
                    self.fresh.popleft()
                self.budget.sent += 1
                self.budget.flying += most or 0.0
                ready.append(flight.again(most, self.pace.sent(tokens), now))
                continue
            if before is not None:
                heapq.heappush(self.again, (now, before.number, before))
            if refused and not self.flying and not ready:  # else what is in flight may cost less than its most
                self.stopped = refused
            break
        self._launch(ready)
        return pause

    def _launch(self, ready: Sequence[_Flight]) -> None:
        """Writes down what is about to be sent, then sends it."""
        if ready:
            with self.journal.together():
                for flight in ready:
                    request = flight.keyed.request
                    flight.number = self.journal.begin(flight.keyed.key, request.id, request.kind, flight.most)
        for flight in ready:
            self.flying[self.pool.submit(self.teacher.reply, flight.keyed.request)] = flight

    def _take(self, timeout: float | None) -> None:
        """Waits for replies, at most ``timeout`` seconds, keeps them, and then looks at what they mean."""
        if not self.flying:
            self.interrupted.wait(timeout or 0.0)
            return
        done, _ = wait(self.flying, timeout, FIRST_COMPLETED)
        landed = [(self.flying.pop(future), future) for future in done]
        try:
            with self.journal.together():
                for flight, future in landed:
                    self._keep(flight, future)
        except DataError:  # a full disk: some of them may fit
            for flight, future in landed:
                with suppress(DataError):
                    self._keep(flight, future)
            raise
        for flight, future in landed:
            self._account(flight, future.exception() or future.result())

    def _keep(self, flight: _Flight, future: Future[str | Reply]) -> None:
        """Writes down what a request came to."""
        seconds = time.monotonic() - flight.began
        error = future.exception()
        if error is None:
            reply = _reply(future.result())
            cost = self.budget.cost(reply.tokens_in, reply.tokens_out)
            self.journal.keep(flight.number, reply, cost, seconds)
            return
        known = error if isinstance(error, TeacherError) else TeacherError(repr(error)[:500], then="stop", paid=True)
        state: State = "refused" if known.then == "apart" else "lost" if known.paid else "failed"
        self.journal.end(flight.number, state, reason=known.message, paid=known.paid, seconds=seconds)

    def _account(self, flight: _Flight, came: str | Reply | BaseException) -> None:
        """What a request cost, and what it means for the others."""
        most = flight.most or 0.0
        self.budget.flying -= most
        if isinstance(came, TeacherError):
            self.budget.spent += most if came.paid else 0.0
            self._failed(came, flight)
        elif isinstance(came, BaseException):  # a defect of the teacher, or a model that can't be loaded
            self.budget.spent += most
            self._stop(came)
        else:
            reply = _reply(came)
            cost = self.budget.cost(reply.tokens_in, reply.tokens_out)
            self.budget.spent += most if cost is None else cost
            if reply.tokens_in is not None and reply.tokens_out is not None:
                self.pace.took(flight.pace, reply.tokens_in + reply.tokens_out)
            self.replies, self.failures, self.gone = self.replies + 1, 0, ""
            self._show()

    def _stop(self, why: BaseException) -> None:
        """Nothing more is sent; ``why`` is raised when what is in flight has arrived."""
        self.fatal = self.fatal or why
        self.stopped = self.stopped or str(why)

    def _failed(self, error: TeacherError, flight: _Flight) -> None:
        if error.then == "stop":
            self._stop(error)
        elif error.then == "apart":
            self._refused(error, flight)
        elif error.wait_s is not None and error.wait_s > PATIENCE_S:
            later = f"{error.message}: it asks to come back in {error.wait_s / 60:.0f} minutes"
            self._stop(TeacherError(later, hint="run the same command again then: it goes on from here", then="stop"))
        else:
            self._put_off(error, flight)

    def _refused(self, error: TeacherError, flight: _Flight) -> None:
        self.refusals.append(flight.number)
        self._show()
        if not self.replies and len(self.refusals) >= ALL_REFUSED:
            self.journal.forget_refusals(self.refusals)
            self._stop(
                TeacherError(
                    f"all {len(self.refusals)} requests so far were refused, the last with: {error.message}",
                    hint=error.hint or "look at `generate.teacher`; nothing of this is kept as an answer",
                    then="stop",
                )
            )

    def _put_off(self, error: TeacherError, flight: _Flight) -> None:
        """Asks again later, or gives up on this request; after a few of those in a row on the endpoint.

        An endpoint that says when to come back is alive: it is not given up on for a while.
        """
        alive = error.wait_s is not None and time.monotonic() - flight.first < PATIENCE_S
        if error.wait_s is not None:
            self.pace.pause(error.wait_s)
        if flight.tries <= self.limits.retries or alive:
            longest = min(FIRST_WAIT_S * 2 ** min(flight.tries - 1, 10), LONGEST_WAIT_S)
            delay = max(error.wait_s or 0.0, longest * self.jitter.uniform(0.5, 1.0))
            log.debug("%s: %s; again in %.1f s", flight.keyed.request.id, error.message, delay)
            heapq.heappush(self.again, (time.monotonic() + delay, flight.number, flight))
            return
        self.unanswered[flight.keyed.key] = error.message
        self.failures += 1
        if self.failures >= GIVEN_UP:
            said = f"{self.failures} requests in a row had no answer in {flight.tries} attempts each: {error.message}"
            if self.replies and not self.fresh:  # it may be these few alone: all the others were answered or tried
                self.gone = said
                return
            hint = error.hint or "what was answered is kept; the same command goes on from there"
            self._stop(TeacherError(said, hint=hint, then="stop"))

    def _show(self) -> None:
        """One more is done; what that has cost so far stands in the progress line."""
        if self.budget.price is None:
            self.bar.advance()
        else:
            most = "" if self.budget.max_cost is None else f" of {self.budget.max_cost:g}"
            self.bar.advance(cost=f"{self.budget.spent:.4f}{most}")


def _reply(said: str | Reply) -> Reply:
    return said if isinstance(said, Reply) else Reply(said)
