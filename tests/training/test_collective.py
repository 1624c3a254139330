"""Errors that processes send to each other."""

from __future__ import annotations

import pickle

import pytest

from llavactl.core.errors import StoreError
from llavactl.training.collective import picklable


class ServiceError(OSError):
    """Like the errors of HTTP clients, which can't be unpickled."""

    def __init__(self, *, response: object) -> None:
        super().__init__(f"status {response}")


@pytest.mark.parametrize("error", [StoreError("full", hint="free space"), PermissionError(13, "denied", "/run")])
def test_errors_that_are_converted_keep_their_class(error: Exception) -> None:
    received = pickle.loads(pickle.dumps(picklable(error)))
    assert type(received) is type(error)
    assert vars(received) == vars(error)
    assert received.args == error.args


@pytest.mark.parametrize("error", [ServiceError(response=500), SystemExit(3), ValueError("wrong")])
def test_other_errors_become_their_text(error: BaseException) -> None:
    received = pickle.loads(pickle.dumps(picklable(error)))
    assert type(received) is RuntimeError
    assert repr(error) in str(received)
