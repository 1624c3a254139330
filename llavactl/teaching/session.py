"""Generation with a language teacher: pending requests, budget, batch files, and records from stored replies."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import BatchTeacher, LanguageTeacher, Request, Teacher
from llavactl.teaching.batch import BatchResults, affordable, read_results, write_requests
from llavactl.teaching.budget import Budget
from llavactl.teaching.estimate import Estimate, estimate
from llavactl.teaching.gates import GateChecker
from llavactl.teaching.generate import NO_CAPTIONS, REFUSED, GeneratedRecord, is_exact, parse_record
from llavactl.teaching.journal import Journal, Spent
from llavactl.teaching.keyed import KeyedRequest, with_keys
from llavactl.teaching.messages import Prompts
from llavactl.teaching.prices import Prices, load_prices
from llavactl.teaching.sender import SendResult, send_requests

if TYPE_CHECKING:
    from llavactl.recipe.sections import Generate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one run with a language teacher.

    ``max_cost`` limits the total cost of ``out`` and overrides the recipe, ``max_requests`` the requests of this run.
    With ``batch_requests`` or ``batch_results``, nothing is sent over the network.
    """

    max_cost: float | None = None
    max_requests: int | None = None
    retry_refused: bool = False
    batch_requests: Path | None = None
    batch_results: tuple[Path, ...] = ()


@dataclass(frozen=True)
class GenerationStats:
    """Requests to a language teacher: ``sent`` in this run, still ``unanswered``, and why it ``stopped`` early.

    ``spent`` are the totals of all runs.
    """

    sent: int = 0
    unanswered: int = 0
    stopped: str = ""
    spent: Spent = field(default_factory=Spent)
    batch_files: tuple[str, ...] = ()
    batch_results: BatchResults | None = None


