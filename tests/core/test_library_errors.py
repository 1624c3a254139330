"""Loading weights: transformers' table of unused weights is not printed."""

from __future__ import annotations

from transformers.utils import logging

from llavactl.core.library_errors import loading


def test_transformers_logs_only_errors_while_weights_are_loaded() -> None:
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        with loading("language model", "some/model", weights=True):
            assert logging.get_verbosity() == logging.ERROR
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)
