"""Sends requests to a language teacher concurrently, within budget and rate limit, and stores every reply.

    pending = [*with_keys(teacher, requests)]
    with exclusive_output(out), Journal(file) as journal:
        send_requests(teacher, pending, journal, budget)
        journal.outcome(pending[0].key)

Only ``teacher.reply`` runs in worker threads; all other work is done in the calling thread, without locks. A request
that waits for its retry keeps its concurrency slot, so a failing endpoint gets fewer requests, not more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from llavactl.core import progress, stopping
from llavactl.core.errors import DataError, TeacherError
from llavactl.core.protocols import ClosableTeacher, LanguageTeacher, Reply
from llavactl.teaching import retries
from llavactl.teaching.budget import Budget, RateLimiter
from llavactl.teaching.journal import Journal, State
from llavactl.teaching.keyed import KeyedRequest, request_size
from llavactl.teaching.retries import RetryQueue, backoff_s

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SendResult:
    """The result of ``send_requests``: requests ``sent``, reasons of ``unanswered`` ones by key, why it ``stopped``."""

    sent: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def send_requests(
    teacher: LanguageTeacher,
    pending: Sequence[KeyedRequest],
    journal: Journal,
    budget: Budget,
    *,
    answered: int = 0,
    label: str = "generate",
) -> SendResult:
    """Sends ``pending`` and stores every reply in ``journal``; ``answered`` and ``label`` are for the progress bar.

    Raises:
        TeacherError: no request can be answered; earlier replies are kept.
        KeyboardInterrupt: after the replies in flight have arrived; a second interrupt abandons them.
    """
    sender = _Sender(teacher, pending, journal, budget)
    with stopping.deferred_interrupt(sender.interrupt):  # never between receiving a reply and storing it
        return sender.run(answered, label)


@dataclass
class _Attempt:
    """An attempt at a request: its ``number`` in the journal, its maximum cost, the time of the first attempt."""

    keyed: KeyedRequest
    first_sent: float
    tries: int = 0
    number: int = 0
    max_cost: float | None = None
    rate_entry: list[float] = field(default_factory=list)
    sent: float = 0.0

    def next(self, max_cost: float | None, rate_entry: list[float], now: float) -> _Attempt:
        """The next attempt at the same request."""
        return _Attempt(self.keyed, self.first_sent, self.tries + 1, 0, max_cost, rate_entry, now)


class _Sender:
    def __init__(
        self, teacher: LanguageTeacher, pending: Sequence[KeyedRequest], journal: Journal, budget: Budget
    ) -> None:
        self.teacher, self.journal, self.budget = teacher, journal, budget
        self.limits = teacher.limits
        self.rate = RateLimiter(teacher.limits)
        self.fresh = deque(pending)
        self.retries = RetryQueue[_Attempt]()
        self.in_flight: dict[Future[str | Reply], _Attempt] = {}
        self.pool = ThreadPoolExecutor(teacher.limits.concurrency, thread_name_prefix="teacher")
        self.jitter = Random()
        self.unanswered: dict[str, str] = {}
        self.stopped = self.endpoint_down = ""
        self.fatal: BaseException | None = None
        self.interrupted = threading.Event()
        self.replies = self.consecutive_failures = 0
        self.refusals: list[int] = []

    def run(self, answered: int, label: str) -> SendResult:
        total = answered + len(self.fresh)
        with progress.bar(total, label, "answer", start=answered) as self.bar:
            try:
                while self.in_flight or (not self.stopped and (self.fresh or self.retries)):
                    self._collect(self._send())
            except Exception:
                self.stopped = self.stopped or "an error"
                while self.in_flight:  # send nothing more, but store outstanding replies if possible
                    with suppress(DataError):
                        self._collect(None)
                raise
            finally:
                self.pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(self.teacher, ClosableTeacher):
                    self.teacher.close()
        if self.fatal is not None:
            raise self.fatal
        if self.interrupted.is_set():
            raise KeyboardInterrupt
        return SendResult(self.budget.sent, self.unanswered, self.stopped or self.endpoint_down)

    def interrupt(self) -> None:
        """Stops sending; outstanding replies may still arrive and are stored."""
        self.stopped = self.stopped or "interrupted"
        self.interrupted.set()
        log.warning("waiting for %d outstanding replies; interrupt again to abandon them", len(self.in_flight))

    def _send(self) -> float | None:
        """Sends as many requests as allowed.

        Returns:
            Seconds until more may be sent; None if a reply has to arrive first.
        """
        ready: list[_Attempt] = []
        wait_s = None
        while not self.stopped and len(self.in_flight) + len(ready) < self.limits.concurrency and wait_s is None:
            now = time.monotonic()
            retry = self.retries.pop_due(now)
            has_slot = len(self.in_flight) + len(ready) + len(self.retries) < self.limits.concurrency
            if retry is None and not (self.fresh and has_slot):
                wait_s = self.retries.wait_s(now)
                break
            previous = retry or _Attempt(self.fresh[0], first_sent=now)
            size = request_size(previous.keyed.request)
            tokens = size.estimated_tokens + (self.limits.max_tokens or 0)
            max_cost = self.budget.max_request_cost(size, self.limits)
            wait_s = self.rate.wait_s(tokens) or None
            over_budget = self.budget.exceeded_by(max_cost) if wait_s is None else ""
            if wait_s is None and not over_budget:
                if retry is None:
                    self.fresh.popleft()
                self.budget.sent += 1
                self.budget.reserved += max_cost or 0.0
                ready.append(previous.next(max_cost, self.rate.record(tokens), now))
                continue
            if retry is not None:
                self.retries.push(now, retry.number, retry)
            if over_budget and not self.in_flight and not ready:  # else replies in flight may cost less than reserved
                self.stopped = over_budget
            break
        self._launch(ready)
        return wait_s

    def _launch(self, ready: Sequence[_Attempt]) -> None:
        """Records the attempts in the journal, then sends them."""
        if ready:
            with self.journal.transaction():
                for attempt in ready:
                    request = attempt.keyed.request
                    attempt.number = self.journal.start(attempt.keyed.key, request.id, request.kind, attempt.max_cost)
        for attempt in ready:
            self.in_flight[self.pool.submit(self.teacher.reply, attempt.keyed.request)] = attempt

    def _collect(self, timeout: float | None) -> None:
        """Waits at most ``timeout`` seconds for replies, stores them, then accounts for them."""
        if not self.in_flight:
            self.interrupted.wait(timeout or 0.0)
            return
        done, _ = wait(self.in_flight, timeout, FIRST_COMPLETED)
        finished = [(self.in_flight.pop(future), future) for future in done]
        try:
            with self.journal.transaction():
                for attempt, future in finished:
                    self._store(attempt, future)
        except DataError:  # a full disk: some of them may fit
            for attempt, future in finished:
                with suppress(DataError):
                    self._store(attempt, future)
            raise
        for attempt, future in finished:
            self._account(attempt, future.exception() or future.result())

    def _store(self, attempt: _Attempt, future: Future[str | Reply]) -> None:
        """Records the outcome of an attempt in the journal."""
        seconds = time.monotonic() - attempt.sent
        error = future.exception()
        if error is None:
            reply = _as_reply(future.result())
            cost = self.budget.reply_cost(reply.tokens_in, reply.tokens_out)
            self.journal.save(attempt.number, reply, cost, seconds)
            return
        known = error if isinstance(error, TeacherError) else TeacherError(repr(error)[:500], then="stop", paid=True)
        state: State = "refused" if known.then == "apart" else "lost" if known.paid else "failed"
        self.journal.fail(attempt.number, state, reason=known.message, charged=known.paid, seconds=seconds)

    def _account(self, attempt: _Attempt, outcome: str | Reply | BaseException) -> None:
        """Books the cost of an attempt and decides how to continue."""
        max_cost = attempt.max_cost or 0.0
        self.budget.reserved -= max_cost
        if isinstance(outcome, TeacherError):
            self.budget.spent += max_cost if outcome.paid else 0.0
            self._handle(outcome, attempt)
        elif isinstance(outcome, BaseException):  # a bug in the teacher, or a model that can't be loaded
            self.budget.spent += max_cost
            self._stop(outcome)
        else:
            reply = _as_reply(outcome)
            cost = self.budget.reply_cost(reply.tokens_in, reply.tokens_out)
            self.budget.spent += max_cost if cost is None else cost
            if reply.tokens_in is not None and reply.tokens_out is not None:
                self.rate.correct(attempt.rate_entry, reply.tokens_in + reply.tokens_out)
            self.replies, self.consecutive_failures, self.endpoint_down = self.replies + 1, 0, ""
            self._show_progress()

    def _stop(self, error: BaseException) -> None:
        """Stops sending; ``error`` is raised once the outstanding replies have arrived."""
        self.fatal = self.fatal or error
        self.stopped = self.stopped or str(error)

    def _handle(self, error: TeacherError, attempt: _Attempt) -> None:
        if error.then == "stop":
            self._stop(error)
        elif error.then == "apart":
            self._count_refusal(error, attempt)
        elif error.wait_s is not None and error.wait_s > retries.MAX_RETRY_AFTER_S:
            message = f"{error.message}: retry after {error.wait_s / 60:.0f} minutes"
            self._stop(TeacherError(message, hint="run the same command again after that time to resume", then="stop"))
        else:
            self._retry(error, attempt)

    def _count_refusal(self, error: TeacherError, attempt: _Attempt) -> None:
        self.refusals.append(attempt.number)
        self._show_progress()
        if not self.replies and len(self.refusals) >= retries.MAX_INITIAL_REFUSALS:
            self.journal.reopen(self.refusals)
            self._stop(
                TeacherError(
                    f"all {len(self.refusals)} requests so far were refused; last reason: {error.message}",
                    hint=error.hint or "check `generate.teacher`; these refusals are not stored as answers",
                    then="stop",
                )
            )

    def _retry(self, error: TeacherError, attempt: _Attempt) -> None:
        """Schedules another attempt, or gives up on the request, and on the endpoint after several such requests.

        An endpoint that sends ``Retry-After`` is up: the limit of retries doesn't apply for ``MAX_RETRY_AFTER_S``.
        """
        is_up = error.wait_s is not None and time.monotonic() - attempt.first_sent < retries.MAX_RETRY_AFTER_S
        if error.wait_s is not None:
            self.rate.pause(error.wait_s)
        if attempt.tries <= self.limits.retries or is_up:
            delay = backoff_s(attempt.tries, error.wait_s, self.jitter)
            log.debug("%s: %s; retrying in %.1f s", attempt.keyed.request.id, error.message, delay)
            self.retries.push(time.monotonic() + delay, attempt.number, attempt)
            return
        self.unanswered[attempt.keyed.key] = error.message
        self.consecutive_failures += 1
        if self.consecutive_failures >= retries.MAX_CONSECUTIVE_FAILURES:
            message = (
                f"{self.consecutive_failures} consecutive requests failed in {attempt.tries} attempts each: "
                f"{error.message}"
            )
            if self.replies and not self.fresh:  # all others were tried: these requests may be the cause
                self.endpoint_down = message
                return
            hint = error.hint or "replies so far are stored; run the same command again to resume"
            self._stop(TeacherError(message, hint=hint, then="stop"))

    def _show_progress(self) -> None:
        """Advances the progress bar by one answer and shows the cost so far."""
        if self.budget.price is None:
            self.bar.advance()
        else:
            limit = "" if self.budget.max_cost is None else f" of {self.budget.max_cost:g}"
            self.bar.advance(cost=f"{self.budget.spent:.4f}{limit}")


def _as_reply(reply: str | Reply) -> Reply:
    return reply if isinstance(reply, Reply) else Reply(reply)
