"""Stored conversations and votes, and the conversation of a tab."""

import json
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llavactl_web.rendering import maps
from llavactl_web.sessions import MAX_SESSIONS, Session, Sessions
from llavactl_web.store import Vote, Votes, Wins

from llavactl import Chat, DataError, LlavactlError

Setup = Callable[..., Any]


def asked(session: Session, *questions: str) -> Session:
    for question in questions:
        for _ in session.ask(question, [], {}):
            pass
        session.save()
    return session


def test_conversations_are_private_files_of_the_terminals_format(
    setup: Setup, script: dict[str, str], photos: Sequence[Path], model: Any
) -> None:
    session, store = Session(setup()), setup().conversations
    for _ in session.ask("What?", [str(photos[0])], {}):
        pass
    session.save()
    assert [(entry.id, entry.title) for entry in store.entries()] == [(session.id, "What?")]
    file = store.file(session.id, "a")
    assert Chat.load(model, file).turns == session.chats[0].turns
    for path in (file, file.with_name("title")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (store.folder, file.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {path.name for path in file.parent.iterdir()} == {"a.json", "title"}


def test_conversations_are_continued_renamed_and_deleted(setup: Setup, script: dict[str, str]) -> None:
    made = setup()
    session = asked(Session(made), "One?")
    other = Session(made)
    other.switch_to(session.id)
    asked(other, "Two?")
    other.rename("  A\n title " + "x" * 200)
    assert [(entry.id, entry.title[:7]) for entry in made.conversations.entries()] == [(session.id, "A title")]
    made.conversations.delete(session.id)
    assert made.conversations.entries() == []
    with pytest.raises(DataError):
        other.switch_to(session.id)


def test_a_conversation_without_questions_is_opened(setup: Setup, script: dict[str, str]) -> None:
    session = asked(Session(made := setup()), "One?")
    stored = session.id
    session.undo()
    session.save()
    other = Session(made)
    other.switch_to(stored)
    assert (other.id, other.last_question) == (stored, None)


def test_two_tabs_with_one_conversation_keep_both(setup: Setup, script: dict[str, str]) -> None:
    made = setup()
    first = asked(Session(made), "One?")
    second = Session(made)
    second.switch_to(first.id)
    asked(first, "first")
    asked(second, "second")
    texts = {entry.id: made.conversations.file(entry.id, "a").read_text() for entry in made.conversations.entries()}
    assert len(texts) == 2
    assert "second" not in texts[first.id]
    assert "first" not in texts[second.id]


@pytest.mark.parametrize(
    "id", ["", "..", "../../x", "0123456789ABCDEF", "/etc", "0123456789abcdef/..", "a" * 16 + "\n"]
)
def test_ids_are_not_paths(setup: Setup, id: str) -> None:  # noqa: A002
    store = setup().conversations
    for action in (store.delete, lambda id: store.file(id, "a"), lambda id: store.rename(id, "a"), store.changed):  # noqa: A006
        with pytest.raises(DataError):
            action(id)
    with pytest.raises(DataError):
        store.file("0123456789abcdef", "../a")


def test_a_stopped_answer_is_kept_on_all_sides_or_on_none(setup: Setup, script: dict[str, str]) -> None:
    session = Session(setup("a", "b"))
    answers = session.ask("a long answer " * 20, [], {})
    assert len(next(answers)) == 2
    session.stop.set()
    assert [*answers] == []
    assert len({len(chat.turns) for chat in session.chats}) == 1
    session.stop.clear()
    asked(session, "next")
    assert [chat.turns[-1].text for chat in session.chats] == ["next", "next"]


def test_the_system_prompt_is_replaced_and_the_turns_stay(setup: Setup, script: dict[str, str]) -> None:
    session = asked(Session(setup()), "One?")
    session.set_system("Be brief.")
    assert (session.system, len(session.chats[0].turns)) == ("Be brief.", 3)
    session.set_system("")
    assert (session.system, len(session.chats[0].turns)) == ("", 2)


def test_undo_and_retry(setup: Setup, script: dict[str, str]) -> None:
    session = asked(Session(setup()), "One?", "Two?")
    script["Two?"] = "other"
    for _ in session.retry({}):
        pass
    assert session.chats[0].turns[-1].text == "other"
    assert session.undo() == ("Two?", ())
    assert session.undo() == ("One?", ())
    assert session.undo() == ("", ())


def test_each_answer_has_the_next_seed(setup: Setup, script: dict[str, str]) -> None:
    session = Session(setup())
    script["Seed?"] = "SEED"
    for _ in session.ask("Seed?", [], {"seed": 5}):
        pass
    seeds = [session.chats[0].turns[-1].text]
    for seed in (5, 5, 9, 2**63 - 1, 2**63 - 1):
        for _ in session.retry({"seed": seed}):
            pass
        seeds.append(session.chats[0].turns[-1].text)
    assert seeds == ["5", "6", "7", "9", str(2**63 - 1), "0"]


def test_explanations_of_all_sides(setup: Setup, script: dict[str, str], photos: Sequence[Path]) -> None:
    session = asked(Session(setup("a", "b")), "One?")
    assert not session.is_explainable
    script["Two?"] = "red <b> one"
    for _ in session.ask("Two?", [str(photos[0])], {}):
        pass
    assert session.is_explainable
    shares: list[float] = []
    explanations = session.explain(shares.append)
    assert [[word.text for word in each.words] for each in explanations] == [["red", "<b>", "one"]] * 2
    assert shares == sorted(shares)
    assert shares[-1] == 1
    page = maps(explanations[0])
    assert page.count("<img") == 6
    assert "&lt;b&gt;" in page
    session.stop.set()
    assert session.explain(shares.append) == []
    session.undo()
    assert not session.is_explainable


def test_blind_sides_are_random_and_stored_in_order(setup: Setup, script: dict[str, str]) -> None:
    made, first = setup("a", "b", blind=True), set()
    for _ in range(40):
        session = Session(made)
        first.add(session.models[0].name)
        assert session.names == ["Model A", "Model B"]
    assert first == {"a", "b"}
    asked(session, "Question?")
    session.vote("tie")
    assert {*session.names} == {"a", "b"}
    with pytest.raises(LlavactlError):
        session.vote("a")
    asked(session, "Next?")
    session.vote("a")
    assert [json.loads(line)["blind"] for line in made.votes.file.read_text().splitlines()] == [True, False]


def test_votes_are_counted_by_pair(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "web" / "votes.jsonl")
    assert votes.wins() == []
    for vote in (
        Vote("x", "y", "a", True),
        Vote("y", "x", "a", False),
        Vote("y", "x", "b", True),
        Vote("x", "z", "tie", True),
    ):
        votes.add(vote)
    votes.add(Vote("x", "y", "both bad", True))
    with votes.file.open("a") as file:
        file.write('{"outcome": "a"}\nnot json\n{"a": "x", "b": "x", "outcome": "a"}\n[]\n')
    assert votes.wins() == [Wins("x", "y", 2, 1, 0, 1), Wins("x", "z", 0, 0, 1, 0)]
    assert stat.S_IMODE(votes.file.stat().st_mode) == 0o600


def test_a_closed_tab_ends_its_answer_and_old_tabs_are_forgotten(setup: Setup) -> None:
    sessions = Sessions(setup())
    session = sessions.of("tab")
    assert sessions.of("tab") is session
    sessions.end("tab")
    sessions.end("unknown")
    assert session.stop.is_set()
    for number in range(MAX_SESSIONS):
        sessions.of(str(number))
    assert sessions.of("tab") is not session
