"""Asking a teacher about a model's answers: within a budget, each reply kept before it is read, none paid for twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llavactl.core.errors import DataError, RecipeError, TeacherError
from llavactl.core.protocols import Ask, BudgetedTeacher, LanguageTeacher, Reply, Request, Teacher
from llavactl.core.registry import registry
from llavactl.teaching import asking
from llavactl.teaching.budget import Budget
from llavactl.teaching.journal import Journal, alone
from llavactl.teaching.prices import prices
from llavactl.teaching.spoken import without_thoughts


def name_of(budgeted: BudgetedTeacher) -> str:
    """Who is asked, as a result names it: the teacher, and the model where it says which."""
    given = budgeted.spec
    return " ".join(str(given[key]) for key in ("name", "model") if given.get(key))


def asker(budgeted: BudgetedTeacher, kept: Path) -> Ask:
    """What asks ``budgeted``; a language teacher's replies are kept in ``kept`` (SQLite).

    Raises (when it is called):
        RecipeError: an option that the teacher doesn't take, or a budget without a price.
        TeacherError: the teacher will not answer, or the budget ends; what it answered before is kept.
        DataError: the replies can't be kept.
    """

    def ask(requests: Sequence[Request]) -> Mapping[str, str]:
        teacher: Teacher = registry().create("teachers", budgeted.spec)
        if isinstance(teacher, LanguageTeacher):
            return _durably(teacher, requests, kept, _budget(budgeted, teacher))
        return {request.id: _at_once(teacher, request) for request in requests}

    return ask


def _at_once(teacher: Teacher, request: Request) -> str:
    """A reply that costs nothing and need not be kept."""
    reply = teacher.reply(request)
    return _said(reply.text if isinstance(reply, Reply) else reply)


def _said(reply: str) -> str:
    """``reply`` without the teacher's thinking before it; all of it if the thinking never ends."""
    try:
        said = without_thoughts(reply)
        return reply if said == reply else said.strip()
    except DataError:
        return reply


def _durably(teacher: LanguageTeacher, requests: Sequence[Request], kept: Path, budget: Budget) -> Mapping[str, str]:
    keyed = tuple(asking.keys(teacher, requests))
    with alone(kept), Journal(kept) as journal:
        answered = journal.answered()
        todo = [each for each in keyed if each.key not in answered]
        budget.spent = journal.spent().cost
        outcome = asking.ask(teacher, todo, journal, budget, answered=len(keyed) - len(todo), what="judge")
        found = {each.request.id: journal.get(each.key) for each in keyed}
    if missing := [name for name, answer in found.items() if answer is None]:
        why = outcome.stopped or next(iter(outcome.unanswered.values()), "")
        raise TeacherError(
            f"{len(missing)} of {len(keyed)} requests have no reply: {why}",
            hint=f"{len(keyed) - len(missing)} replies are kept in {kept}; the same command goes on from there",
        )
    return {name: _said(answer.reply.text) if answer and answer.reply else "" for name, answer in found.items()}


def _budget(budgeted: BudgetedTeacher, teacher: LanguageTeacher) -> Budget:
    known, limits = prices(budgeted.prices), teacher.limits
    price = known.models.get(limits.model)
    if budgeted.max_cost is not None and (price is None or limits.max_tokens is None):
        raise RecipeError(
            f"max_cost: what a reply of {limits.model or budgeted.spec['name']!r} can cost isn't known",
            hint="name a file with its price in `prices` and set the teacher's `max_tokens`; or leave max_cost out",
        )
    return Budget(price, budgeted.max_cost)
