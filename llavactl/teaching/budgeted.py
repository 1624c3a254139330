"""A teacher that judges a model's answers: requests within a budget, replies stored so that none is paid for twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llavactl.core.errors import DataError, RecipeError, TeacherError
from llavactl.core.protocols import Ask, BudgetedTeacher, LanguageTeacher, Reply, Request, Teacher
from llavactl.core.registry import registry
from llavactl.teaching.budget import Budget
from llavactl.teaching.cleanup import without_thinking
from llavactl.teaching.journal import Journal, exclusive_output
from llavactl.teaching.keyed import with_keys
from llavactl.teaching.prices import load_prices
from llavactl.teaching.sender import send_requests


def teacher_name(budgeted: BudgetedTeacher) -> str:
    """The teacher's name and model, as evaluation results name it."""
    spec = budgeted.spec
    return " ".join(str(spec[key]) for key in ("name", "model") if spec.get(key))


def ask_function(budgeted: BudgetedTeacher, journal_file: Path) -> Ask:
    """A function that sends requests to ``budgeted``; a language teacher's replies are stored in ``journal_file``.

    Raises (when it is called):
        RecipeError: an invalid option of the teacher, or a budget without a price.
        TeacherError: the teacher can't answer, or the budget is exhausted; earlier replies are kept.
        DataError: the replies can't be stored.
    """

    def ask(requests: Sequence[Request]) -> Mapping[str, str]:
        teacher = registry().create("teachers", budgeted.spec)
        if isinstance(teacher, LanguageTeacher):
            return _stored_replies(teacher, requests, journal_file, _budget(budgeted, teacher))
        return {request.id: _reply(teacher, request) for request in requests}

    return ask


def _reply(teacher: Teacher, request: Request) -> str:
    """A reply that is free and therefore not stored."""
    reply = teacher.reply(request)
    return _answer(reply.text if isinstance(reply, Reply) else reply)


def _answer(reply: str) -> str:
    """``reply`` without the thinking before it; unchanged if the thinking has no end."""
    try:
        answer = without_thinking(reply)
        return reply if answer == reply else answer.strip()
    except DataError:
        return reply


def _stored_replies(
    teacher: LanguageTeacher, requests: Sequence[Request], journal_file: Path, budget: Budget
) -> Mapping[str, str]:
    keyed = tuple(with_keys(teacher, requests))
    with exclusive_output(journal_file), Journal(journal_file) as journal:
        answered = journal.answered_keys()
        pending = [each for each in keyed if each.key not in answered]
        budget.spent = journal.spent().cost
        result = send_requests(teacher, pending, journal, budget, answered=len(keyed) - len(pending), label="judge")
        outcomes = {each.request.id: journal.outcome(each.key) for each in keyed}
    if missing := [name for name, outcome in outcomes.items() if outcome is None]:
        reason = result.stopped or next(iter(result.unanswered.values()), "")
        raise TeacherError(
            f"{len(missing)} of {len(keyed)} requests have no reply: {reason}",
            hint=f"{len(keyed) - len(missing)} replies are stored in {journal_file}; run the same command to resume",
        )
    return {
        name: _answer(outcome.reply.text) if outcome and outcome.reply else "" for name, outcome in outcomes.items()
    }


def _budget(budgeted: BudgetedTeacher, teacher: LanguageTeacher) -> Budget:
    limits = teacher.limits
    price = load_prices(budgeted.prices).models.get(limits.model)
    if budgeted.max_cost is not None and (price is None or limits.max_tokens is None):
        raise RecipeError(
            f"max_cost: the maximum cost of a reply of {limits.model or budgeted.spec['name']!r} is unknown",
            hint="set `prices` to a file with its price and the teacher's `max_tokens`, or remove max_cost",
        )
    return Budget(price, budgeted.max_cost)
