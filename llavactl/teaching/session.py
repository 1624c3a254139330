"""One ``out``'s dealings with a language teacher: what to ask, within which budget, and all that it ever replied."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import BatchTeacher, LanguageTeacher, Request
from llavactl.teaching.asking import AskResult, Keyed, ask, keys
from llavactl.teaching.batch import Results, affordable, read_results, write_requests
from llavactl.teaching.budget import Budget
from llavactl.teaching.estimate import Estimate, estimate
from llavactl.teaching.gates import Gatekeeper
from llavactl.teaching.generate import UNANSWERED, GeneratedRecord, record
from llavactl.teaching.journal import Journal, Spent
from llavactl.teaching.messages import Prompts
from llavactl.teaching.prices import Prices, prices

if TYPE_CHECKING:
    from llavactl.recipe.sections import Generate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationOptions:
    """How a language teacher is asked this once.

    ``max_cost`` is for all that ``out`` ever costs and takes the recipe's place, ``max_requests`` for this command.
    With ``batch_requests`` or ``batch_results`` nothing is asked over the network.
    """

    max_cost: float | None = None
    max_requests: int | None = None
    retry_refused: bool = False
    batch_requests: Path | None = None
    batch_results: tuple[Path, ...] = ()


@dataclass(frozen=True)
class GenerationStats:
    """What asking came to: requests ``sent`` now, ``unanswered`` after it, why it ``stopped`` before all were asked."""

    sent: int = 0
    unanswered: int = 0
    stopped: str = ""
    spent: Spent = field(default_factory=Spent)
    batch_files: tuple[str, ...] = ()
    batch_results: Results | None = None


@dataclass(frozen=True)
class Session:
    """The requests of one ``out``, in order, with the teacher that they are for."""

    wanted: Generate
    teacher: LanguageTeacher
    told: Prompts
    asked: Sequence[Request]
    keyed: Sequence[Keyed] = field(init=False)
    prices: Prices = field(init=False)

    def __post_init__(self) -> None:
        # Of some pictures nothing is known: a teacher could only invent.
        worth = (each for each in self.asked if each.messages[-1]["content"])
        object.__setattr__(self, "keyed", tuple(keys(self.teacher, worth)))
        object.__setattr__(self, "prices", prices(self.wanted.prices))

    @property
    def kept_in(self) -> Path:
        """The file of every reply."""
        return self.wanted.out.with_suffix(".replies.sqlite")

    def estimate(self, wishes: GenerationOptions) -> Estimate:
        """What is still to be asked and would take; nothing is asked or written."""
        with Journal(self.kept_in) if self.kept_in.is_file() else nullcontext() as journal:
            todo = self._todo(wishes, journal) if journal else list(self.keyed)
            money = f"{self.prices.currency}, prices of {self.prices.date}"
            kept = len(self.keyed) - len(todo)
            return estimate(todo, kept, self.teacher.limits, self.told, self.budget(wishes), journal, money)

    def run(self, wishes: GenerationOptions, journal: Journal) -> GenerationStats:
        """Asks for what has no reply yet, within the budget, or by files."""
        budget = self.budget(wishes)
        results, files, outcome = None, [], AskResult()
        if wishes.batch_results:
            results = read_results(self._by_files(), wishes.batch_results, self.keyed, journal, self._cheaper(budget))
        todo = self._todo(wishes, journal)
        budget.spent = journal.spent().cost
        if wishes.batch_requests:
            some, stopped = affordable(todo, self._cheaper(budget), self.teacher.limits)
            files = write_requests(self._by_files(), some, wishes.batch_requests)
            outcome = AskResult(stopped=stopped)
        elif results is None:
            outcome = self._ask(todo, journal, budget)
        answered = journal.answered()
        for key, why in outcome.unanswered.items():
            log.warning("no answer to %s: %s", next(each.request.id for each in todo if each.key == key), why)
        left = sum(each.key not in answered for each in self.keyed)
        if outcome.stopped:
            log.warning("stopped with %d requests left: %s", left, outcome.stopped)
        return GenerationStats(outcome.sent, left, outcome.stopped, journal.spent(), tuple(map(str, files)), results)

    def made(self, journal: Journal) -> Iterator[GeneratedRecord]:
        """What became of every request that was answered, in order, gates passed; then those not worth asking."""
        answered = journal.answered()
        yield from self._gated(self._read([each for each in self.keyed if each.key in answered], journal))
        for request in self.asked:
            if not request.messages[-1]["content"]:
                yield GeneratedRecord(
                    request, None, "nothing is known of the picture that could be told", "nothing known"
                )

    def budget(self, wishes: GenerationOptions) -> Budget:
        """What may be spent.

        Raises:
            RecipeError: money is limited, and what a request can cost isn't known.
        """
        limits = self.teacher.limits
        most = self.wanted.max_cost if wishes.max_cost is None else wishes.max_cost
        price = self.prices.models.get(limits.model)
        if most is not None and price is None:
            raise RecipeError(
                f"max_cost: there is no price of {limits.model or self.wanted.teacher.name!r}",
                hint="add it to a copy of the file of prices and name that in `generate.prices`; or leave max_cost out",
            )
        if most is not None and limits.max_tokens is None:
            raise RecipeError("max_cost: a reply could be of any length", hint="set `generate.teacher.max_tokens`")
        return Budget(price, most, wishes.max_requests)

    def _ask(self, todo: Sequence[Keyed], journal: Journal, budget: Budget) -> AskResult:
        try:
            return ask(self.teacher, todo, journal, budget, answered=len(self.keyed) - len(todo))
        except BaseException:
            log.warning("%d replies are kept in %s: none is asked for again", journal.spent().replies, journal.path)
            raise

    def _todo(self, wishes: GenerationOptions, journal: Journal) -> list[Keyed]:
        """What has no reply yet; with ``retry_refused`` also what has one that can't be used."""
        answered = journal.answered()
        refused = set()
        if wishes.retry_refused:
            known = [each for each in self.keyed if each.key in answered]
            found = self._gated(self._read(known, journal))
            refused = {each.key for each, made in zip(known, found, strict=True) if made.record is None}
        return [each for each in self.keyed if each.key not in answered or each.key in refused]

    def _read(self, keyed: Iterable[Keyed], journal: Journal) -> Iterator[GeneratedRecord]:
        for each in keyed:
            answer = journal.get(each.key)
            if answer is not None and answer.reply is not None:
                yield record(each.request, answer.reply, self.told, exact=bool(getattr(self.teacher, "exact", False)))
            else:
                yield GeneratedRecord(each.request, None, answer.reason if answer else "", UNANSWERED)

    def _gated(self, found: Iterable[GeneratedRecord]) -> Iterator[GeneratedRecord]:
        return gated(self.teacher, self.wanted, found)

    def _cheaper(self, budget: Budget) -> Budget:
        """The budget of requests by batch file."""
        return replace(budget, price=budget.price and budget.price.times(self.prices.batch))

    def _by_files(self) -> BatchTeacher:
        if not isinstance(self.teacher, BatchTeacher):
            raise RecipeError(f"the teacher {self.wanted.teacher.name!r} can't be asked by files")
        return self.teacher


def gated(teacher: object, wanted: Generate, found: Iterable[GeneratedRecord]) -> Iterator[GeneratedRecord]:
    """What passes the recipe's gates, and what doesn't with the reason; an exact teacher's needs none."""
    if getattr(teacher, "exact", False):
        yield from found
    else:
        yield from map(Gatekeeper(wanted.gates).check, found)