@dataclass(frozen=True)
class TeacherSession:
    """All requests of one output file, in order, and their language teacher."""

    settings: Generate
    teacher: LanguageTeacher
    prompts: Prompts
    requests: Sequence[Request]
    keyed: Sequence[KeyedRequest] = field(init=False)
    prices: Prices = field(init=False)

    def __post_init__(self) -> None:
        # Without captions and boxes, a teacher could only hallucinate.
        described = (request for request in self.requests if request.messages[-1]["content"])
        object.__setattr__(self, "keyed", tuple(with_keys(self.teacher, described)))
        object.__setattr__(self, "prices", load_prices(self.settings.prices))

    @property
    def journal_file(self) -> Path:
        """The SQLite file that stores every reply."""
        return self.settings.out.with_suffix(".replies.sqlite")

    def estimate(self, options: GenerationOptions) -> Estimate:
        """The estimate for the pending requests; sends and writes nothing."""
        with Journal(self.journal_file) if self.journal_file.is_file() else nullcontext() as journal:
            pending = self._pending(options, journal) if journal else list(self.keyed)
            currency = f"{self.prices.currency}, prices of {self.prices.date}"
            kept, limits = len(self.keyed) - len(pending), self.teacher.limits
            return estimate(pending, kept, limits, self.prompts, self.budget(options), journal, currency)

    def run(self, options: GenerationOptions, journal: Journal) -> GenerationStats:
        """Sends the pending requests within the budget, or reads and writes batch files."""
        budget = self.budget(options)
        results, files, sent = None, [], SendResult()
        if options.batch_results:
            results = read_results(
                self._batch_teacher(), options.batch_results, self.keyed, journal, self._batch_budget(budget)
            )
        pending = self._pending(options, journal)
        budget.spent = journal.spent().cost
        if options.batch_requests:
            selected, stopped = affordable(pending, self._batch_budget(budget), self.teacher.limits)
            files = write_requests(self._batch_teacher(), selected, options.batch_requests)
            sent = SendResult(stopped=stopped)
        elif results is None:
            sent = self._send(pending, journal, budget)
        answered = journal.answered_keys()
        for key, reason in sent.unanswered.items():
            log.warning("no answer to %s: %s", next(each.request.id for each in pending if each.key == key), reason)
        unanswered = sum(each.key not in answered for each in self.keyed)
        if sent.stopped:
            log.warning("stopped with %d requests unanswered: %s", unanswered, sent.stopped)
        return GenerationStats(sent.sent, unanswered, sent.stopped, journal.spent(), tuple(map(str, files)), results)

    def records(self, journal: Journal) -> Iterator[GeneratedRecord]:
        """The records of all answered requests, in order, after the gates; then the requests without captions."""
        answered = journal.answered_keys()
        yield from self._gated(self._parsed([each for each in self.keyed if each.key in answered], journal))
        for request in self.requests:
            if not request.messages[-1]["content"]:
                yield GeneratedRecord(request, None, "the image has neither captions nor boxes", NO_CAPTIONS)

    def budget(self, options: GenerationOptions) -> Budget:
        """The budget of this run.

        Raises:
            RecipeError: the cost is limited, but the maximum cost of a request is unknown.
        """
        limits = self.teacher.limits
        max_cost = self.settings.max_cost if options.max_cost is None else options.max_cost
        price = self.prices.models.get(limits.model)
        if max_cost is not None and price is None:
            raise RecipeError(
                f"max_cost: unknown price of {limits.model or self.settings.teacher.name!r}",
                hint="copy prices.yaml, add the price and set `generate.prices` to the copy; or remove max_cost",
            )
        if max_cost is not None and limits.max_tokens is None:
            raise RecipeError(
                "max_cost: the length of a reply is not limited", hint="set `generate.teacher.max_tokens`"
            )
        return Budget(price, max_cost, options.max_requests)

    def _send(self, pending: Sequence[KeyedRequest], journal: Journal, budget: Budget) -> SendResult:
        try:
            return send_requests(self.teacher, pending, journal, budget, answered=len(self.keyed) - len(pending))
        except BaseException:
            log.warning("%d replies are stored in %s and not requested again", journal.spent().replies, journal.path)
            raise

    def _pending(self, options: GenerationOptions, journal: Journal) -> list[KeyedRequest]:
        """The unanswered requests; with ``retry_refused`` also those whose reply can't be used."""
        answered = journal.answered_keys()
        refused = set()
        if options.retry_refused:
            known = [each for each in self.keyed if each.key in answered]
            records = self._gated(self._parsed(known, journal))
            refused = {each.key for each, result in zip(known, records, strict=True) if result.record is None}
        return [each for each in self.keyed if each.key not in answered or each.key in refused]

    def _parsed(self, keyed: Iterable[KeyedRequest], journal: Journal) -> Iterator[GeneratedRecord]:
        exact = is_exact(self.teacher)
        for each in keyed:
            outcome = journal.outcome(each.key)
            if outcome is not None and outcome.reply is not None:
                yield parse_record(each.request, outcome.reply, self.prompts, exact=exact)
            else:
                yield GeneratedRecord(each.request, None, outcome.reason if outcome else "", REFUSED)

    def _gated(self, records: Iterable[GeneratedRecord]) -> Iterator[GeneratedRecord]:
        return apply_gates(self.teacher, self.settings, records)

    def _batch_budget(self, budget: Budget) -> Budget:
        """``budget`` with the price of batch requests."""
        return replace(budget, price=budget.price and budget.price.scaled(self.prices.batch))

    def _batch_teacher(self) -> BatchTeacher:
        if not isinstance(self.teacher, BatchTeacher):
            raise RecipeError(f"the teacher {self.settings.teacher.name!r} does not support batch files")
        return self.teacher


def apply_gates(teacher: Teacher, settings: Generate, records: Iterable[GeneratedRecord]) -> Iterator[GeneratedRecord]:
    """``records`` after the recipe's gates; the records of an ``exact`` teacher are not checked."""
    if is_exact(teacher):
        yield from records
    else:
        yield from map(GateChecker(settings.gates).check, records)
